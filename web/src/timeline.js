// The samples: a pair to compare, A and B, and a table of all by prompt, run and step.
import { setDivider, startStage } from "./stage.js";
import { announce, nearest, number, stepWords } from "./units.js";

const KEPT = 64; // sheets whose pictures stay parsed

export function startTimeline(data, charts) {
  const root = document.querySelector("[data-timeline]");
  if (!root) return;
  const find = selector => root.querySelector(selector);
  const runs = data.runs, parsed = new Map();
  let prompts, folders, steps, sheets, stepsOf, frames;
  const has = (run, step) => sheets.has(`${run} ${step}`);
  function read(samples, elements) {
    ({ prompts, folders, steps } = samples);
    sheets = new Map([...elements].map(it => [it.dataset.sheet, it]));
    stepsOf = runs.map((_, run) => steps.filter(step => has(run, step)));
    frames = steps.flatMap(step => runs.map((_, run) => ({ run, step })).filter(it => has(it.run, it.step)));
    parsed.clear();
  }
  read(data.samples, root.querySelectorAll("[data-sheet]"));
  const state = { prompt: 0, a: frames[0], b: frames.at(-1), mode: "slide" };
  const stage = find(".stage"), slider = find("[data-step]");
  const film = find(".film"), dialog = find("dialog");
  const cells = new Map(); // "run step prompt" -> button

  // The pictures of a step, parsed when they are needed: a page may hold thousands.
  function pictures(run, step) {
    const name = `${run} ${step}`;
    const found = parsed.get(name) ?? JSON.parse(sheets.get(name)?.textContent ?? "[]");
    parsed.delete(name);
    parsed.set(name, found);
    if (parsed.size > KEPT) parsed.delete(parsed.keys().next().value);
    return found;
  }

  const label = ({ run, step }) => (runs.length > 1 ? `${runs[run]}, ` : "") + `step ${number(step)}`;
  const promptOf = (run, prompt) => prompts[run][prompt] || "(no prompt)";

  function choose(change, quiet = false) {
    Object.assign(state, change);
    const { a, b, prompt } = state;
    for (const [name, it] of [["a", a], ["b", b]]) {
      const image = stage.querySelector(`[data-${name}]`), source = pictures(it.run, it.step)[prompt];
      if (source) image.src = source; else image.removeAttribute("src");
      const none = source ? "" : ", no picture";
      image.alt = `${name.toUpperCase()}, ${label(it)}${none}: ${promptOf(it.run, prompt)}`;
      find(`[data-tag-${name}]`).textContent = `${name.toUpperCase()} ${label(it)}${none}`;
      find(`[data-choose=${name}]`).value = frames.indexOf(it);
    }
    stage.dataset.mode = state.mode;
    for (const input of root.querySelectorAll("[name=mode]")) input.checked = input.value === state.mode;
    slider.value = stepsOf[b.run].indexOf(b.step);
    slider.setAttribute("aria-valuetext", label(b));
    const words = [a, b].map(it => promptOf(it.run, prompt)), same = words[0] === words[1];
    find("[data-prompt]").textContent = same ? words[1] : `A: ${words[0]}\nB: ${words[1]}`;
    find("[data-original]").href = original(b);
    const facts = factsAt(b);
    find("[data-facts]").replaceChildren(...facts.map(([name, value, more]) => {
      const group = document.createElement("div"), small = document.createElement("small");
      small.textContent = more ?? "";
      group.append(element("dt", name), element("dd", value, small));
      return group;
    }));
    mark();
    if (dialog.open) sharpen();
    if (!quiet) announce(`${label(b)}, ${promptOf(b.run, prompt)}. ${facts.slice(1).map(it => it.slice(0, 2).join(" ")).join(", ")}`);
  }

  const original = ({ run, step }) =>
    `${folders[run]}/step-${String(step).padStart(8, "0")}/${String(state.prompt).padStart(2, "0")}.png`;

  // Show the originals, if they are there; a page that was moved keeps its thumbnails.
  function sharpen() {
    for (const name of ["a", "b"]) {
      const image = stage.querySelector(`[data-${name}]`), small = image.src, large = new Image();
      large.onload = () => { if (image.src === small) image.src = large.src; };
      if (image.hasAttribute("src")) large.src = original(state[name]);
    }
  }

  function mark() {
    const { a, b, prompt } = state, of = it => cells.get(`${it.run} ${it.step} ${prompt}`);
    for (const cell of film.querySelectorAll(".chosen-a, [aria-pressed=true]")) {
      cell.classList.remove("chosen-a");
      cell.setAttribute("aria-pressed", "false");
      cell.tabIndex = -1;
    }
    of(a)?.classList.add("chosen-a");
    const cell = of(b);
    if (!cell) return;
    cell.setAttribute("aria-pressed", "true");
    cell.tabIndex = 0;
    if (film.contains(document.activeElement)) cell.focus({ preventScroll: true });
    reveal(cell);
  }

  // Scroll the table, and not the page, so that a cell is in view.
  function reveal(cell) {
    const box = film.getBoundingClientRect(), it = cell.getBoundingClientRect();
    const head = film.querySelector("tbody th").offsetWidth;
    if (it.left < box.left + head) film.scrollLeft -= box.left + head - it.left + it.width;
    if (it.right > box.right) film.scrollLeft += it.right - box.right + it.width;
    if (it.top < box.top + 40) film.scrollTop -= box.top + 40 - it.top;
    if (it.bottom > box.bottom) film.scrollTop += it.bottom - box.bottom;
  }

  // What was measured at a step, or last before it.
  function factsAt({ run, step }) {
    const line = (id, ok) => charts.charts.find(it => it.id === id)?.lines.find(it => it.run === run && ok(it));
    const [when, ...more] = stepWords(charts.axes[run] ?? {}, step).split(" · ");
    const facts = [["B", when, more.join(" · ")]];
    const held = line("loss", it => it.kind === "interval"), raw = line("loss", it => it.kind === "raw");
    const rate = line("lr", it => it.kind === "line");
    const before = held ? held.x.findLastIndex(x => x <= step) : -1;
    if (before >= 0) {
      const where = held.x[before] === step ? "" : `, step ${number(held.x[before])}`;
      facts.push(["Held-out loss", number(held.y[before]), `${number(held.low[before])} to ${number(held.high[before])}${where}`]);
    }
    if (raw) facts.push(["Training loss, smoothed", number(raw.drawn[nearest(raw.x, step)])]);
    if (rate) facts.push(["Learning rate", number(rate.y[nearest(rate.x, step)])]);
    return facts;
  }

  // B's step moves among those that its run has.
  function go(by) {
    const own = stepsOf[state.b.run], at = own.indexOf(state.b.step) + by;
    if (at >= 0 && at < own.length) choose({ b: frame(state.b.run, own[at]) });
  }

  const frame = (run, step) => frames.find(it => it.run === run && it.step === step);

  function rows() { // prompt and run of each row of the table
    const count = Math.max(...prompts.map(it => it.length));
    return Array.from({ length: count }, (_, prompt) => runs.map((_, run) => ({ prompt, run })))
      .flat().filter(({ prompt, run }) => prompt < prompts[run].length && stepsOf[run].length);
  }

  function down(by) {
    const all = rows(), at = all.findIndex(it => it.prompt === state.prompt && it.run === state.b.run) + by;
    if (!all[at]) return;
    const { prompt, run } = all[at], own = stepsOf[run];
    choose({ prompt, b: frame(run, own[nearest(own, state.b.step)]) });
  }

  function element(name, ...content) {
    const made = document.createElement(name);
    made.append(...content.filter(it => it != null));
    return made;
  }

  function fill() {
    const head = film.querySelector("thead tr"), body = film.querySelector("tbody");
    seen.disconnect();
    cells.clear();
    head.replaceChildren(head.firstElementChild);
    body.replaceChildren();
    const room = (film.clientWidth - 170) / Math.max(1, steps.length) - 4;
    film.style.setProperty("--columns", steps.length);
    if (innerWidth > 560) film.style.setProperty("--cell", `${Math.min(Math.max(room, 110), 190)}px`);
    for (const step of steps) head.append(Object.assign(element("th", `step ${number(step)}`), { scope: "col" }));
    let before = null; // a prompt is told once for all runs
    for (const { prompt, run } of rows()) {
      const words = promptOf(run, prompt), th = element("th");
      if (words !== before) th.append(element("span", words));
      if (runs.length > 1) th.append(element("b", runs[run]));
      before = words;
      const row = element("tr", Object.assign(th, { scope: "row", title: words }));
      for (const step of steps) {
        const cell = element("td");
        if (has(run, step)) {
          const button = Object.assign(element("button"), { type: "button", tabIndex: -1 });
          button.setAttribute("aria-label", `${label({ run, step })}: ${promptOf(run, prompt)}`);
          button.setAttribute("aria-pressed", "false");
          button.dataset.cell = `${run} ${step} ${prompt}`;
          cells.set(button.dataset.cell, button);
          cell.append(button);
          seen.observe(button);
        }
        row.append(cell);
      }
      body.append(row);
    }
  }

  // Pictures exist while they are near the view.
  const seen = new IntersectionObserver(entries => {
    for (const { target, isIntersecting } of entries) show(target, isIntersecting);
  }, { root: film, rootMargin: "200px" });
  function show(cell, wanted) {
    if (!wanted) return document.documentElement.matches(".printing") || cell.replaceChildren();
    const [run, step, prompt] = cell.dataset.cell.split(" "), source = pictures(run, step)[prompt];
    if (source && !cell.firstChild) cell.append(Object.assign(new Image(), { src: source, alt: "", decoding: "async" }));
  }

  const enlarge = startStage(stage, share => setDivider(stage, share), dialog, () => {
    cells.get(`${state.b.run} ${state.b.step} ${state.prompt}`)?.focus({ preventScroll: true });
  }, sharpen);

  root.addEventListener("click", ({ target }) => {
    const cell = target.closest("[data-cell]");
    if (cell) {
      const [run, step, prompt] = cell.dataset.cell.split(" ").map(Number);
      choose({ prompt, b: frame(run, step) });
    } else if (target.closest("[data-go]")) go(Number(target.closest("[data-go]").dataset.go));
    else if (target.closest("[data-enlarge]")) enlarge();
  });
  slider.addEventListener("input", () => choose({ b: frame(state.b.run, stepsOf[state.b.run][slider.value]) }));
  root.addEventListener("change", ({ target }) => {
    if (target.name === "mode") choose({ mode: target.value });
    const own = target.dataset.choose;
    if (own) {
      choose({ [own]: frames[target.value] });
      if (own === "b") limits();
    }
  });
  addEventListener("keydown", event => {
    const { target, key, ctrlKey, metaKey, altKey } = event, here = root.contains(target);
    if (ctrlKey || metaKey || altKey || target.closest("select, textarea")) return;
    const ranged = target.matches("input"); // which has arrow keys of its own
    const move = { ArrowLeft: () => go(-1), ArrowRight: () => go(1), ArrowUp: () => down(-1), ArrowDown: () => down(1) }[key];
    const act = { a: () => choose({ a: state.b }), d: () => choose({ mode: state.mode === "difference" ? "slide" : "difference" }), Enter: enlarge }[key];
    if (move && !ranged && (here || (target === document.body && /Left|Right/.test(key)))) move();
    else if (act && here && !(key === "Enter" && !target.matches("[data-cell], [data-divider]"))) act();
    else return;
    event.preventDefault();
  });
  charts.onStep = step => {
    const own = stepsOf[state.b.run];
    choose({ b: frame(state.b.run, own[nearest(own, step)]) });
  };

  function limits() {
    slider.max = stepsOf[state.b.run].length - 1;
    slider.value = stepsOf[state.b.run].indexOf(state.b.step);
  }
  function begin() {
    for (const select of root.querySelectorAll("[data-choose]")) {
      select.replaceChildren(...frames.map((it, i) => Object.assign(element("option", label(it)), { value: i })));
    }
    fill();
    limits();
    choose({}, true);
  }
  begin();
  addEventListener("beforeprint", () => [...cells.values()].slice(0, 200).forEach(cell => show(cell, true)));

  // The samples of a newer page. B follows the newest step if it is there; else nothing moves.
  function renew(samples, elements) {
    const { a, b } = state, follows = stepsOf[b.run].at(-1) === b.step, held = film.contains(document.activeElement);
    read(samples, elements);
    state.a = frame(a.run, a.step) ?? frames[0];
    state.b = frame(b.run, follows ? stepsOf[b.run].at(-1) : b.step) ?? frames.at(-1);
    begin();
    if (held) cells.get(`${state.b.run} ${state.b.step} ${state.prompt}`)?.focus({ preventScroll: true });
  }
  return { renew };
}
