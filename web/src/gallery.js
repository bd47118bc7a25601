// The decoded latents of a store, a page at a time, filtered by tags.
import { announce, number } from "./units.js";

const SHOWN = 24; // pictures of a page

export function startGallery(data) {
  const root = document.querySelector("[data-gallery]");
  if (!root) return;
  const pictures = JSON.parse(root.querySelector("[data-pictures]").textContent);
  const place = root.querySelector(".gallery"), filter = root.querySelector("input");
  const said = root.querySelector("output"), samples = data.samples;
  const tags = samples.map(it => it.caption.split(/[,\n]/).map(tag => tag.trim().toLowerCase()));
  let chosen = samples.map((_, i) => i), first = 0;

  function show() {
    const last = Math.min(first + SHOWN, chosen.length);
    place.replaceChildren(...chosen.slice(first, last).map(i => {
      const { key, caption, about } = samples[i], figure = document.createElement("figure");
      const words = document.createElement("figcaption"), small = document.createElement("small");
      small.textContent = `${key}, ${about}`;
      words.append(caption || "(no caption)", small);
      words.tabIndex = 0; // it may scroll
      figure.append(Object.assign(new Image(), { src: pictures[i], alt: `${key}: ${caption || "no caption"}` }), words);
      return figure;
    }));
    said.textContent = chosen.length ? `${first + 1} to ${last} of ${number(chosen.length)}` : "none has these tags";
    root.querySelector("[data-go='-1']").disabled = first === 0;
    root.querySelector("[data-go='1']").disabled = last === chosen.length;
  }
  filter.addEventListener("input", () => {
    const wanted = filter.value.split(",").map(it => it.trim().toLowerCase()).filter(Boolean);
    const has = i => wanted.every(tag => data.tags ? tags[i].includes(tag) : samples[i].caption.toLowerCase().includes(tag));
    chosen = samples.map((_, i) => i).filter(has);
    first = 0;
    show();
    announce(said.textContent);
  });
  root.addEventListener("click", ({ target }) => {
    if (!target.dataset.go) return;
    first += SHOWN * Number(target.dataset.go);
    show();
    announce(said.textContent);
  });
  show();
}
