"""What stands around the charts of a page: all of it in the page, nothing is fetched."""

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b2430; --soft: #5b6776;
  --rule: #e3e7ec; --c0: #334155; --c1: #c2570c; --c2: #15803d; --c3: #a21caf; --c4: #2563b8;
  --c5: #b91c1c; --c6: #6d5a1e; --c7: #5b4bc4; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1b212a; --ink: #e6ebf1;
  --soft: #9aa7b6; --rule: #2c3540; --c0: #cfd8e3; --c1: #f59e5b; --c2: #5fd38a; --c3: #e08af0;
  --c4: #6ea8fe; --c5: #f58a8a; --c6: #d8bf6a; --c7: #a79bff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 28px 20px 48px; background: var(--page);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 30px 0 10px; }
header p, figcaption span, dt { color: var(--soft); }
header p { margin: 2px 0 18px; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px;
  margin: 0; }
dl div, figure { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
dl div { padding: 10px 14px; }
dt { font-size: 13px; }
dd { margin: 0; font-size: 20px; font-variant-numeric: tabular-nums; }
.bad { color: var(--c5); }
section { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr));
  gap: 14px; }
figure { margin: 0; padding: 12px 14px 10px; position: relative; min-width: 0; }
figcaption span { display: block; font-size: 13px; }
svg { display: block; width: 100%; height: auto; margin-top: 6px; }
svg text { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
text.y { text-anchor: end; }
text.x { text-anchor: middle; }
line.grid { stroke: var(--rule); }
line.axis { stroke: var(--soft); }
line.cursor { stroke: var(--soft); stroke-dasharray: 3 3; visibility: hidden; }
polyline { fill: none; stroke: var(--color); stroke-width: 1.6; stroke-linejoin: round; }
circle { fill: var(--color); }
polygon.band { fill: var(--color); opacity: 0.16; }
ul { display: flex; flex-wrap: wrap; gap: 2px 16px; list-style: none; margin: 4px 0 0; padding: 0;
  font-size: 13px; }
li::before { content: ""; display: inline-block; width: 14px; height: 3px; margin-right: 6px;
  vertical-align: middle; border-radius: 2px; background: var(--color); }
output { position: absolute; top: 10px; right: 12px; padding: 4px 9px; border-radius: 6px;
  background: var(--page); border: 1px solid var(--rule); font-size: 12px; white-space: pre;
  font-variant-numeric: tabular-nums; pointer-events: none; }
output:empty { display: none; }
.c0 { --color: var(--c0); } .c1 { --color: var(--c1); } .c2 { --color: var(--c2); }
.c3 { --color: var(--c3); } .c4 { --color: var(--c4); } .c5 { --color: var(--c5); }
.c6 { --color: var(--c6); } .c7 { --color: var(--c7); }
"""

# Says the values under the pointer. Without it the page shows all but these.
SCRIPT = """
for (const figure of document.querySelectorAll("figure:has(script)")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const svg = figure.querySelector("svg"), cursor = svg.querySelector(".cursor");
  const output = figure.querySelector("output");
  const [left, right, low, high] = data.x;
  const nearest = (points, step) => points.reduce((best, point) =>
    Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const step = low + (x - left) / (right - left) * (high - low);
    const found = data.lines.map((line) => [line.name, nearest(line.points, step)]);
    const at = nearest(found.map(([, point]) => point), step)[0];
    const place = left + (at - low) / (high - low) * (right - left);
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    cursor.style.visibility = "visible";
    output.textContent = [`step ${at}`, ...found.map(([name, [, value]]) =>
      `${name}: ${Number(value.toPrecision(4))}`)].join("\\n");
  });
  svg.addEventListener("pointerleave", () => {
    cursor.style.visibility = "hidden";
    output.textContent = "";
  });
}
"""


def page(title: str, subtitle: str, body: str) -> str:
    """A whole document.

    Args:
        title: escaped.
        subtitle: escaped.
        body: HTML.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n"
        f"<body><header><h1>{title}</h1><p>{subtitle}</p></header>\n{body}\n"
        f"<script>{SCRIPT}</script></body></html>\n"
    )
