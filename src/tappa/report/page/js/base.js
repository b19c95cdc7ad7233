// Helpers: elements, numbers, plots. All text from files reaches the page as text, never as HTML.
const $ = (id) => document.getElementById(id);
const list = (value) => (Array.isArray(value) ? value : []);
const element = (name, text, attributes = {}) => {
  const found = document.createElement(name);
  if (text !== undefined) found.textContent = text;
  for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
  return found;
};
const option = (select, value, text) => select.append(element("option", text, { value }));
const bytesOf = (text) => {
  const packed = atob(text), bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  return bytes;
};
const unpack = async (text) => {
  const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
};
const number = (x) => {
  if (x === null || x === undefined) return "–";
  if (typeof x !== "number") return String(x);
  if (Number.isInteger(x)) return x.toLocaleString("en");
  return Math.abs(x) >= 1e5 || Math.abs(x) < 1e-3 ? x.toExponential(2) : String(+x.toPrecision(3));
};
const isNumber = (x) => typeof x === "number";
const percent = (x) => `${Math.round(100 * x)}%`;
const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);

// Okabe and Ito's colours, told apart by all eyes, and symbols for those who see none
const COLOURS = ["#0072b2", "#009e73", "#cc79a7", "#e69f00", "#999999", "#d55e00", "#56b4e9", "#b8a800"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "x", "star", "cross", "hourglass"];
// Black or white, whichever is easier to read on a colour (relative luminance of WCAG)
const inkOn = (colour) => {
  const [r, g, b] = [1, 3, 5].map((i) => (parseInt(colour.slice(i, i + 2), 16) / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b < 0.18 ? "#fff" : "#000";
};
const BLUE = COLOURS[0], GREEN = COLOURS[1], AMBER = COLOURS[3], GREY = COLOURS[4], RED = COLOURS[5];
// Methods have the colour of their place here in every plot, so that tappa is red everywhere
const METHODS = ["streaming_llm", "h2o", "snapkv", "pyramidkv", "cake", "tappa", "tappa_paper", "expected_attention"];
const methodSeries = (i, name) => series(METHODS.includes(name) ? METHODS.indexOf(name) : 8 + i, name);
const series = (i, name) => ({
  name,
  mode: "lines+markers",
  line: { color: COLOURS[i % 8], width: name === "tappa" ? 4 : 2, dash: i < 8 ? "solid" : "dot" },
  marker: { symbol: SYMBOLS[i % 8], size: name === "tappa" ? 9 : 7, color: COLOURS[i % 8] },
});

// Plotly makes something of tags in labels, so they are escaped, wherever they stand
const safe = (x) => {
  if (typeof x === "string") return x.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  if (Array.isArray(x)) return x.map(safe);
  if (x && x.constructor === Object) return Object.fromEntries(Object.entries(x).map(([k, v]) => [k, safe(v)]));
  return x;
};
const axis = (text, more = {}) => ({ title: { text, standoff: 8 }, ...more });
const layout = (more) => {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink").trim(), line = style.getPropertyValue("--grid").trim();
  const found = {
    height: 320, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: 14, family: "system-ui, sans-serif" },
    margin: { l: 45, r: 12, t: 12, b: 45 }, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 14 } },
    hoverlabel: { font: { size: 15 } }, dragmode: false, ...more,
  };
  for (const key of ["xaxis", "yaxis", ...(more.yaxis2 ? ["yaxis2"] : [])])
    found[key] = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true, fixedrange: true, exponentformat: "power", ...(key === "yaxis2" ? { overlaying: "y", side: "right", showgrid: false, tickmode: "auto", nticks: 5 } : {}), ...(more[key] || {}) };
  return found;
};
const draw = (id, caption, traces, more = {}) => {
  const place = $(id), words = place.parentElement.querySelector("figcaption");
  if (caption && words) words.replaceChildren(...explained(caption));
  if (words && !place.parentElement.querySelector(".save")) words.after(savers(place));
  return Plotly.react(place, safe(traces), safe(layout(more)), { responsive: true, displayModeBar: false });
};
const onClick = (id, act) => { // once for each plot
  if ($(id).dataset.clicks) return;
  $(id).dataset.clicks = "1";
  $(id).on("plotly_click", ({ points, event }) => act(points[0], event));
};
let plots = 0;
const addPlot = (box, caption, traces, more, wide = false) => {
  const figure = element("figure", undefined, wide ? { class: "wide" } : {}), id = `plot-${plots++}`;
  figure.append(element("figcaption"), element("div", undefined, { id, class: "plot" }));
  box.append(figure);
  draw(id, caption, traces, more);
  return id;
};
const tableOf = (columns, rows, caption) => {
  const box = element("div", undefined, { class: "scroll", tabindex: 0, role: "region", "aria-label": caption || "Table" });
  const table = element("table"), head = element("tr");
  if (caption) table.append(element("caption", caption));
  for (const words of columns) {
    const cell = element("th", undefined, { scope: "col" });
    cell.append(...explained(words));
    head.append(cell);
  }
  table.append(head);
  for (const cells of rows) {
    const row = element("tr");
    row.append(...cells.map((cell) => element("td", number(cell), typeof cell === "number" ? { class: "n" } : {})));
    table.append(row);
  }
  box.append(table);
  return box;
};
const folded = (summary, ...children) => {
  const box = element("details");
  box.append(element("summary", summary), ...children);
  return box;
};
const note = (text) => {
  $("notes").hidden = false;
  $("notes").querySelector("ul").append(element("li", text));
  const count = $("notes").querySelectorAll("li").length;
  $("notes").querySelector("summary").textContent = `${count} ${count === 1 ? "note" : "notes"} on what is missing`;
};
// A file may hold anything: what cannot be drawn is said, and the rest of the page goes on
const guarded = (what, show) => {
  try { return show(); } catch (error) { note(`${what} cannot be shown: ${error.message}`); $("notes").open = true; return undefined; }
};
