// The atlas: layers x heads in the colour of a figure or a label, and the list beside it.
const LABELLED = ["observed", "explained", "disagree"];
const matches = (head) => {
  if (state.label && head.observed !== state.label) return false;
  const wanted = state.find.trim().toUpperCase(), place = /^L?(\d+)[\s,;.]*H?(\d*)$/.exec(wanted);
  if (place) return head.layer === +place[1] && (!place[2] || head.head === +place[2]);
  return wanted.split(/[\s,;]+/).filter(Boolean).every((w) => {
    if (w === "L" || w === "H") return true; // the number is not typed yet
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
  // of all heads, also of those that a filter hides: a colour stands for the same value
  const range = current().heads.map(valueOf).filter(Number.isFinite).reduce(([low, high], x) => [Math.min(low, x), Math.max(high, x)], [Infinity, -Infinity]);
  return { ...(range[0] < range[1] ? { zmin: range[0], zmax: range[1] } : {}), colorscale: "Cividis", colorbar: bar };
};
const frame = () => {
  const head = chosen();
  return head ? [{ type: "rect", x0: head.head - 0.5, x1: head.head + 0.5, y0: head.layer - 0.5, y1: head.layer + 0.5, line: { color: RED, width: 4 } }] : [];
};
const atlasCaption = (count) =>
  $("colour").selectedOptions[0].textContent + (state.colour.startsWith("kept:") ? `, at a budget of ${number(text.budgets[budget()])} tokens a head` : "") + (count ? "" : ": no head matches");
// Letters of one trace have one colour: cells with black ones and cells with white ones
const lettered = (trace, letters) => {
  const inks = (value) => inkOn(state.colour === "disagree" ? [COLOURS[6], RED][value] : COLOURS[value]);
  return ["#000", "#fff"].map((color) => {
    const only = (cells, none) => cells.map((row, i) => row.map((cell, j) => (trace.z[i][j] !== null && inks(trace.z[i][j]) === color ? cell : none)));
    return { ...trace, z: only(trace.z, null), text: only(letters, ""), texttemplate: "%{text}", textfont: { color, size: 12 } };
  });
};
const drawAtlas = () => {
  const analysis = current(), { heads } = analysis;
  if (!heads.length) { $("atlas").textContent = "No heads in this file."; return; }
  const rows = layersOf(analysis), columns = widthOf(analysis), labelled = LABELLED.includes(state.colour);
  const grid = (value) => Array.from({ length: rows }, () => Array(columns).fill(value));
  const z = grid(null), hovertext = grid(""), letters = grid(""), shown = heads.filter(matches);
  for (const head of shown) {
    z[head.layer][head.head] = valueOf(head);
    hovertext[head.layer][head.head] = `${name(head)} ${head.observed ?? ""}${labelled ? "" : `: ${number(z[head.layer][head.head])}`}`;
    letters[head.layer][head.head] = LETTERS[head[state.colour === "explained" ? "explained" : "observed"]] || "";
  }
  const trace = { type: "heatmap", z, hovertext, hoverinfo: "text", hoverongaps: false, xgap: 1, ygap: 1, ...colourScale() };
  draw("atlas", atlasCaption(shown.length), labelled && rows * columns <= 600 ? lettered(trace, letters) : [trace], {
    height: Math.min(900, Math.max(300, rows * 19 + 70)), shapes: frame(),
    xaxis: axis("head", { dtick: Math.ceil(columns / 16), range: [-0.5, columns - 0.5], showgrid: false, zeroline: false }),
    yaxis: axis("layer", { range: [rows - 0.5, -0.5], showgrid: false, zeroline: false }),
  });
};
const painted = (label) => `background:${colourOfLabel(label)}; color:${inkOn(colourOfLabel(label))}`;
const short = (words) => words.replace(/^dominant channel's /, "").replace(/ \([a-z][^)]*\)$/i, ""); // of a figure, without its unit
const MOST = 300; // heads in the list
const drawList = () => {
  const heads = current().heads.map((head, index) => [head, index]).filter(([head]) => matches(head));
  const key = state.sort;
  const last = state.ascending ? Infinity : -Infinity, sign = state.ascending ? 1 : -1; // where there is no figure
  if (key) heads.sort((a, b) => sign * ((a[0][key] ?? last) - (b[0][key] ?? last) || 0));
  const box = $("list");
  box.replaceChildren(element("p", ({ 0: "no head", 1: "1 head" })[heads.length] || `${heads.length} heads`, { class: "hint" }));
  for (const [head, index] of heads.slice(0, MOST)) {
    const button = element("button", undefined, { type: "button", "data-head": index, tabindex: -1 });
    const swatch = element("i", LETTERS[head.observed] || "?", { "aria-hidden": "true" });
    if (LETTERS[head.observed]) swatch.style.cssText = painted(head.observed);
    const figure = key ? ` ${short(data.figures[key])} ${number(head[key])}` : "";
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
  reach(mine || $("list").querySelector("button"));
};
// One button of the list is a stop of the Tab key; arrows move on from there
const reach = (button) => {
  for (const old of $("list").querySelectorAll("[tabindex='0']")) old.tabIndex = -1;
  if (button) button.tabIndex = 0;
};
const moveInList = (event) => {
  const buttons = [...$("list").querySelectorAll("button")], at = buttons.indexOf(event.target);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
  if (at < 0 || !buttons[to]) return;
  event.preventDefault();
  reach(buttons[to]);
  buttons[to].focus();
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
  const bar = element("div", undefined, { class: "bar", "aria-hidden": "true" });
  box.replaceChildren(bar);
  for (const label of data.labels) {
    const count = heads.filter((head) => head.observed === label).length;
    if (!count) continue;
    const part = element("button", `${LETTERS[label]} ${label} ${count}`, { type: "button", title: `show only ${label}` });
    part.style.cssText = painted(label);
    const share = element("span");
    share.style.cssText = `flex:${count} 1 0; background:${colourOfLabel(label)}`;
    bar.append(share);
    part.addEventListener("click", () => { $("label").value = $("label").value === label ? "" : label; $("label").dispatchEvent(new Event("change")); });
    box.append(part);
  }
};
