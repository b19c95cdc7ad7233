// The atlas: layers x heads in the colour of a figure or a label, and the list beside it.
const LABELLED = ["observed", "explained", "disagree"];
const matches = (head) => {
  if (state.label && head.observed !== state.label) return false;
  const wanted = state.find.trim().toUpperCase().split(/[\s,;]+/).filter(Boolean);
  return wanted.every((w) => {
    const full = /^L?(\d+)[.H](\d+)$/.exec(w);
    if (full) return head.layer === +full[1] && head.head === +full[2];
    return w === `L${head.layer}` || w === `H${head.head}` || String(head.observed || "").toUpperCase().includes(w);
  });
};
const valueOf = (head) => {
  if (state.colour === "disagree") return head.observed === head.explained ? 0 : 1;
  if (LABELLED.includes(state.colour)) {
    const place = data.labels.indexOf(head[state.colour]);
    return place < 0 ? null : place;
  }
  if (state.colour.startsWith("kept:")) {
    const method = text ? text.methods.indexOf(state.colour.slice(5)) : -1;
    return method < 0 || kvOf(head) < 0 ? null : keptIn(method, budget(), kvOf(head));
  }
  return head[state.colour];
};
const colourScale = () => {
  const n = data.labels.length, bar = { thickness: 14, outlinewidth: 0 };
  if (state.colour === "disagree")
    return { zmin: 0, zmax: 1, colorscale: [[0, COLOURS[6]], [1, RED]], showscale: false };
  if (LABELLED.includes(state.colour)) // the bar over the page names these colours
    return { zmin: -0.5, zmax: n - 0.5, showscale: false, colorscale: data.labels.flatMap((_, i) => [[i / n, COLOURS[i]], [(i + 1) / n, COLOURS[i]]]) };
  return { colorscale: "Cividis", colorbar: bar };
};
const frame = () => {
  const head = chosen();
  return head ? [{ type: "rect", x0: head.head - 0.5, x1: head.head + 0.5, y0: head.layer - 0.5, y1: head.layer + 0.5, line: { color: RED, width: 4 } }] : [];
};
const drawAtlas = () => {
  const analysis = current(), { heads } = analysis;
  if (!heads.length) { $("atlas").textContent = "No heads in this file."; return; }
  const rows = layersOf(analysis), columns = widthOf(analysis), labelled = LABELLED.includes(state.colour);
  const empty = () => Array.from({ length: rows }, () => Array(columns).fill(null));
  const z = empty(), hovertext = empty(), letters = empty();
  for (const head of heads.filter(matches)) {
    const value = valueOf(head);
    z[head.layer][head.head] = value;
    hovertext[head.layer][head.head] = `${name(head)} ${head.observed ?? ""}${labelled ? "" : `: ${number(value)}`}`;
    letters[head.layer][head.head] = LETTERS[head[state.colour === "explained" ? "explained" : "observed"]] || "";
  }
  const trace = { type: "heatmap", z, hovertext, hoverinfo: "text", xgap: 1, ygap: 1, ...colourScale() };
  if (labelled && rows * columns <= 600) Object.assign(trace, { text: letters, texttemplate: "%{text}", textfont: { color: "#000", size: 12 } });
  draw("atlas", $("colour").selectedOptions[0].textContent, [trace], {
    height: Math.min(900, Math.max(300, rows * 19 + 70)), shapes: frame(),
    xaxis: axis("head", { dtick: Math.ceil(columns / 16), showgrid: false, zeroline: false }),
    yaxis: axis("layer", { autorange: "reversed", showgrid: false, zeroline: false }),
  });
};
const MOST = 300; // heads in the list
const drawList = () => {
  const heads = current().heads.map((head, index) => [head, index]).filter(([head]) => matches(head));
  const key = state.sort;
  if (key) heads.sort((a, b) => (b[0][key] ?? -Infinity) - (a[0][key] ?? -Infinity));
  const box = $("list");
  box.replaceChildren(element("p", heads.length === 1 ? "1 head" : `${heads.length} heads`, { class: "hint" }));
  for (const [head, index] of heads.slice(0, MOST)) {
    const button = element("button", undefined, { type: "button", "data-head": index });
    const swatch = element("i", LETTERS[head.observed] || "?", { "aria-hidden": "true" });
    swatch.style.background = LETTERS[head.observed] ? colourOfLabel(head.observed) : "none";
    const figure = key ? ` ${number(head[key])}` : "";
    button.append(swatch, element("b", `${name(head)}${figure}`), ` ${head.observed || ""}: ${head.sentence || ""}`);
    button.addEventListener("click", () => choose(index));
    box.append(button);
  }
  if (heads.length > MOST) box.append(element("p", `and ${heads.length - MOST} more: filter or sort`, { class: "hint" }));
  markList();
};
const markList = () => {
  for (const button of $("list").querySelectorAll("[aria-current]")) button.removeAttribute("aria-current");
  const mine = $("list").querySelector(`[data-head="${state.head}"]`);
  if (mine) mine.setAttribute("aria-current", "true");
};
// By where the mouse is: Plotly's own answer lags behind a quick one
const chooseAt = ({ clientX, clientY }) => {
  const box = $("atlas").querySelector(".nsewdrag").getBoundingClientRect(), analysis = current();
  const column = Math.floor(((clientX - box.left) / box.width) * widthOf(analysis)), row = Math.floor(((clientY - box.top) / box.height) * layersOf(analysis));
  const index = indexAt(analysis, row, column);
  if (index >= 0) choose(index);
};
const choose = (index) => {
  state.head = index;
  Plotly.relayout("atlas", { shapes: frame() });
  markList(); drawCard(); shade();
  const head = chosen();
  if (head) history.replaceState(null, "", `#${name(head).replace(" ", "")}`);
};
const drawMix = () => {
  const box = $("mix"), { heads } = current();
  box.replaceChildren();
  for (const label of data.labels) {
    const count = heads.filter((head) => head.observed === label).length;
    if (!count) continue;
    const part = element("button", `${LETTERS[label]} ${label} ${count}`, { type: "button", title: `show only ${label}` });
    part.style.cssText = `flex:${count} 1 auto; background:${colourOfLabel(label)}`;
    part.addEventListener("click", () => { $("label").value = $("label").value === label ? "" : label; $("label").dispatchEvent(new Event("change")); });
    box.append(part);
  }
};
