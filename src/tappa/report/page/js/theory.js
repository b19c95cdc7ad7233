// What tappa verify left: every claim as a picture, its numbers in a table below.
const diagonal = (most) => ({ x: [0, most], y: [0, most], mode: "lines", name: "theory", line: { color: GREY, dash: "dash" }, hoverinfo: "skip" });
const showBounds = (cards, { bounds }) => {
  const rows = list(bounds).filter((b) => isNumber(b.tightness)), broken = list(bounds).reduce((sum, b) => sum + b.violations, 0);
  if (rows.length)
    addPlot(cards, `Bounds: ${number(broken)} violations in ${number(rows.reduce((sum, b) => sum + b.checked, 0))} checks; median of bound ÷ actual, 1 is exact`,
      [{ type: "bar", orientation: "h", y: rows.map((b) => data.bounds[b.name] ?? String(b.name)), x: rows.map((b) => b.tightness), marker: { color: rows.map((b) => (b.violations ? RED : GREEN)) } }],
      { height: 90 + 32 * rows.length, xaxis: axis("bound ÷ actual", { rangemode: "tozero" }), yaxis: { autorange: "reversed" } });
};
const showMoved = (cards, { relocations }) => {
  const rows = list(relocations).filter((m) => isNumber(m.measured)), most = 1.05 * Math.max(...rows.map((m) => m.predicted), 0);
  const points = (key, words, color, symbol) => ({ x: rows.map((m) => m.predicted), y: rows.map((m) => m[key]), name: words, mode: "markers", marker: { color, symbol, size: 10 }, hoverinfo: "text+x+y",
    text: rows.map((m) => `L${m.layer} H${m.head}: channel ${m.source} → ${m.target}, base × ${number(m.base_factor)}`) });
  if (rows.length)
    addPlot(cards, `Theorem 5.3: dominant channels moved, and diagonals follow (${rows.filter((m) => m.verdict === "pass").length} of ${rows.length} within 1%)`,
      [diagonal(most), points("measured", "mean logit", BLUE, "circle-open"), points("attention", "mean attention", RED, "x-thin-open")],
      { height: 380, xaxis: axis("predicted spacing 2π/θ (tokens)"), yaxis: axis("measured (tokens)") });
};
const showResonance = (cards, { resonances }) => {
  const rows = list(resonances).filter((r) => list(r.lags).length);
  if (!rows.length) return;
  const box = element("div", undefined, { class: "wide" }), pick = element("select"), label = element("label", "Head ");
  rows.forEach((r, i) => option(pick, i, `L${r.layer} H${r.head}, channel moved to ${r.target}`));
  label.append(pick); box.append(label); cards.append(box);
  const id = addPlot(box, "", [], {});
  const show = () => {
    const r = rows[+pick.value];
    draw(id, "Theorem 5.4: on a prompt that repeats, how much logits change after L tokens, multiples of its period", [
      { x: r.lags, y: r.change, ...series(0, "measured") },
      { x: r.lags, y: r.expected.map((e) => (2 / Math.PI) * e), ...series(5, "theory: chord(Lθ) of the moved channel"), line: { color: RED, dash: "dash" } },
    ], { xaxis: axis("L (tokens)"), yaxis: axis("share of energy", { rangemode: "tozero" }) });
  };
  pick.addEventListener("change", show);
  show();
};
const showObserved = (cards, { observations }) => {
  const rows = list(observations).filter((o) => isNumber(o.value));
  if (!rows.length) return;
  const kinds = [["AUROC", 0.5, RED, "square"], ["Spearman", 0, BLUE, "circle"]], kindOf = (o) => kinds.findIndex(([kind]) => String(o.figure).startsWith(kind));
  const box = element("div", undefined, { class: "wide" });
  cards.append(box);
  addPlot(box, "What the paper observed, with bootstrap 95% intervals (chance: AUROC .5, Spearman 0)", [...kinds.map(([kind, , color, symbol], k) => [kind, k, color, symbol]), ["share or cosine", -1, GREEN, "diamond"]].map(([words, k, color, symbol]) => {
    const mine = rows.map((o, place) => [o, place]).filter(([o]) => kindOf(o) === k);
    return { name: words, mode: "markers", x: mine.map(([o]) => o.value), y: mine.map(([, place]) => place), hoverinfo: "text+x", text: mine.map(([o]) => `${o.claim}${o.variant ? ` (${o.variant})` : ""}: ${o.figure}, n = ${number(o.n)}`),
      marker: { color, symbol, size: 9 }, error_x: { type: "data", symmetric: false, array: mine.map(([o]) => Math.max((o.high ?? o.value) - o.value, 0)), arrayminus: mine.map(([o]) => Math.max(o.value - (o.low ?? o.value), 0)), thickness: 1.5, width: 0 } };
  }), { height: 110 + 22 * rows.length, xaxis: axis("value"), yaxis: { autorange: "reversed", showticklabels: innerWidth > 800, tickvals: rows.map((_, i) => i), tickfont: { size: 13 },
    ticktext: rows.map((o) => `${o.claim}${o.variant ? ` (${String(o.variant).replaceAll("_", " ")})` : ""}`) } });
};
const showNeeds = (cards, { needs, sensitivity }) => {
  const rows = list(needs), rho = list(sensitivity).find((s) => s.grain === "layers" && s.variant === "pre_all_prompt");
  if (rows.length)
    addPlot(cards, `Layers with less self-similar queries need more tokens (KL when one alone keeps 64)${rho ? `: rank correlation ${number(rho.value)}, p = ${number(rho.p)}` : ""}`,
      [{ x: rows.map((n) => n.dissimilarity), y: rows.map((n) => n.kl), text: rows.map((n) => `${n.layer}`), hovertext: rows.map((n) => `layer ${n.layer}`), hoverinfo: "text+x+y", mode: "markers+text", textposition: "top center", textfont: { size: 12 }, marker: { color: BLUE, size: 9 } }],
      { height: 380, xaxis: axis("1 − S of the layer, before RoPE"), yaxis: axis("KL (nats)", { type: "log", dtick: 1 }) });
};
const showMadeUp = (cards, { constructed }) => {
  const rows = list(constructed), kinds = [...new Set(rows.map((c) => c.pattern))];
  const right = (key) => kinds.map((kind) => mean(rows.filter((c) => c.pattern === kind).map((c) => (c[key] === kind ? 1 : 0))));
  if (rows.length)
    addPlot(cards, `Heads made up to show a pattern: how many get its name (${rows.length} in all)`,
      [["observed", BLUE], ["explained", AMBER]].map(([key, color]) => ({ type: "bar", name: key, x: kinds, y: right(key), marker: { color } })), { yaxis: axis("share", { range: [0, 1.02] }) });
};
const showVerification = (box, from, content) => {
  const cards = element("div", undefined, { class: "cards" });
  box.append(element("h3", `${from}: ${(content.model || {}).name ?? "?"}, ${number(content.tokens)} tokens, ${content.passed ? "all that can be tested holds" : "not all holds"}`), cards);
  for (const show of [showBounds, showMoved, showResonance, showObserved, showNeeds, showMadeUp]) guarded(from, () => show(cards, content));
  const bounds = list(content.bounds).map((b) => [b.name, b.checked, b.violations, b.tightness, b.verdict]);
  const moved = list(content.relocations).map((m) => [`L${m.layer} H${m.head}`, `${m.source} → ${m.target}`, m.base_factor, m.predicted, m.measured, m.error, m.verdict]);
  const seen = list(content.observations).map((o) => [o.claim, o.variant, o.figure, o.value, o.low, o.high, o.n]);
  box.append(folded("Numbers", tableOf(["bound", "checked", "violations", "median bound ÷ actual", "verdict"], bounds, "Bounds"),
    tableOf(["claim", "variant", "figure", "value", "low", "high", "n"], seen, "What the paper observed"),
    tableOf(["head", "channel", "base ×", "predicted", "measured", "error", "verdict"], moved, "Channels moved: tokens between diagonals")));
};
const drawTheory = () => {
  const found = list(data.results["verification.json"]), box = $("theory");
  $("theory-part").hidden = $("theory-link").hidden = !found.length;
  box.replaceChildren();
  for (const { name: from, content } of found) guarded(from, () => showVerification(box, from, content));
};
