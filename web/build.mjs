// Bundles src into the files that the Python packages ship; see `make web`.
import { readFileSync } from "node:fs";
import { build } from "esbuild";

const licence = readFileSync("node_modules/uplot/LICENSE", "utf8").trim();
const { version } = JSON.parse(readFileSync("node_modules/uplot/package.json", "utf8"));
const banner = `/*! Generated from web/src by \`make web\`; do not edit.
Contains uPlot ${version}, https://github.com/leeoniya/uPlot:

${licence} */`;
await build({
  entryPoints: ["src/page.js", "src/page.css"],
  outdir: "../xlsd_cache/pages/built",
  bundle: true,
  minify: true,
  charset: "utf8",
  target: ["chrome123", "firefox120", "safari17.5"], // the first that know light-dark()
  banner: { js: banner, css: banner },
});
