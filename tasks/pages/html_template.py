"""The page that charts stand on: Jinja template, style sheet and script. Strings, so that an installation needs no data files."""

STYLE = """
:root { --ink: #222; --soft: #595959; --line: #d9d9d9; --shade: #f5f6f8; --link: #005a8e; --good: #00664a; --bad: #a33f00; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.5 "Liberation Sans", Arial, Helvetica, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 28px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 21px; margin: 44px 0 8px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 17px; margin: 28px 0 4px; }
p, ul { margin: 8px 0; max-width: 75ch; overflow-wrap: anywhere; }
a { color: var(--link); }
.soft, figcaption { color: var(--soft); font-size: 14px; }
figcaption { max-width: 90ch; margin: 0 0 8px; }
figure { margin: 28px 0 0; break-inside: avoid; }
.chart { width: 100%; overflow: hidden; }
.chart svg { max-width: 100%; height: auto; display: block; }
.chart .mark-rect ~ .mark-text { pointer-events: none; }
#vg-tooltip-element { pointer-events: none; font-size: 14px; }
.menu:not(:empty) { font-size: 14px; margin: 0 0 8px; }
.menu select { font: inherit; margin-left: 4px; max-width: 100%; }
.table { overflow-x: auto; max-width: 100%; margin: 12px 0; }
table { border-collapse: collapse; font-size: 15px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid #888; vertical-align: bottom; font-weight: bold; }
tbody th { font-weight: normal; }
.number { text-align: right; white-space: nowrap; }
tr.strong th, tr.strong td { font-weight: bold; background: var(--shade); }
pre { background: var(--shade); border: 1px solid var(--line); border-radius: 4px; padding: 12px 14px; font: 13px/1.45 "Liberation Mono", Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; margin: 8px 0; }
code { font: 0.9em "Liberation Mono", Consolas, monospace; overflow-wrap: anywhere; }
details { margin: 12px 0; }
summary { cursor: pointer; color: var(--link); }
button { font: inherit; font-size: 14px; padding: 3px 12px; border: 1px solid #888; border-radius: 4px; background: #fff; cursor: pointer; }
nav { font-size: 15px; margin: 12px 0; }
nav a { margin-right: 18px; white-space: nowrap; display: inline-block; }
.verdict { border-left: 5px solid var(--soft); background: var(--shade); padding: 10px 16px; margin: 14px 0; font-size: 17px; }
.verdict.good { border-color: var(--good); }
.verdict.bad { border-color: var(--bad); }
.bad-text { color: var(--bad); font-weight: bold; }
.good-text { color: var(--good); }
.filters { max-width: none; }
.filters label { margin-right: 18px; white-space: nowrap; display: inline-block; }
.filters select { font: inherit; max-width: 60vw; }
.document { border-top: 1px solid var(--line); padding: 10px 0; }
.document[hidden] { display: none; }
.document pre { max-height: 16em; overflow-y: auto; }
.document dd code { white-space: pre-wrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 12px 0; font-size: 15px; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  main { padding: 16px 14px 48px; }
  h1 { font-size: 23px; }
  table { font-size: 14px; }
  th, td { padding: 5px 8px; }
  thead th { white-space: nowrap; }
  .table th:first-child { position: sticky; left: 0; background: #fff; }
  .table tr.strong th:first-child { background: var(--shade); }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 6px; }
}
@media print {
  main { max-width: none; padding: 0; }
  nav, button, .menu { display: none; }
  body { font-size: 12px; }
  .table { overflow: visible; }
  table { font-size: 11px; }
  th, td { padding: 3px 6px; }
  h2, h3, figcaption { break-after: avoid; }
  a { color: inherit; text-decoration: none; }
}
""".strip()

