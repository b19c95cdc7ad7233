// Several analyses: models, texts, before and after pruning. Heads are matched by layer and number;
// layers that pruning removed are left out of the count (`origin`).
const titleOf = (analysis) => `${analysis.title} (${analysis.file})`;
const pairs = (a, b) => { // heads that exist in both, as [place in the first model, head, head]
  const place = (analysis, head) => (analysis.origin ? `${analysis.origin[head.layer]}.${head.head}` : "");
  const known = new Map(a.heads.map((head) => [place(a, head), head]));
  return b.heads.map((head) => [known.get(place(b, head)), head]).filter(([one]) => one && a.origin && b.origin);
};
const ranks = (values) => {
  const order = values.map((_, i) => i).sort((i, j) => values[i] - values[j]), found = Array(values.length);
  for (let i = 0, j; i < order.length; i = j) { // ties share their mean rank
    for (j = i; j < order.length && values[order[j]] === values[order[i]];) j++;
    for (let k = i; k < j; k++) found[order[k]] = (i + j - 1) / 2;
  }
  return found;
};
const correlation = (x, y) => {
  const mx = mean(x), my = mean(y), sum = (f) => x.reduce((total, _, i) => total + f(i), 0);
  const bottom = Math.sqrt(sum((i) => (x[i] - mx) ** 2) * sum((i) => (y[i] - my) ** 2));
  return bottom ? sum((i) => (x[i] - mx) * (y[i] - my)) / bottom : null;
};
const drawCompared = () => {
  const a = data.analyses[+$("first").value], b = data.analyses[+$("second").value], key = $("compared").value, words = data.figures[key];
  const moved = data.analyses.some(({ origin }) => list(origin).some((old, layer) => old !== layer));
  draw("compare", `${words}: mean of every layer`, data.analyses.map((analysis, i) => ({
    x: byLayer(analysis, key).map((_, layer) => (analysis.origin ? analysis.origin[layer] : layer)), y: byLayer(analysis, key), ...series(i, titleOf(analysis)),
  })), { xaxis: axis(moved ? "layer of the first analysis, before layers were removed" : "layer") });
  const both = pairs(a, b).filter(([one, two]) => typeof one[key] === "number" && typeof two[key] === "number");
  const same = pairs(a, b).filter(([one, two]) => one.observed === two.observed).length;
  $("compare-words").textContent = both.length
    ? `${pairs(a, b).length} heads exist in both; ${same} keep their label.` : "No heads to match: the models have other shapes.";
  for (const id of ["difference", "scatter"]) $(id).parentElement.hidden = !both.length;
  if (!both.length) return;
  const z = Array.from({ length: layersOf(a) }, () => Array(widthOf(a)).fill(null));
  for (const [one, two] of both) z[one.layer][one.head] = two[key] - one[key];
  const most = Math.max(...both.map(([one, two]) => Math.abs(two[key] - one[key])), 1e-9);
  draw("difference", `${words}: second minus first`, [{
    type: "heatmap", z, zmin: -most, zmax: most, xgap: 1, ygap: 1, colorbar: { thickness: 12, outlinewidth: 0 },
    colorscale: [[0, "#2166ac"], [0.25, "#92c5de"], [0.5, "#f7f7f7"], [0.75, "#f4a582"], [1, "#b2182b"]],
  }], { height: Math.min(700, 90 + 16 * z.length), xaxis: axis("head", { showgrid: false }), yaxis: axis("layer", { autorange: "reversed", showgrid: false }) });
  const x = both.map(([one]) => one[key]), y = both.map(([, two]) => two[key]), ends = [Math.min(...x, ...y), Math.max(...x, ...y)];
  const rho = correlation(ranks(x), ranks(y));
  draw("scatter", `Every head in both: ${words}${rho === null ? "" : `; rank correlation ${rho.toFixed(2)}`}`, [
    { x, y, mode: "markers", text: both.map(([one, two]) => `${name(one)} → ${name(two)}`), hoverinfo: "text+x+y", showlegend: false,
      marker: { size: 8, opacity: 0.75, color: both.map(([one]) => colourOfLabel(one.observed)) } },
    { x: ends, y: ends, mode: "lines", line: { color: GREY, dash: "dash" }, hoverinfo: "skip", showlegend: false },
  ], { height: 420, xaxis: axis("first"), yaxis: axis("second") });
};
const drawCounts = () =>
  draw("counts", "Heads of each observed label", data.analyses.map((analysis, i) => ({
    type: "bar", name: titleOf(analysis), x: data.labels, marker: { color: COLOURS[i % 8] },
    y: data.labels.map((label) => analysis.heads.filter((head) => head.observed === label).length / Math.max(analysis.heads.length, 1)),
  })), { yaxis: axis("share of heads", { tickformat: ".0%" }) });
const startCompare = () => {
  $("compare-part").hidden = $("compare-link").hidden = data.analyses.length < 2;
  if (data.analyses.length < 2) return;
  for (const [id, chosenOne] of [["first", 0], ["second", 1]]) {
    data.analyses.forEach((analysis, i) => option($(id), i, titleOf(analysis)));
    $(id).value = chosenOne;
  }
  for (const [key, words] of Object.entries(data.figures)) option($("compared"), key, words);
  for (const id of ["first", "second", "compared"]) $(id).addEventListener("change", () => guarded("the comparison", drawCompared));
};
const drawComparison = () => {
  if (data.analyses.length > 1) guarded("the comparison", () => { drawCounts(); drawCompared(); });
};
