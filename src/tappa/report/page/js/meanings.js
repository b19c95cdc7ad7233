// What a word of the page means: shown where it is pointed at, focused or tapped. One table, data.meanings.
const escaped = (words) => words.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
const termPattern = () => {
  const words = Object.keys(data.terms).sort((a, b) => b.length - a.length).map(escaped);
  return new RegExp(`(?<![\\p{L}\\p{N}])(${words.join("|")})(?![\\p{L}\\p{N}])`, "u");
};
const term = (words, meaning) => {
  const found = element("dfn", words, { tabindex: 0, "data-meaning": meaning });
  found.setAttribute("aria-describedby", "meaning");
  return found;
};
// The text as nodes; the first word of it that has a meaning is one that tells it
const explained = (text) => {
  const match = termPattern().exec(text);
  if (!match) return [text];
  const end = match.index + match[0].length;
  return [text.slice(0, match.index), term(match[0], data.meanings[data.terms[match[0]]]), text.slice(end)];
};
let meant = null; // the word whose meaning is shown
const showMeaning = (target) => {
  const box = $("meaning");
  meant = target instanceof Element ? target.closest("dfn") : null;
  box.hidden = !meant;
  if (!meant) return;
  box.textContent = meant.dataset.meaning;
  const word = meant.getBoundingClientRect(), own = box.getBoundingClientRect();
  const above = word.top - own.height - 6, below = word.bottom + 6;
  box.style.left = `${Math.max(8, Math.min(word.left, document.documentElement.clientWidth - own.width - 8))}px`;
  box.style.top = `${below + own.height > innerHeight && above > 0 ? above : below}px`;
};
const listenToMeanings = () => {
  // a word that has the focus keeps its meaning while the mouse is elsewhere
  document.addEventListener("mouseover", ({ target }) => showMeaning(target.closest("dfn") || document.activeElement));
  for (const kind of ["focusin", "click"]) document.addEventListener(kind, ({ target }) => showMeaning(target));
  document.addEventListener("focusout", () => showMeaning(null));
  document.addEventListener("scroll", () => showMeaning(meant), { passive: true, capture: true });
  document.addEventListener("keydown", ({ key }) => { if (key === "Escape") showMeaning(null); });
};