# Where the page is too narrow, panels side by side give way to fewer in a row, then their axes become shorter, then legends take two
# columns: letters keep their size. Only what is still too wide is scaled down by the style sheet. "ast": Vega interprets its
# expressions, so that the page needs no right to make code at run time.
SCRIPT = """
"use strict";
const options = {renderer: "svg", actions: false, ast: true, mode: "vega-lite"}, least = 140;
const within = (part) => [part.spec, part.layer, part.concat, part.hconcat, part.vconcat].flat().filter(Boolean);
const widest = (part) => Math.max(part.width > 0 ? part.width : 0, ...within(part).map(widest));
// No panel wider than that, and one a row; what stands at a pixel of its panel moves with it.
function narrower(part, most, share = 1) {
  const made = {...part};
  if (made.width > most) { share = most / made.width; made.width = most; }
  if (made.columns) made.columns = 1;
  for (const name of ["x", "x2"]) {
    const at = made.encoding?.[name];
    if (typeof at?.value === "number") made.encoding = {...made.encoding, [name]: {...at, value: share * at.value}};
  }
  for (const name of ["layer", "concat", "hconcat", "vconcat"]) made[name] &&= made[name].map((one) => narrower(one, most, share));
  made.spec &&= narrower(made.spec, most, share);
  return made;
}
async function draw(place) {
  let spec = JSON.parse(document.getElementById(place.dataset.spec).textContent), shortened = false, stacked = false;
  const menu = document.getElementById(place.dataset.menu);
  for (;;) {
    menu.replaceChildren();
    const made = await vegaEmbed(place, spec, {...options, bind: menu});
    const tooWide = place.querySelector("svg").viewBox.baseVal.width - place.clientWidth;
    if (tooWide <= 0 || stacked) return;
    if (spec.columns > 1) {  // panels that come in pairs stay beside each other
      spec = {...spec, columns: spec.columns - (spec.columns > 2 && spec.columns % 2 === 0 ? 2 : 1)};
    } else if (!shortened) {
      spec = narrower(spec, Math.max(least, Math.floor(widest(spec) - tooWide)));
      shortened = true;
    } else {
      spec = {...spec, config: {...spec.config, legend: {...spec.config.legend, columns: 2}}};
      stacked = true;
    }
    made.finalize();
  }
}
// From top to bottom with a pause after each, so that a reader can begin at once.
async function drawAll() {
  for (const place of document.querySelectorAll(".chart")) {
    await draw(place);
    await new Promise((go) => setTimeout(go));
  }
  document.documentElement.dataset.drawn = "yes";
}
let width = document.documentElement.clientWidth, drawn = drawAll(), waiting;
function drawAgain() {
  if (document.documentElement.clientWidth === width) return;
  width = document.documentElement.clientWidth;
  drawn = drawn.then(drawAll);
}
addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(drawAgain, 250); });
const filters = document.querySelectorAll("select[data-filter]");
function filter() {
  let count = 0;
  for (const one of document.querySelectorAll(".document")) {
    one.hidden = [...filters].some((by) => by.value && one.dataset[by.dataset.filter] !== by.value);
    count += !one.hidden;
  }
  document.querySelector("[data-count]").textContent = count;
}
for (const by of filters) by.addEventListener("change", filter);
if (filters.length) filter();
for (const button of document.querySelectorAll("button[data-copy]")) {
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy);
    getSelection().selectAllChildren(source);
    try { await navigator.clipboard.writeText(source.textContent); } catch { document.execCommand("copy"); }
    button.textContent = "Copied";
  });
}
""".strip()

PAGE = """
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
{{ style }}
</style>
</head>
<body>
<main>
{% if header %}{{ header }}{% else %}<h1>{{ title }}</h1>{% endif %}
{% if sections | length > 1 %}
<nav>{% for section in sections %}<a href="#part-{{ loop.index }}">{{ section.title }}</a> {% endfor %}</nav>
{% endif %}
{% for section in sections %}
<section>
<h2 id="part-{{ loop.index }}">{{ section.title }}</h2>
{% for block in section.blocks %}
{{ block }}
{% endfor %}
</section>
{% endfor %}
</main>
{% for spec in specs %}
<script type="application/json" id="spec-{{ loop.index }}">{{ spec }}</script>
{% endfor %}
{% for script in scripts %}
<script>{{ script }}</script>
{% endfor %}
</body>
</html>
""".lstrip()

FIGURE = """
<figure>
<h3>{{ title }}</h3>
<figcaption>{{ caption }}</figcaption>
<div class="menu" id="menu-{{ number }}"></div>
<div class="chart" data-menu="menu-{{ number }}" data-spec="spec-{{ number }}" role="img" aria-label="{{ title }}"></div>
</figure>
""".strip()

TABLE = """
<div class="table">
<table>
<thead><tr>{% for name in header %}<th scope="col"{% if loop.index0 in numbers %} class="number"{% endif %}>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr{% if loop.index0 in strong %} class="strong"{% endif %}>
{%- for cell in row %}
{%- if loop.first %}<th scope="row">{{ cell }}</th>
{%- else %}<td{% if loop.index0 in numbers %} class="number"{% endif %}>{{ cell }}</td>{% endif %}
{%- endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
""".strip()
