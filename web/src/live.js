// Follows runs that go on. New steps become points of the charts at once; for new samples, losses or
// checkpoints, and when there are many points, the page is fetched again and its parts are exchanged.
import { duration, number } from "./units.js";

const MOST = 4000; // points of a line, before the server is asked for fewer
const DRAWN_MS = 1000, APART_MS = 2000, QUIET_MS = 120_000;
const now = () => performance.now(); // a clock may be set

export function startLive(data, charts, timeline) {
  if (!data.live) return;
  const place = document.querySelector("[data-live]");
  let runs = data.live.runs, renewing = false, asked = false, waiting = [], drawn = 0, refused = "";
  const silent = runs.map(() => true), heard = runs.map(it => now() - 1000 * it.quiet_s);
  const source = new EventSource(`events?from=${data.live.from}`);

  source.addEventListener("steps", event => {
    const { run, columns } = JSON.parse(event.data);
    heard[run] = now();
    if (renewing) waiting.push([run, columns]); // the page to come may not have them
    grow(run, columns);
    drawn ||= setTimeout(() => { drawn = 0; charts.redraw(); say(); }, DRAWN_MS);
  });
  for (const name of ["changed", "reset"]) source.addEventListener(name, renew);
  source.addEventListener("open", say);
  source.addEventListener("error", () => {
    if (source.readyState === EventSource.CLOSED) renew(); // another server, with other runs
    say();
  });

  // Which metric a line shows.
  const metric = (chart, line) =>
    chart.id === "loss" ? { raw: "loss" }[line.kind]
    : chart.id === "lr" ? { line: "lr_effective", dashed: "lr" }[line.kind]
    : chart.id;

  function grow(run, columns) {
    runs[run].step = columns.step.at(-1);
    let shown = false, most = 0;
    for (const chart of charts.charts) {
      for (const line of chart.lines) {
        const values = columns[metric(chart, line)];
        if (line.run !== run || !values) continue;
        shown ||= line.kind === "raw";
        columns.step.forEach((step, i) => {
          if (values[i] == null || step <= (line.x.at(-1) ?? -1) || line.x.length >= 2 * MOST) return;
          line.x.push(step);
          line.y.push(values[i]);
          if (line.low.length) { line.low.push(values[i]); line.high.push(values[i]); }
        });
        most = Math.max(most, line.x.length);
      }
    }
    if (!shown || columns.loss?.includes(null) || most > MOST || runs[run].gone || silent[run]) renew(); // null: not finite
  }

  async function renew() {
    asked = true;
    if (renewing) return;
    renewing = true;
    while (asked) {
      asked = false;
      try {
        const answer = await fetch("./", { cache: "no-store" });
        refused = answer.ok ? "" : await answer.text(); // e.g. while a run is being deleted
        if (answer.ok) exchange(new DOMParser().parseFromString(await answer.text(), "text/html"));
        else asked = true;
      } catch { asked = true; } // the server is away: its events come back first
      say();
      await new Promise(done => setTimeout(done, APART_MS));
    }
    renewing = false;
    waiting = [];
  }

  const form = (page, root) => JSON.stringify([
    page.charts.map(chart => [chart.id, chart.lines.map(line => [line.run, line.label, line.kind])]),
    ["samples", "validations"].map(id => !root.getElementById(id)),
  ]);

  function exchange(page) {
    const fresh = JSON.parse(page.getElementById("data").textContent);
    const closed = source.readyState === EventSource.CLOSED;
    if (closed || form(fresh, page) !== form({ charts: charts.charts }, document)) return location.reload();
    fresh.charts.forEach((chart, k) => {
      charts.charts[k].note = chart.note;
      chart.lines.forEach((line, i) => Object.assign(charts.charts[k].lines[i], line));
    });
    charts.axes.splice(0, Infinity, ...fresh.axes);
    runs = fresh.live.runs;
    runs.forEach((it, run) => { heard[run] = now() - 1000 * it.quiet_s; });
    for (const [run, columns] of waiting) grow(run, columns);
    waiting = [];
    charts.redraw();
    timeline?.renew(fresh.samples, page.querySelectorAll("[data-sheet]"));
    for (const id of ["now", "differences", "bands", "validations"]) {
      const old = document.getElementById(id), it = page.getElementById(id);
      if (old && it) old.replaceChildren(...it.childNodes);
      else if (it) document.getElementById("settings-section").before(it); // the first changes by noise
    }
    say();
  }

  function say() {
    const parts = runs.map(({ step, last, pace, gone, diverged }, run) => {
      const name = runs.length > 1 ? `${data.runs[run]}: ` : "";
      if (gone) return `${name}deleted`;
      if (diverged != null) return `${name}diverged at step ${number(diverged)}`;
      if (last && step >= last) return `${name}finished`;
      const at = `${name}step ${number(step)}${last ? ` of ${number(last)}` : ""}`;
      const quiet = now() - heard[run], was = silent[run];
      silent[run] = quiet > Math.max(QUIET_MS, 20_000 * (pace ?? 0)); // is_going in pace.py has this rule
      if (silent[run] && !was) renew(); // the page proposes to resume it
      if (silent[run]) return `${at}, no step for ${duration(quiet / 3.6e6)}`;
      if (!last || !pace) return at;
      const left = (last - step) * pace, end = new Date(Date.now() + 1000 * left);
      const when = end.toLocaleString([], { ...(left > 43_200 && { weekday: "short", day: "numeric", month: "short" }), hour: "2-digit", minute: "2-digit" });
      return `${at}, about ${duration(left / 3600)} left, until ${when}`;
    });
    const lost = source.readyState === EventSource.OPEN ? [] : ["no connection to xlsd-train live"];
    place.classList.toggle("lost", lost.length > 0 || refused !== "");
    place.textContent = ["Live", ...lost, refused, ...parts].filter(Boolean).join(" · ");
  }

  say();
  setInterval(say, 5000);
}
