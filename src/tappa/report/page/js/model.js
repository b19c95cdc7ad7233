// The model: figures by layer, budgets of methods side by side, what removing or cutting layers costs.
const byLayer = (analysis, key) => {
  const values = [];
  for (const head of analysis.heads) if (typeof head[key] === "number") (values[head.layer] ||= []).push(head[key]);
  return Array.from(values, (those) => (those ? mean(those) : null));
};
const drawLayers = () => {
  const keys = ["q_similarity", "k_similarity", "predictability", "sink_mass"];
  $("layers").parentElement.hidden = !current().heads.length;
  if (!current().heads.length) return;
  draw("layers", "Means over the heads of each layer", keys.map((key, i) => ({ y: byLayer(current(), key), ...series(i, data.figures[key]) })),
    { xaxis: axis("layer"), yaxis: { range: [0, 1.02] } });
};
const drawBudgets = () => {
  const shown = text && text.methods.length && Number.isInteger(text.perLayer);
  $("budgets").parentElement.hidden = !shown;
  if (!shown) return;
  draw("budgets", `Tokens each method keeps by layer, at ${text.budgets[budget()]} for each KV head on average`,
    text.methods.map((words, i) => ({ y: keptByLayer(i, budget()), ...methodSeries(i, words) })), { xaxis: axis("layer"), yaxis: axis("tokens", { rangemode: "tozero" }) });
};
const drawBlocks = () => {
  const found = list(data.results["pruning.json"]).find((x) => list(x.content.layers).length);
  $("blocks").parentElement.hidden = !found;
  if (!found) return;
  const rows = found.content.layers, gone = rows.filter((row) => row.removed !== null && row.removed !== undefined);
  draw("blocks", `Block influence (${found.name})${gone.length ? "; shaded: removed" : ""}`,
    [["bi", "BI"], ["bi_prime", "BI′ = BI and 1 − S"]].map(([key, words], i) => ({ x: rows.map((r) => r.layer), y: rows.map((r) => r[key]), ...series(i, words) })),
    { xaxis: axis("layer"), yaxis: axis("influence", { type: "log", dtick: 1 }),
      shapes: gone.map((r) => ({ type: "rect", x0: r.layer - 0.5, x1: r.layer + 0.5, yref: "paper", y0: 0, y1: 1, fillcolor: GREY, opacity: 0.3, line: { width: 0 } })) });
};
const drawNeeds = () => {
  const found = list(data.results["verification.json"]).find((x) => list(x.content.needs).length);
  $("needs").parentElement.hidden = !found;
  if (!found) return;
  const { needs } = found.content, layers = needs.map((n) => n.layer);
  draw("needs", `Layer sensitivity (${found.name}): what is lost when one layer alone keeps 64 tokens`, [
    { type: "bar", x: layers, y: needs.map((n) => n.kl), name: "KL to the full cache", marker: { color: BLUE } },
    { x: layers, y: needs.map((n) => n.dissimilarity), yaxis: "y2", ...series(5, "1 − S of the layer") },
  ], { xaxis: axis("layer"), yaxis: axis("KL (nats)"), yaxis2: axis("1 − S", { rangemode: "tozero" }) });
};
const drawConfusion = () => {
  const { confusion } = current().agreement;
  $("confusion").parentElement.hidden = !confusion;
  if (!confusion) return;
  const at = (observed, explained) => (confusion[observed] || {})[explained] ?? 0;
  const z = data.labels.map((observed) => {
    const total = data.labels.reduce((sum, label) => sum + at(observed, label), 0);
    return data.labels.map((label) => (total ? at(observed, label) / total : 0));
  });
  draw("confusion", "Observed (rows) and explained (columns): heads, in the colour of their share of the row", [{
    type: "heatmap", x: data.labels, y: data.labels, z, zmin: 0, zmax: 1, colorscale: "Cividis", showscale: false, xgap: 2, ygap: 2, hoverinfo: "none",
  }], { height: 330, xaxis: { showgrid: false, tickangle: -30 }, yaxis: { autorange: "reversed", showgrid: false },
    annotations: data.labels.flatMap((observed, i) => data.labels.map((label, j) => ({ x: label, y: observed, text: String(at(observed, label)), showarrow: false, font: { size: 16, color: z[i][j] > 0.5 ? "#000" : "#fff" } }))) });
};
const drawModel = () => {
  for (const [what, show] of [["layers", drawLayers], ["budgets", drawBudgets], ["block influence", drawBlocks], ["layer sensitivity", drawNeeds], ["the confusion of labels", drawConfusion]])
    guarded(what, show);
};
