// The decoded latents of a store, a page at a time, filtered by tags.
import { announce, number } from "./units.js";

const SHOWN = 24; // pictures of a page

export function startGallery(data) {
  const root = document.querySelector("[data-gallery]");
  if (!root) return;
  const pictures = JSON.parse(root.querySelector("[data-pictures]").textContent);
  const place = root.querySelector(".gallery"), filter = root.querySelector("input");
  const said = root.querySelector("output"), { samples, columns } = data;
  const several = columns.length > 1;
  const lower = samples.map(it => it.captions.map(text => text.toLowerCase()));
  const tags = lower.map(texts => new Set(texts.flatMap((text, i) =>
    data.tags[i] ? text.split(/[,\n]/).map(tag => tag.trim()) : [])));
  // A tag is matched whole, a word of a sentence anywhere.
  const has = (i, wanted) => tags[i].has(wanted) || lower[i].some((text, j) => !data.tags[j] && text.includes(wanted));
  let chosen = samples.map((_, i) => i), first = 0;

  function element(name, ...content) {
    const made = document.createElement(name);
    made.append(...content);
    return made;
  }
  function figure(i) {
    const { key, captions, about } = samples[i];
    const words = element("figcaption"), spoken = captions.filter(Boolean).join("; ") || "no caption";
    captions.forEach((text, j) => {
      if (text) words.append(element("p", ...several ? [element("b", columns[j]), " "] : [], text));
    });
    if (!captions.some(Boolean)) words.append(element("p", "(no caption)"));
    words.append(element("small", `${key}, ${about}`));
    words.tabIndex = 0; // it may scroll
    return element("figure", Object.assign(new Image(), { src: pictures[i], alt: `${key}: ${spoken}` }), words);
  }
  function show() {
    const last = Math.min(first + SHOWN, chosen.length);
    place.replaceChildren(...chosen.slice(first, last).map(figure));
    said.textContent = chosen.length ? `${first + 1} to ${last} of ${number(chosen.length)}` : "no picture has these tags";
    // Not disabled: a button that becomes so loses the keyboard's focus.
    root.querySelector("[data-go='-1']").setAttribute("aria-disabled", first === 0);
    root.querySelector("[data-go='1']").setAttribute("aria-disabled", last === chosen.length);
  }
  function turn(pages) {
    const to = first + SHOWN * pages;
    if (to < 0 || to >= chosen.length) return;
    first = to;
    show();
    announce(said.textContent);
  }
  function choose() {
    const wanted = filter.value.split(",").map(it => it.trim().toLowerCase()).filter(Boolean);
    chosen = samples.map((_, i) => i).filter(i => wanted.every(tag => has(i, tag)));
    first = 0;
    show();
    announce(said.textContent);
  }
  filter.addEventListener("input", choose);
  root.addEventListener("click", ({ target }) => { if (target.dataset.go) turn(Number(target.dataset.go)); });
  root.addEventListener("keydown", ({ target, key, ctrlKey, metaKey, altKey }) => {
    if (target === filter || ctrlKey || metaKey || altKey) return;
    if (key === "ArrowLeft" || key === "ArrowRight") turn(key === "ArrowLeft" ? -1 : 1);
  });
  show();
}
