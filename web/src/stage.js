// Two pictures, A and B, one over the other: a drag moves the divider, a click enlarges.

export function setDivider(stage, share) {
  stage.querySelector("[data-divider]").value = share;
  stage.style.setProperty("--share", `${share}%`);
}

// Calls slide(share) when the divider moves, opened() in the dialog and closed() after it; returns
// what enlarges.
export function startStage(stage, slide, dialog, closed, opened = () => {}) {
  const divider = stage.querySelector("[data-divider]");
  divider.addEventListener("input", () => slide(divider.value));
  let press = null;
  stage.addEventListener("pointerdown", event => {
    press = { x: event.clientX, y: event.clientY, share: stage.style.getPropertyValue("--share") || "50%" };
  }, true);
  stage.addEventListener("click", event => {
    if (!press || Math.hypot(event.clientX - press.x, event.clientY - press.y) > 4) return;
    slide(parseFloat(press.share)); // as it was: a click moves a range
    press = null;
    enlarge();
  });
  const a = stage.querySelector("[data-a]");
  for (const image of stage.querySelectorAll("img")) image.addEventListener("load", ({ target }) => {
    if (target !== a && a.hasAttribute("src")) return; // A gives the shape, if it has a picture
    const ratio = target.naturalWidth / target.naturalHeight;
    stage.style.aspectRatio = stage.dataset.mode === "side by side" ? 2 * ratio : ratio;
  });
  function enlarge() {
    if (dialog.open) return;
    const place = document.createComment("");
    stage.replaceWith(place);
    dialog.append(stage);
    dialog.showModal();
    opened();
    dialog.addEventListener("close", () => { place.replaceWith(stage); closed(); }, { once: true });
  }
  return enlarge;
}
