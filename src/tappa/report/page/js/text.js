// The text: where the chosen head looks from a token, and what a method keeps.
let spans = [], pinned = -1;
const method = () => (text ? text.methods.indexOf($("method").value) : -1);
const budget = () => Math.max($("budget").selectedIndex, 0);
const shade = () => {
  if (!text) return;
  const which = method(), head = chosen(), kv = kvOf(head), shares = which < 0 || kv >= 0 ? [] : keptByToken(which, budget());
  let kept = 0;
  spans.forEach((span, token) => {
    const share = which < 0 ? 1 : kv < 0 ? shares[token] : isKept(which, budget(), kv, token);
    kept += share;
    span.classList.toggle("gone", share === 0);
    span.style.opacity = which >= 0 && share > 0 ? String(0.45 + 0.55 * share) : "";
  });
  const where = kv < 0 ? "on average over heads" : `in ${name(head)}`;
  $("kept-hint").textContent = which < 0 ? "" : `${Math.round(kept)} of ${spans.length} tokens ${where}; what is gone is struck out`;
};
const lookFrom = (token) => {
  for (const span of spans) { span.classList.remove("seen", "here"); span.style.removeProperty("--share"); }
  if (token < 0) return;
  spans[token].classList.add("here");
  const head = chosen(), { top } = text;
  if (!head) { $("looks").textContent = "Choose a head in the atlas first."; return; }
  const base = (state.head * spans.length + token) * top, parts = [];
  for (let i = 0; i < top; i++) {
    const weight = text.weights[base + i] / 100, key = text.keys[base + i];
    if (!weight) continue;
    spans[key].classList.add("seen");
    spans[key].style.setProperty("--share", percent(0.25 + 0.75 * weight));
    parts.push(`${JSON.stringify(text.tokens[key])} (${key}) ${percent(weight)}`);
  }
  $("looks").textContent = `${name(head)} at ${JSON.stringify(text.tokens[token])} (${token}) looks at ${parts.join(", ") || "nothing in particular"}`;
};
const writeText = () => {
  $("text-part").hidden = !text;
  pinned = -1;
  spans = [];
  if (!text) return;
  const before = $("method").value;
  $("method").replaceChildren();
  option($("method"), "", "– all tokens –");
  text.methods.forEach((words) => option($("method"), words, words));
  if (text.methods.includes(before)) $("method").value = before;
  $("budget").replaceChildren();
  text.budgets.forEach((tokens) => option($("budget"), tokens, `${tokens} (${percent(tokens / text.tokens.length)})`));
  $("budget").selectedIndex = Math.min(1, text.budgets.length - 1);
  $("kept-controls").hidden = !text.methods.length;
  spans = text.tokens.map((words, index) => element("span", words, { "data-token": index, tabindex: index ? "-1" : "0" }));
  $("tokens").replaceChildren(...spans);
  $("looks").textContent = "";
  startNeedle();
  shade();
};
const tokenAt = (event) => (event.target.dataset && event.target.dataset.token !== undefined ? +event.target.dataset.token : -1);
const focusToken = (token, how) => { // the one stop of the Tab key in the text
  for (const old of $("tokens").querySelectorAll("[tabindex='0']")) old.tabIndex = -1;
  spans[token].tabIndex = 0;
  spans[token].focus(how);
};
// The token below (1) or above (-1), where the text is broken into lines
const nextLine = (from, way) => {
  const boxes = spans.map((span) => span.getClientRects()[0]), here = boxes[from];
  if (!here) return -1;
  const far = (box) => (box && way * (box.top - here.top) > here.height / 2 ? 1e4 * Math.abs(box.top - here.top) + Math.abs(box.left - here.left) : Infinity);
  const distances = boxes.map(far), least = distances.reduce((a, b) => Math.min(a, b), Infinity);
  return least === Infinity ? -1 : distances.indexOf(least);
};
const listenToText = () => {
  const box = $("tokens");
  box.addEventListener("mouseover", (event) => { if (tokenAt(event) >= 0 && pinned < 0) lookFrom(tokenAt(event)); });
  box.addEventListener("focusin", (event) => { if (tokenAt(event) >= 0) lookFrom(tokenAt(event)); });
  box.addEventListener("mousedown", (event) => { if (event.shiftKey) event.preventDefault(); });
  box.addEventListener("click", (event) => {
    const token = tokenAt(event);
    if (token < 0) return;
    focusToken(token, { preventScroll: true });
    if (event.shiftKey) { takeNeedle(needle.anchor, token); return; }
    pinned = pinned === token ? -1 : token;
    needle.anchor = token;
    lookFrom(token);
  });
  box.addEventListener("keydown", (event) => {
    const from = tokenAt(event), moves = {
      ArrowRight: () => from + 1, ArrowLeft: () => from - 1, ArrowDown: () => nextLine(from, 1), ArrowUp: () => nextLine(from, -1),
      Home: () => 0, End: () => spans.length - 1,
    };
    const to = from >= 0 && moves[event.key] ? moves[event.key]() : -1;
    if (!spans[to]) return;
    event.preventDefault();
    focusToken(to);
    if (event.shiftKey) takeNeedle(needle.anchor, to); else needle.anchor = to;
  });
  $("method").addEventListener("change", () => { shade(); drawNeedle(); });
  $("budget").addEventListener("change", () => { shade(); drawNeedle(); drawBudgets(); if (state.colour.startsWith("kept:")) drawAtlas(); });
};
