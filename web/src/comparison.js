// Models on the same prompts: a stage for each prompt, whose dividers move together.
import { setDivider, startStage } from "./stage.js";
import { announce } from "./units.js";

export function startComparison(data) {
  const root = document.querySelector("[data-comparison]");
  if (!root) return;
  const { models, prompts } = data, one = models.length === 1;
  const pictures = models.map((_, i) => JSON.parse(root.querySelector(`[data-model="${i}"]`).textContent));
  const stages = [...root.querySelectorAll(".stage")], dialog = root.querySelector("dialog");
  const choose = name => root.querySelector(`[data-choose=${name}]`);
  const state = { a: 0, b: one ? 0 : 1, mode: one ? "one" : "slide" };

  function show(change) {
    Object.assign(state, change);
    stages.forEach((stage, i) => {
      stage.dataset.mode = state.mode;
      for (const name of one ? ["a"] : ["a", "b"]) {
        const image = stage.querySelector(`[data-${name}]`), model = models[state[name]];
        image.src = pictures[state[name]][i];
        image.alt = `${name.toUpperCase()}, ${model}: ${prompts[i]}`;
        stage.querySelector(`[data-tag-${name}]`).textContent = one ? "" : `${name.toUpperCase()} ${model}`;
      }
    });
    if (one) return;
    for (const name of ["a", "b"]) choose(name).value = state[name];
    for (const input of root.querySelectorAll("[name=mode]")) input.checked = input.value === state.mode;
  }
  function change(what) {
    show(what);
    announce(`A ${models[state.a]}, B ${models[state.b]}, ${state.mode}`);
  }

  const slideAll = share => stages.forEach(stage => setDivider(stage, share));
  const buttons = [...root.querySelectorAll("[data-enlarge]")];
  const enlarge = stages.map((stage, i) =>
    startStage(stage, slideAll, dialog, () => buttons[i].focus({ preventScroll: true })));
  buttons.forEach((button, i) => button.addEventListener("click", enlarge[i]));
  for (const cell of root.querySelectorAll("[data-cell]")) {
    const [model, prompt] = cell.dataset.cell.split(" ").map(Number);
    cell.append(Object.assign(new Image(), { src: pictures[model][prompt], alt: "", decoding: "async" }));
    cell.addEventListener("click", () => { change({ b: model }); enlarge[prompt](); });
  }
  show({});
  slideAll(50);
  if (one) return;
  root.addEventListener("change", ({ target }) => {
    if (target.name === "mode") change({ mode: target.value });
    if (target.dataset.choose) change({ [target.dataset.choose]: Number(target.value) });
  });
  const keys = {
    x: () => change({ a: state.b, b: state.a }),
    d: () => change({ mode: state.mode === "difference" ? "slide" : "difference" }),
  };
  addEventListener("keydown", ({ target, key, ctrlKey, metaKey, altKey }) => {
    if (!ctrlKey && !metaKey && !altKey && !target.closest("select")) keys[key]?.();
  });
}
