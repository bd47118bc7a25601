"""One self-contained HTML page with a slider between any two models' images."""

from pathlib import Path

from jinja2 import Environment, StrictUndefined

from xlsd_cache.pages.thumbnails import data_uri
from xlsd_train.evaluation.images import Picture

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ models | join(" | ") }}</title>
<style>
body { font: 16px/1.4 system-ui, sans-serif; margin: 1rem; background: #222; color: #eee; }
header { position: sticky; top: 0; z-index: 1; background: #222; padding: .5rem 0; }
main { display: flex; flex-wrap: wrap; gap: 1.5rem; }
figure { margin: 0; max-width: 100%; }
.pair { position: relative; line-height: 0; }
.pair img { max-width: 100%; }
.pair img + img { position: absolute; left: 0; top: 0; }
input[type=range] { width: 100%; }
figcaption { max-width: 40rem; overflow-wrap: anywhere; }
small { color: #aaa; }
</style>
</head>
<body>
<header>
<label>left <select id="left" autocomplete="off">
{%- for model in models %}<option>{{ model }}</option>{% endfor %}</select></label>
<label>right <select id="right" autocomplete="off">
{%- for model in models %}<option{{ " selected" if loop.index == 2 }}>{{ model }}</option>
{%- endfor %}</select></label>
</header>
<main>
{%- for picture in pictures %}
<figure>
<div class="pair"><img alt="left"><img alt="right"></div>
<input type="range" min="0" max="100" value="50" autocomplete="off"
 aria-label="share of the left image">
<figcaption>{{ picture.prompt or "(no prompt)" }}<br><small>
{%- if picture.negative %}negative: {{ picture.negative }}; {% endif -%}
seed {{ picture.seed }}, {{ picture.steps }} steps, guidance {{ picture.guidance }}</small>
</figcaption>
</figure>
{%- endfor %}
</main>
<script>
const images = {{ images | tojson }};  // [model][picture]
const figures = [...document.querySelectorAll("figure")];
const left = document.getElementById("left"), right = document.getElementById("right");
function choose() {
  figures.forEach((figure, i) => {
    const [a, b] = figure.querySelectorAll("img");
    a.src = images[left.selectedIndex][i];
    b.src = images[right.selectedIndex][i];
  });
}
figures.forEach(figure => {
  const slider = figure.querySelector("input"), over = figure.querySelectorAll("img")[1];
  const slide = () => { over.style.clipPath = `inset(0 0 0 ${slider.value}%)`; };
  slider.addEventListener("input", slide);
  slide();
});
for (const select of [left, right]) select.addEventListener("change", choose);
choose();
</script>
</body>
</html>
"""


def page(models: list[str], pictures: list[Picture], files: list[list[Path]]) -> str:
    """The HTML; `files` has each model's PNGs in the pictures' order. All text is escaped."""
    environment = Environment(undefined=StrictUndefined, autoescape=True)
    images = [[data_uri(path.read_bytes(), "png") for path in row] for row in files]
    return environment.from_string(PAGE).render(models=models, pictures=pictures, images=images)
