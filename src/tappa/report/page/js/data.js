// What the page holds, and what is chosen: analysis, head, text, method, budget.
const [content, plotly] = await Promise.all(["data", "plotly"].map((id) => unpack($(id).textContent)));
const data = JSON.parse(content);
document.head.append(element("script", plotly)); // runs at once; its hash is in the policy of the page

const LETTERS = { "re-access": "R", sequential: "S", periodic: "P", seasonal: "L", unpredictable: "·" };
const state = { analysis: 0, text: -1, colour: "", label: "", find: "", sort: "", ascending: false, head: -1 };
const current = () => data.analyses[state.analysis];
const chosen = () => current().heads[state.head];
const name = (head) => `L${head.layer} H${head.head}`;
const layersOf = (analysis) => analysis.heads.reduce((most, head) => Math.max(most, head.layer), -1) + 1;
const widthOf = (analysis) => analysis.heads.reduce((most, head) => Math.max(most, head.head), -1) + 1;
const indexAt = (analysis, layer, head) => analysis.heads.findIndex((h) => h.layer === layer && h.head === head);
const colourOfLabel = (label) => COLOURS[Math.max(data.labels.indexOf(label), 0)];

// ---- texts: those of an analysis, unpacked when they are first shown
const opened = new Map();
const textsOf = (analysis) => data.texts.map((text, place) => ({ ...text, place })).filter((text) => text.analysis === analysis);
const openText = async (place) => {
  if (!opened.has(place)) {
    const text = JSON.parse(await unpack($(`text-${place}`).textContent));
    for (const key of ["maps", "weights", "kept", "persistence"]) text[key] = bytesOf(text[key]);
    text.keys = new Uint16Array(bytesOf(text.keys).buffer);
    text.row = Math.ceil(text.tokens.length / 8); // bytes of a row of kept
    text.perLayer = text.kv_heads / Math.max(layersOf(data.analyses[text.analysis]), 1);
    opened.set(place, text);
  }
  return opened.get(place);
};
let text = null; // the one that is shown
// Whether a method (by number) keeps a token at a budget (by number) in a KV head of the model
const isKept = (method, budget, kv, token) =>
  (text.kept[((method * text.budgets.length + budget) * text.kv_heads + kv) * text.row + (token >> 3)] >> (7 - (token & 7))) & 1;
// The share of KV heads that keep each token
const keptByToken = (method, budget) => {
  const found = new Float64Array(text.tokens.length);
  for (let kv = 0; kv < text.kv_heads; kv++) for (let token = 0; token < found.length; token++) found[token] += isKept(method, budget, kv, token);
  return found.map((count) => count / text.kv_heads);
};
const kvOf = (head) => (Number.isInteger(text.perLayer) && head ? head.layer * text.perLayer + head.kv_head : -1);
const ONES = Uint8Array.from({ length: 256 }, (_, byte) => byte.toString(2).replaceAll("0", "").length);
const keptIn = (method, budget, kv) => {
  const from = ((method * text.budgets.length + budget) * text.kv_heads + kv) * text.row;
  return text.kept.subarray(from, from + text.row).reduce((sum, byte) => sum + ONES[byte], 0);
};
const keptByLayer = (method, budget) =>
  Array.from({ length: text.kv_heads / text.perLayer }, (_, layer) =>
    mean(Array.from({ length: text.perLayer }, (_, h) => keptIn(method, budget, layer * text.perLayer + h))));
