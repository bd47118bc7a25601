// Steps in other units, and numbers in words.

export const announce = text => { document.getElementById("live").textContent = text; };

// Position of the value nearest to x in an ascending list.
export function nearest(list, x) {
  let low = 0, high = list.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (list[middle] < x) low = middle + 1; else high = middle;
  }
  return low && x - list[low - 1] < list[low] - x ? low - 1 : low;
}

// A run's steps -> images, epochs or hours, linear between the knots that the page has.
export function convert(axes, unit, step) {
  const from = axes.step, to = axes[unit];
  if (unit === "step" || !to) return step;
  const i = Math.min(Math.max(1, from.findIndex(x => x >= step)), from.length - 1) || 1;
  const end = step > from.at(-1) ? from.length - 1 : i;
  const span = from[end] - from[end - 1] || 1;
  return to[end - 1] + (to[end] - to[end - 1]) * (step - from[end - 1]) / span;
}

export function number(x) {
  if (x == null) return "unknown";
  const size = Math.abs(x);
  if (size && (size < 1e-3 || size >= 1e12)) return x.toExponential(2).replace(/\.?0*e/, "e").replace("e+", "e");
  return x.toLocaleString("en", { maximumSignificantDigits: size >= 1e4 ? 12 : 4 });
}

export function duration(hours) {
  const seconds = Math.round(hours * 3600);
  const [size, unit] = seconds < 120 ? [1, "s"] : seconds < 7200 ? [60, "min"] : hours < 96 ? [3600, "h"] : [86400, "days"];
  return `${(seconds / size).toLocaleString("en", { maximumFractionDigits: size > 1 ? 1 : 0 })} ${unit}`;
}

export function tick(unit, x) {
  if (unit === "hours") return duration(x);
  return x < 1e5 ? number(x) : x.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 4 });
}

// What a step is, in all units.
export function stepWords(axes, step) {
  const parts = [`step ${number(Math.round(step))}`];
  if (axes.images_seen) parts.push(`${number(Math.round(convert(axes, "images_seen", step)))} images`);
  if (axes.epoch) parts.push(`epoch ${number(convert(axes, "epoch", step))}`);
  if (axes.hours) parts.push(duration(convert(axes, "hours", step)));
  return parts.join(" · ");
}
