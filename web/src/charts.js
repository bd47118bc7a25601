// The charts: uPlot draws them; here are their common horizontal axis, zoom, cursor and smoothing.
import uPlot from "uplot";
import { smoothed } from "./smoothing.js";
import { announce, convert, nearest, number, stepWords, tick } from "./units.js";

const DENSE = 60; // intervals; more are shaded, not drawn one by one
const WIDE = { raw: 1, line: 2, dashed: 1.5, interval: 1.5 };

export function startCharts(data) {
  const view = { unit: "step", width: 1, log: false, all: false, range: null };
  const axes = data.axes ?? [];
  const charts = (data.charts ?? []).map(chart => ({
    ...chart,
    figure: document.querySelector(`[data-chart="${chart.id}"]`),
    lines: chart.lines.map(line => ({ ...line, shown: true })),
  }));
  const api = { charts, axes, view, draw, redraw, onStep: () => {} };

  function draw() {
    prepare();
    for (const chart of charts) build(chart);
  }

  // The same lines with other values: charts that nobody sees wait until they are seen.
  function redraw() {
    prepare();
    for (const chart of charts) chart.stale = true;
    refresh(charts.filter(chart => chart.seen && !document.hidden));
  }

  function refresh(some) {
    for (const chart of some.filter(it => it.stale)) {
      chart.stale = false;
      chart.plot.setData(tableOf(chart));
      if (chart.at != null) point(chart);
    }
  }

  function tableOf(chart) {
    return uPlot.join(chart.lines.flatMap(line => {
      const table = [line.at, line.y];
      return line.kind === "raw" ? [table, [line.at, line.drawn]] : [table];
    }));
  }

  // Steps in the chosen unit, and smoothed lines.
  function prepare() {
    for (const line of charts.flatMap(chart => chart.lines)) {
      line.at = line.x.map(step => convert(axes[line.run] ?? {}, view.unit, step));
      line.drawn = line.kind === "raw" ? smoothed(line.y, view.width) : line.y;
    }
    const all = charts.flatMap(chart => chart.lines.map(line => [line.at[0], line.at.at(-1)])).flat();
    view.full = [Math.min(...all), Math.max(...all)];
    if (view.full[0] === view.full[1]) view.full[1] += 1;
  }

  function build(chart) {
    const place = chart.figure.querySelector(".plot");
    chart.plot?.destroy();
    chart.stale = false;
    const series = [{}];
    for (const line of chart.lines) {
      const stroke = colour(chart, line);
      const dash = line.kind === "dashed" ? [6, 4] : undefined;
      const dots = (line.kind === "interval" && line.x.length <= DENSE) || line.x.length === 1;
      const own = { stroke, dash, width: WIDE[line.kind], show: line.shown, points: { show: dots, size: 6, fill: stroke } };
      series.push(line.kind === "raw" ? { ...own, alpha: 0.42 } : own);
      if (line.kind === "raw") series.push({ ...own, width: 2.2 });
    }
    const muted = css(place, "--muted"), grid = { stroke: css(place, "--faint"), width: 1 };
    const look = { stroke: muted, grid, ticks: { show: false }, font: "13px system-ui, sans-serif" };
    chart.plot = new uPlot({
      width: place.clientWidth, height: place.clientHeight, legend: { show: false }, padding: [8, 20, 0, 0],
      series,
      scales: {
        x: { time: false, range: () => view.range ?? view.full },
        y: { distr: view.log ? 3 : 1, range: u => fit(chart, u) },
      },
      axes: [
        { ...look, size: 30, space: 70, values: (u, ticks) => ticks.map(x => tick(view.unit, x)) },
        { ...look, size: place.clientWidth < 260 ? 52 : 62, values: (u, ticks) => ticks.map(y => y == null ? "" : number(y)) },
      ],
      cursor: {
        y: false, sync: { key: "steps", setSeries: false, scales: ["x", null] },
        drag: { setScale: false }, bind: { dblclick: () => () => zoom(null) },
        points: { show: false },
      },
      hooks: {
        drawAxes: [u => shade(chart, u)],
        draw: [u => whiskers(chart, u)],
        setSelect: [u => select(u)],
        setCursor: [u => tell(chart, u)],
      },
    }, tableOf(chart), place);
    chart.plot.over.addEventListener("mouseleave", () => hide(chart));
    let clicked; // a double click resets the zoom, and chooses no step
    chart.plot.over.addEventListener("click", ({ detail }) => {
      clearTimeout(clicked);
      const { left } = chart.plot.cursor, line = chart.lines.find(it => it.shown);
      if (!line || left < 0 || detail > 1) return;
      const step = line.x[nearest(line.at, chart.plot.posToVal(left, "x"))];
      clicked = setTimeout(() => api.onStep(step), 300);
    });
    hide(chart);
  }

  // The least and the highest value to show: what is drawn smoothed, and the intervals.
  function fit(chart, u) {
    const [from, to] = view.range ?? view.full;
    let low = Infinity, high = -Infinity;
    const take = y => {
      if (y == null || (view.log && y <= 0)) return;
      low = Math.min(low, y);
      high = Math.max(high, y);
    };
    const raw = [];
    for (const line of chart.lines.filter(it => it.shown)) {
      line.at.forEach((x, i) => {
        if (x < from || x > to) return;
        take(line.drawn[i]);
        if (line.kind === "interval" || view.all) [line.low[i], line.high[i]].forEach(take);
        if (view.all) take(line.y[i]);
        if (line.kind === "raw" && line.y[i] != null) raw.push([line.low[i] ?? line.y[i], line.high[i] ?? line.y[i]]);
      });
    }
    if (low > high) [low, high] = [view.log ? 0.1 : 0, 1];
    const margin = view.log ? 0 : (high - low) * 0.08 || Math.abs(high) * 0.1 || 0.5;
    const ends = view.log ? [low / 1.1, high * 1.1] : [low >= 0 && low < (high - low) ? Math.max(0, low - margin) : low - margin, high + margin];
    const cut = raw.filter(([least, most]) => least < ends[0] || most > ends[1]).length;
    const count = cut ? ` ${number(cut)} of ${number(raw.length)} points reach outside the frame.` : "";
    chart.figure.querySelector("[data-note]").textContent = chart.note + count;
    return ends;
  }

  function within(u, drawing) {
    const { ctx, bbox } = u;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.setLineDash([]); // uPlot leaves that of the last line
    drawing(ctx);
    ctx.restore();
  }

  // Many intervals; and, with all values, from the least to the most of a point's steps.
  function shade(chart, u) {
    within(u, ctx => {
      for (const line of chart.lines.filter(it => it.shown && it.low.length)) {
        if (line.kind === "interval" ? line.x.length <= DENSE : !view.all) continue;
        ctx.globalAlpha = 0.16;
        ctx.fillStyle = colour(chart, line);
        ctx.beginPath();
        const point = (i, y) => ctx.lineTo(u.valToPos(line.at[i], "x", true), u.valToPos(y, "y", true));
        line.high.forEach((y, i) => y != null && point(i, y));
        for (let i = line.low.length - 1; i >= 0; i--) if (line.low[i] != null) point(i, line.low[i]);
        ctx.fill();
      }
    });
  }

  function whiskers(chart, u) {
    within(u, ctx => {
      for (const line of chart.lines.filter(it => it.shown && it.kind === "interval" && it.x.length <= DENSE)) {
        ctx.strokeStyle = colour(chart, line);
        ctx.lineWidth = 1.5 * devicePixelRatio;
        line.at.forEach((at, i) => {
          if (line.low[i] == null || line.high[i] == null) return;
          const x = u.valToPos(at, "x", true), cap = 3 * devicePixelRatio;
          const [low, high] = [line.low[i], line.high[i]].map(y => u.valToPos(y, "y", true));
          ctx.beginPath();
          ctx.moveTo(x, low);
          ctx.lineTo(x, high);
          for (const y of [low, high]) { ctx.moveTo(x - cap, y); ctx.lineTo(x + cap, y); }
          ctx.stroke();
        });
      }
    });
  }

  function colour(chart, line) {
    const several = data.runs.length > 1;
    const own = several ? line.run % 8 : { raw: 0, line: 0, interval: 1, dashed: 3 }[line.kind];
    return css(chart.figure.querySelector(".plot"), `--c${own}`);
  }

  function select(u) {
    const { left, width } = u.select;
    if (width > 4) zoom([u.posToVal(left, "x"), u.posToVal(left + width, "x")]);
    u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
  }

  function zoom(range) {
    const [first, last] = view.full;
    if (range) range = [Math.max(first, range[0]), Math.min(last, range[1])];
    view.range = range && range[1] > range[0] ? range : null;
    const [min, max] = view.range ?? view.full;
    for (const { plot } of charts) plot.setScale("x", { min, max });
  }

  // The values of all lines at the cursor, in words.
  function tell(chart, u) {
    const { left, event } = u.cursor;
    if (!(left >= 0) || !(event || chart.at != null)) return hide(chart);
    const at = chart.at ?? u.posToVal(left, "x"), lines = chart.lines.filter(line => line.shown);
    if (!lines.length) return hide(chart);
    const index = lines.map(line => nearest(line.at, at));
    const head = stepWords(axes[lines[0].run] ?? {}, lines[0].x[index[0]]);
    const rows = lines.map((line, k) => say(chart, line, index[k], lines[0].x[index[0]]));
    const tip = chart.tip ??= Object.assign(document.createElement("div"), { className: "tip" });
    if (!tip.isConnected) chart.figure.querySelector(".plot").append(tip);
    const title = Object.assign(document.createElement("b"), { textContent: head });
    tip.replaceChildren(title, ...rows.flatMap(row => [row, document.createElement("br")]));
    tip.hidden = false;
    const room = u.over.clientWidth + u.over.offsetLeft, x = left + u.over.offsetLeft;
    const { offsetWidth } = tip;
    tip.style.left = `${Math.max(0, x + 14 + offsetWidth < room ? x + 14 : x - 14 - offsetWidth)}px`;
    chart.words = [head, ...rows].join("; ");
  }

  function say(chart, line, i, step) {
    const name = (data.runs.length > 1 ? `${data.runs[line.run]}, ` : "") + line.label;
    const unit = chart.unit && !chart.unit.startsWith(line.label) ? ` ${chart.unit}` : "";
    const ends = line.low.length ? ` (${number(line.low[i])} to ${number(line.high[i])})` : "";
    const where = line.kind === "interval" && line.x[i] !== step ? ` at step ${number(line.x[i])}` : "";
    if (line.kind !== "raw") return `${name}: ${number(line.y[i])}${unit}${ends}${where}`;
    return `${name}: ${number(line.y[i])}${ends}; smoothed ${number(line.drawn[i])}`;
  }

  function hide(chart) {
    if (chart.tip) chart.tip.hidden = true;
    chart.at = null;
  }

  // The cursor goes to the value that a key chose; it stays there when points come.
  function point({ plot, at }) {
    plot.setCursor({ left: Math.min(Math.max(plot.valToPos(at, "x"), 0), plot.over.clientWidth - 1), top: 10 });
  }

  function key(chart, event) {
    refresh([chart]);
    const { plot } = chart, [min, max] = view.range ?? view.full, span = max - min;
    const at = chart.at ?? (plot.cursor.left >= 0 ? plot.posToVal(plot.cursor.left, "x") : max);
    const move = { ArrowLeft: at - span / 100, ArrowRight: at + span / 100, Home: min, End: max }[event.key];
    const half = { "+": span / 4, "-": span }[event.key];
    if (half) zoom([at - half, at + half]);
    else if (event.key === "0") zoom(null);
    else if (event.key === "Escape") return hide(chart);
    else if (move === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    const [first, last] = view.range ?? view.full;
    chart.at = Math.min(Math.max(move ?? at, first), last);
    point(chart);
    announce(chart.words);
  }

  if (!charts.length) return api;
  const raw = charts.flatMap(chart => chart.lines).find(line => line.kind === "raw");
  control("[data-smooth]", input => {
    view.width = 2 ** (Number(input.value) + 1) - 1;
    const points = raw?.x ?? [], each = points.length > 1 ? (points.at(-1) - points[0]) / (points.length - 1) : 1;
    input.nextElementSibling.textContent = view.width > 1 ? `${number(Math.round(view.width * each))} steps` : "off";
  }, input => {
    const most = Math.max(0, Math.floor(Math.log2((raw?.x.length ?? 2) / 3)));
    input.max = most;
    input.value = Math.max(Math.min(1, most), most - 3);
  });
  control("[data-log]", input => { view.log = input.checked; });
  control("[data-all]", input => { view.all = input.checked; });
  for (const input of document.querySelectorAll("[data-axis] input")) {
    input.checked = input.value === view.unit;
    input.closest("label").hidden = input.value !== "step" && !axes.every(it => it[input.value]);
    input.addEventListener("change", () => { view.unit = input.value; view.range = null; draw(); });
  }
  document.querySelector("[data-reset]")?.addEventListener("click", () => zoom(null));

  function control(selector, apply, begin = input => { input.checked = false; }) {
    const input = document.querySelector(selector);
    if (!input) return;
    begin(input);
    apply(input);
    input.addEventListener("input", () => { apply(input); draw(); });
  }

  function toggle(button, lines, changed) {
    const shown = button.getAttribute("aria-pressed") === "false";
    button.setAttribute("aria-pressed", shown);
    for (const line of lines) line.shown = shown;
    changed.forEach(build);
  }

  draw();
  const sizes = new ResizeObserver(entries => {
    for (const { target } of entries) {
      const { plot } = charts.find(chart => chart.figure.contains(target));
      const [width, height] = [target.clientWidth, target.clientHeight];
      if (plot.width !== width || plot.height !== height) plot.setSize({ width, height });
    }
  });
  const sight = new IntersectionObserver(entries => {
    for (const { target, isIntersecting } of entries) {
      const chart = charts.find(it => it.figure === target);
      chart.seen = isIntersecting;
      if (isIntersecting) refresh([chart]);
    }
  }, { rootMargin: "200px" });
  document.addEventListener("visibilitychange", () => refresh(charts.filter(chart => chart.seen)));
  for (const button of document.querySelectorAll("[data-run]")) {
    const own = charts.flatMap(chart => chart.lines).filter(line => line.run === Number(button.dataset.run));
    button.addEventListener("click", () => toggle(button, own, charts));
  }
  for (const chart of charts) {
    const place = chart.figure.querySelector(".plot");
    sizes.observe(place);
    sight.observe(chart.figure);
    place.addEventListener("keydown", event => key(chart, event));
    place.addEventListener("blur", () => hide(chart));
    place.addEventListener("mousemove", () => { chart.at = null; }, true); // the pointer takes over
    for (const button of chart.figure.querySelectorAll("[data-line]")) {
      button.addEventListener("click", () => toggle(button, [chart.lines[button.dataset.line]], [chart]));
    }
  }
  return api;
}

// The value of a custom property as a colour; light-dark() is resolved by a real property.
function css(element, name) {
  const probe = document.createElement("span");
  probe.style.color = `var(${name})`;
  element.append(probe);
  const { color } = getComputedStyle(probe);
  probe.remove();
  return color;
}
