// What tappa eval, generate and prune left: quality against budget and memory, speed, before and after.
const ACROSS = {
  budget: ["tokens kept per layer and KV head", (row) => row.budget],
  nbytes: ["MB of keys and values held", (row) => row.nbytes / 1e6],
  tokens_held: ["tokens held per layer and KV head, measured", (row) => row.tokens_held],
};
const drawQuality = (id, table, across) => {
  const [words, of] = ACROSS[across], rows = list(table.rows).filter((row) => isNumber(row.mean)), small = rows.filter((row) => isNumber(row.budget) && isNumber(of(row)));
  const full = rows.find((row) => row.budget === null), ticks = [...new Set(small.map((row) => row.budget))];
  const dashed = full && across === "budget" && !table.lower_is_better; // its KL to itself is 0
  const traces = [...new Set(small.map((row) => row.method))].map((method, i) => {
    const mine = small.filter((row) => row.method === method).sort((a, b) => of(a) - of(b));
    return { x: mine.map(of), y: mine.map((row) => row.mean), ...methodSeries(i, method),
      error_y: { type: "data", array: mine.map((row) => 1.96 * (row.error ?? 0)), thickness: 1.2, width: 3 } };
  });
  if (full && across !== "budget" && isNumber(of(full)))
    traces.push({ x: [of(full)], y: [full.mean], name: "full", mode: "markers", marker: { color: GREY, symbol: "star", size: 14 } });
  draw(id, `${table.name}: ${table.metric}${table.lower_is_better ? " (less is better)" : ""}, n = ${number(rows[0] && rows[0].n)}, 95% intervals${dashed ? "; dashed: the full cache" : ""}`, traces, {
    height: 420, yaxis: axis(table.metric), xaxis: axis(words, { type: "log", ...(across === "budget" ? { tickvals: ticks, ticktext: ticks.map(String) } : {}) }),
    shapes: dashed ? [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: full.mean, y1: full.mean, line: { dash: "dash", color: GREY } }] : [],
  });
};
const BARS = { // figure of a cell -> what it is, and how it is shown
  nbytes: ["MB of keys and values held", (row) => row.nbytes / 1e6],
  compress_seconds: ["Seconds to choose and gather what stays, of one prompt", (row) => row.compress_seconds],
};
const drawCells = (box, table, key) => {
  const [words, of] = BARS[key], rows = list(table.rows).filter((row) => isNumber(row[key]));
  if (!rows.length) return;
  const sizes = [...new Set(rows.map((row) => row.budget))].sort((a, b) => (a ?? Infinity) - (b ?? Infinity)), methods = [...new Set(rows.map((row) => row.method))];
  addPlot(box, `${words}: ${table.name}`, sizes.map((size, i) => ({
    type: "bar", name: size === null ? "full" : `budget ${size}`, x: methods, marker: { color: size === null ? GREY : COLOURS[i % 8] },
    y: methods.map((method) => { const row = rows.find((r) => r.method === method && r.budget === size); return row ? of(row) : null; }),
  })), { yaxis: axis(key === "nbytes" ? "MB" : "seconds", { rangemode: "tozero" }) });
};
const showEvaluation = (box, from, content) => {
  const tables = list(content.tables);
  if (!tables.length) return;
  const controls = element("div", undefined, { class: "controls" }), cards = element("div", undefined, { class: "cards" });
  const pick = element("select"), across = element("select"), labels = [element("label", "Table "), element("label", "Against ")];
  labels[0].append(pick); labels[1].append(across); controls.append(...labels);
  tables.forEach((table, i) => option(pick, i, table.name));
  for (const [key, [words]] of Object.entries(ACROSS)) option(across, key, words);
  pick.value = String(tables.length - 1);
  box.append(element("h3", from), controls, cards);
  const id = addPlot(cards, "", [], {}, true), more = element("div", undefined, { class: "cards wide" });
  cards.append(more);
  const show = () => guarded(from, () => {
    drawQuality(id, tables[+pick.value], across.value);
    more.replaceChildren();
    for (const key of Object.keys(BARS)) drawCells(more, tables[+pick.value], key);
  });
  for (const select of [pick, across]) select.addEventListener("change", show);
  show();
};
const showWriting = (box, runs) => { // generation.json: what tappa generate --json printed
  if (!runs.length) return;
  const names = runs.map(({ content }) => `${content.method}${isNumber(content.budget) ? ` at ${content.budget}` : ""}`);
  const cards = element("div", undefined, { class: "cards" });
  box.append(element("h3", "Speed and memory of writing"), cards);
  const bars = (caption, unit, of) => addPlot(cards, caption, [{ type: "bar", orientation: "h", y: names, x: runs.map(({ content }) => of(content)), marker: { color: BLUE } }],
    { height: 110 + 36 * runs.length, xaxis: axis(unit, { rangemode: "tozero" }), yaxis: { autorange: "reversed" } });
  bars("Tokens written a second, one run each", "tokens per second", (x) => (x.new_tokens - 1) / x.decode_seconds);
  bars("Seconds to the first new token", "seconds", (x) => x.prefill_seconds);
  bars("Keys and values held at the end", "MB", (x) => x.nbytes / 1e6);
};
const showPruning = (box, from, { before, after }) => {
  if (!before || !after) return;
  const rows = ["parameters", "nbytes", "tokens_per_second", "perplexity"].map((key) => [key.replaceAll("_", " "), before[key], after[key], isNumber(after[key]) && before[key] ? after[key] / before[key] : null]);
  box.append(element("h3", from), tableOf(["", "before", "after", "after ÷ before"], rows, "Pruning"));
};
const drawResults = () => {
  const box = $("results"), each = (file, show) => list(data.results[file]).forEach(({ name: from, content }) => guarded(from, () => show(box, from, content)));
  $("results-part").hidden = false; // a hidden plot does not know its width
  box.replaceChildren();
  each("results.json", showEvaluation);
  guarded("generation.json", () => showWriting(box, list(data.results["generation.json"])));
  each("pruning.json", showPruning);
  $("results-part").hidden = $("results-link").hidden = !box.childElementCount;
};
