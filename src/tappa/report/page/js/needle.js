// What a needle lost: where the tokens of a stretch of the text are still kept.
const needle = { first: -1, last: -1, anchor: 0, missing: false }; // missing: the phrase is not in the text
const SHORT = 8; // tokens of the stretch that is shown at first
const selectNeedle = (a, b) => {
  needle.first = Math.min(a, b);
  needle.last = Math.max(a, b);
  needle.missing = false;
  $("phrase-hint").textContent = "";
  spans.forEach((span, token) => span.classList.toggle("needle", token >= needle.first && token <= needle.last));
};
const takeNeedle = (a, b) => { selectNeedle(a, b); drawNeedle(); };
const needleTokens = () => Array.from({ length: needle.last - needle.first + 1 }, (_, i) => needle.first + i);
const keptShare = (which, at, kv, tokens) => mean(tokens.map((token) => isKept(which, at, kv, token)));
const everyHead = (which, at, tokens) => Array.from({ length: text.kv_heads }, (_, kv) => keptShare(which, at, kv, tokens));

// The stretch on which methods differ most, at the smallest budget; not the ends, which most keep
const mostDisputed = () => {
  const n = text.tokens.length, length = Math.min(SHORT, n);
  const kept = text.methods.map((_, which) => Array.from(keptByToken(which, 0)));
  let best = [-1, 0];
  for (let start = Math.floor(n / 8); start + length <= n * 0.75; start++) {
    const shares = kept.map((row) => mean(row.slice(start, start + length))), middle = mean(shares);
    const spread = mean(shares.map((share) => (share - middle) ** 2));
    if (spread > best[0]) best = [spread, start];
  }
  selectNeedle(best[1], best[1] + length - 1);
};
const findPhrase = (from) => { // the next place, by characters, whatever the tokens are
  const wanted = $("phrase").value, starts = [];
  let whole = "";
  for (const words of text.tokens) { starts.push(whole.length); whole += words; }
  const low = whole.toLowerCase(), after = starts[from + 1] ?? 0;
  let at = wanted ? low.indexOf(wanted.toLowerCase(), after) : -1;
  if (at < 0 && wanted) at = low.indexOf(wanted.toLowerCase());
  if (!wanted && needle.missing) { mostDisputed(); drawNeedle(); }
  if (wanted && at < 0) missNeedle();
  if (at < 0) return;
  const tokenOf = (character) => starts.findLastIndex((start) => start <= character);
  takeNeedle(tokenOf(at), tokenOf(at + wanted.length - 1));
  needle.anchor = needle.first;
  spans[needle.first].scrollIntoView({ block: "nearest" });
};
const missNeedle = () => {
  selectNeedle(-1, -1);
  needle.missing = $("needle-found").hidden = true;
  $("phrase-hint").textContent = "not in this text";
};
const startNeedle = () => {
  $("needle").hidden = !text.methods.length;
  Object.assign(needle, { first: -1, last: -1, anchor: 0, missing: false });
  $("phrase-hint").textContent = "";
};
const describeNeedle = (which, tokens) => {
  const shares = everyHead(which, budget(), tokens), all = shares.filter((x) => x === 1).length, none = shares.filter((x) => x === 0).length;
  const byToken = keptByToken(which, budget()), lost = tokens.filter((token) => !byToken[token]).map((token) => JSON.stringify(text.tokens[token]));
  return `${text.methods[which]} at ${text.budgets[budget()]} tokens a head: ${percent(mean(shares))} of it is kept; all of it in ${all} of ${shares.length} KV heads, nothing in ${none}. ` +
    (lost.length ? `Gone from every head: ${lost.join(", ")}.` : "No token is gone from every head.");
};
const drawNeedle = () => {
  if (!text || !text.methods.length || needle.missing) return;
  $("needle-found").hidden = false;
  if (needle.first < 0) mostDisputed();
  const tokens = needleTokens(), which = method() < 0 ? text.methods.length - 1 : method(), shares = keptByToken(which, budget());
  $("needle-text").replaceChildren(...tokens.map((token) => {
    const share = shares[token], word = element("span", text.tokens[token], { title: `kept in ${percent(share)} of the KV heads` });
    word.style.setProperty("--share", percent(share));
    return word;
  }));
  $("needle-words").textContent = describeNeedle(which, tokens);
  draw("needle-methods", "How much of it stays, all KV heads", text.budgets.map((size, at) => ({
    type: "bar", name: `budget ${size}`, x: text.methods, y: text.methods.map((_, m) => mean(everyHead(m, at, tokens))),
    marker: { color: [COLOURS[6], BLUE, GREEN][at % 3] },
  })), { yaxis: axis("share kept", { range: [0, 1.02] }) });
  onClick("needle-methods", ({ x, curveNumber }) => {
    $("method").value = x;
    $("budget").selectedIndex = curveNumber;
    $("budget").dispatchEvent(new Event("change"));
  });
  const layers = text.kv_heads / text.perLayer, whole = Number.isInteger(text.perLayer);
  for (const id of ["needle-layers", "needle-heads"]) $(id).parentElement.hidden = !whole;
  if (!whole) return;
  const scale = { type: "heatmap", zmin: 0, zmax: 1, colorscale: "Cividis", xgap: 1, ygap: 1, colorbar: { thickness: 12, tickformat: ".0%", outlinewidth: 0 } };
  const inLayer = (m, layer) => mean(Array.from({ length: text.perLayer }, (_, h) => keptShare(m, budget(), layer * text.perLayer + h, tokens)));
  draw("needle-layers", `By layer, budget ${text.budgets[budget()]}: share kept by every method`, [{
    ...scale, y: text.methods, z: text.methods.map((_, m) => Array.from({ length: layers }, (_, layer) => inLayer(m, layer))),
  }], { height: 110 + 32 * text.methods.length, xaxis: axis("layer", { showgrid: false }), yaxis: { showgrid: false, autorange: "reversed" } });
  const z = Array.from({ length: text.perLayer }, (_, h) => Array.from({ length: layers }, (_, layer) => keptShare(which, budget(), layer * text.perLayer + h, tokens)));
  draw("needle-heads", `${text.methods[which]}, budget ${text.budgets[budget()]}: share kept in every KV head`, [{ ...scale, z }],
    { height: 110 + 28 * text.perLayer, xaxis: axis("layer", { showgrid: false }), yaxis: axis("KV head", { dtick: Math.ceil(text.perLayer / 8), showgrid: false, autorange: "reversed" }) });
};
const listenToNeedle = () => {
  $("phrase").addEventListener("input", () => findPhrase(-1));
  $("phrase").addEventListener("keydown", (event) => { if (event.key === "Enter") findPhrase(needle.first); });
  $("disputed").addEventListener("click", () => { $("phrase").value = ""; mostDisputed(); drawNeedle(); });
};
