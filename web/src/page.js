// Entry of every page: draws what its data element describes.
import { startCharts } from "./charts.js";
import { startComparison } from "./comparison.js";
import { startGallery } from "./gallery.js";
import { startLive } from "./live.js";
import { startTimeline } from "./timeline.js";

const data = JSON.parse(document.getElementById("data").textContent);
const charts = startCharts(data);
startLive(data, charts, startTimeline(data, charts));
startComparison(data);
startGallery(data);

document.addEventListener("click", async ({ target }) => {
  const button = target.closest("[data-copy]");
  if (!button) return;
  try {
    await navigator.clipboard.writeText(button.dataset.copy);
    button.textContent = "Copied";
  } catch { // a file page may not have the clipboard: select it, to be copied by hand
    getSelection().selectAllChildren(button.parentElement.querySelector("code"));
    button.textContent = "Selected";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
});

// Canvases hold colours: they are drawn again for another colour scheme, and in light for paper.
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.draw());
for (const [name, printing] of [["beforeprint", true], ["afterprint", false]]) {
  addEventListener(name, () => {
    document.documentElement.classList.toggle("printing", printing);
    charts.draw();
  });
}
