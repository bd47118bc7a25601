// The mean of a window of points, centred, so that the curve does not lag; shorter at both ends.
export function smoothed(values, width) {
  const sums = [0], counts = [0], half = (width - 1) / 2;
  values.forEach((value, i) => {
    sums.push(sums[i] + (value ?? 0));
    counts.push(counts[i] + (value == null ? 0 : 1));
  });
  return values.map((_, i) => {
    const reach = Math.min(half, i, values.length - 1 - i);
    const count = counts[i + reach + 1] - counts[i - reach];
    return count ? (sums[i + reach + 1] - sums[i - reach]) / count : null;
  });
}
