// The card of a head: map, lag profile, channels, persistence, all figures.
const MAGMA = ["#000004", "#1d1147", "#51127c", "#832681", "#b73779", "#e75263", "#fc8961", "#fec488", "#fcfdbf"]
  .map((c) => [1, 3, 5].map((i) => parseInt(c.slice(i, i + 2), 16)));
const magma = (share) => {
  const x = Math.min(Math.max(share, 0), 1) * (MAGMA.length - 1), i = Math.min(Math.floor(x), MAGMA.length - 2);
  return MAGMA[i].map((low, c) => low + (x - i) * (MAGMA[i + 1][c] - low));
};
const drawMap = () => {
  $("map-figure").hidden = !text;
  if (!text) return;
  const { size } = text, log = $("log").checked, canvas = $("map");
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d"), image = context.createImageData(size, size), most = Math.log1p(text.stretch);
  for (let i = 0; i < size * size; i++) {
    const stored = text.maps[state.head * size * size + i] / text.levels;
    image.data.set([...magma(log ? stored : Math.expm1(stored * most) / text.stretch), 255], i * 4);
  }
  context.putImageData(image, 0, 0);
  canvas.setAttribute("aria-label", `Attention map of ${name(chosen())}, ${text.tokens.length} queries by keys`);
  $("map-hint").textContent = `${text.tokens.length} tokens of ${text.title}; point at the map to read it`;
};
const readMap = (event) => {
  const box = $("map").getBoundingClientRect(), tokens = text.tokens.length;
  const at = (share) => Math.min(Math.max(Math.floor(share * tokens), 0), tokens - 1);
  const query = at((event.clientY - box.top) / box.height), key = at((event.clientX - box.left) / box.width);
  $("map-hint").textContent = key > query ? "keys that come later are not seen" :
    `query ${query} ${JSON.stringify(text.tokens[query])} → key ${key} ${JSON.stringify(text.tokens[key])}, ${query - key} back`;
};
const drawLags = (analysis, head) => {
  const attention = list(analysis.attention)[state.head], turn = head.measured_period;
  $("lags").parentElement.hidden = !attention;
  if (!attention) return;
  const x = attention.map((_, lag) => lag), shapes = [];
  if (turn >= 2)
    for (let at = turn; at < x.length && shapes.length < 60; at += turn)
      shapes.push({ type: "line", x0: at, x1: at, yref: "paper", y0: 0, y1: 1, line: { color: AMBER, width: 1, dash: "dot" } });
  draw("lags", `By distance${shapes.length ? `; dotted: every ${number(turn)} tokens` : ""}`, [
    { x, y: analysis.logits[state.head], name: "mean logit", line: { color: BLUE } },
    { x, y: attention, name: "mean attention", yaxis: "y2", line: { color: RED } },
  ], { shapes, xaxis: axis("tokens back"), yaxis: axis("logit"), yaxis2: axis("attention", { type: "log", dtick: 1 }) });
};
const drawChannels = (analysis, head) => {
  const energy = list(analysis.energy)[state.head], theta = list(list(analysis.theta)[head.layer]);
  $("channels").parentElement.hidden = !energy;
  if (!energy) return;
  const turn = (m) => (theta[m] ? `channel ${m}: one turn in ${number((2 * Math.PI) / theta[m])} tokens` : `${m}: not rotated`);
  draw("channels", `Energy by RoPE channel; ${number(head.dominant_channel)} dominates${head.period ? `, one turn in ${number(Math.round(head.period))} tokens` : ""}`, [{
    type: "bar", x: energy.map((_, m) => m), y: energy, hovertext: energy.map((_, m) => turn(m)), hoverinfo: "text+y",
    marker: { color: energy.map((_, m) => (m === head.dominant_channel ? RED : BLUE)) },
  }], { xaxis: axis("channel, fast to slow"), yaxis: axis("share of energy") });
};
const CURVES = [["vertical", "same tokens (u, 0)", BLUE, "circle"], ["diagonal", "moving along (u, u)", RED, "square"]];
const drawPersistence = (head) => {
  const measured = text && text.shifts.length, n = measured ? text.shifts.length : 0;
  const curve = (which) => {
    const from = (data.curves.indexOf(which) * text.heads + state.head) * n;
    return Array.from(text.persistence.subarray(from, from + n), (x) => x / 255);
  };
  const traces = CURVES.flatMap(([key, words, color, symbol]) => (measured ? [["", "solid"], ["expected_", "dash"]] : []).map(([prefix, dash]) => ({
    x: text.shifts, y: curve(prefix + key), name: `${words}${prefix ? ", expected" : ""}`, mode: "lines+markers",
    line: { color, dash, width: prefix ? 2 : 3 }, marker: { symbol: symbol + (prefix ? "-open" : ""), color, size: 8 },
  })));
  if (!measured) {
    const names = ["vertical", "diagonal", "seasonal", "predictability"];
    traces.push({ type: "bar", name: "observed", x: names, y: names.map((key) => head[key]), marker: { color: BLUE } },
      { type: "bar", name: "expected", x: names, y: names.map((key) => head[`expected_${key}`] ?? null), marker: { color: AMBER } });
  }
  draw("persistence", measured ? "How much attention persists after u tokens" : "How much attention persists", traces,
    { yaxis: axis("share", { range: [0, 1.02] }), xaxis: measured ? axis("shift u (tokens)", { type: "log", tickvals: text.shifts, ticktext: text.shifts.map(String) }) : {} });
};
const drawFigures = (head) => {
  const rows = Object.entries(data.figures).map(([key, words]) => [words, head[key], key]);
  list(head.tightness).forEach((value, i) => rows.push([`bound ÷ actual, ${data.bounds[data.tightness[i]].replace(/Theorem |shift /g, "")}`, value, `tightness_${data.tightness[i]}`]));
  $("figures").replaceChildren(...rows.map(([words, value, key]) => {
    const row = element("div"), label = element("dt");
    label.append(term(words, data.meanings[key]));
    row.append(label, element("dd", number(value)));
    return row;
  }));
};
// A periodic head may hold most energy in a channel that turns too slowly for its diagonals
const whyAnother = (head) => {
  const { observed, measured_channel: turning, dominant_channel: largest } = head;
  if (observed !== "periodic" || !isNumber(turning) || turning === largest || !(head.period > head.measured_period)) return "";
  return `The period comes from the mean query and key over all channels: channel ${largest} holds most energy, but turns too slowly to show. `;
};
const drawCard = () => {
  const analysis = current(), head = chosen();
  $("card").hidden = !head;
  if (!head) return;
  const otherwise = head.explained && head.explained !== head.observed ? ` (explained as ${head.explained})` : "";
  $("card-title").textContent = `${name(head)}: ${head.observed || "?"}${otherwise}`;
  $("card").style.borderColor = colourOfLabel(head.observed);
  const sentence = head.sentence ? `${head.sentence[0].toUpperCase()}${head.sentence.slice(1)}. ` : "";
  $("card-sentence").replaceChildren(sentence + whyAnother(head), ...(head.q_similarity === null ? [] : explained(`Its queries are self-similar with S = ${number(head.q_similarity)}.`)));
  drawMap(); drawLags(analysis, head); drawChannels(analysis, head); drawPersistence(head); drawFigures(head);
};
