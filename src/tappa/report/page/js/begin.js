// Fill the selects, listen, draw.
const drawSummary = () => {
  const { model, heads, prompts, bounds_checked, bound_violations } = current(), tokens = prompts.reduce((a, b) => a + b, 0);
  $("summary").textContent = `${model.class || "?"}, ${number(model.layers)} layers, ${number(heads.length)} heads, ${number(tokens)} tokens in ${prompts.length} prompt(s); ` +
    `${number(bound_violations)} violations of the bounds in ${number(bounds_checked)} checks`;
};
const refresh = () => {
  guarded("the summary", drawSummary);
  drawMix(); drawAtlas(); drawList(); drawCard();
};
const showText = async (place) => {
  text = place === undefined ? null : await openText(place);
  writeText();
};
const showAnalysis = async () => {
  const texts = textsOf(state.analysis), { heads } = current();
  $("text").replaceChildren();
  texts.forEach(({ title, place }) => option($("text"), place, title));
  $("text-label").hidden = texts.length < 2;
  await showText(texts.length ? texts[0].place : undefined);
  $("text-link").hidden = !text;
  for (const old of $("colour").querySelectorAll("[value^='kept:']")) old.remove();
  for (const words of text ? text.methods : []) option($("colour"), `kept:${words}`, `tokens kept by ${words}`);
  state.colour = $("colour").value;
  state.head = heads.length ? clearestHead() : -1;
  refresh();
};
// One after the other, so that the page answers in between
const drawRest = async () => {
  for (const show of [drawNeedle, drawModel, drawComparison, drawResults, drawTheory]) {
    await new Promise((done) => setTimeout(done));
    show();
  }
};
const clearestHead = () => { // something to look at: the most telling head of the rarest label
  const { heads } = current(), figure = { "re-access": "vertical", sequential: "diagonal", periodic: "period_strength", seasonal: "seasonal", unpredictable: "entropy" };
  const groups = data.labels.map((label) => heads.filter((head) => head.observed === label)).filter((group) => group.length);
  const rarest = groups.sort((a, b) => a.length - b.length)[0] || heads;
  const key = figure[rarest[0].observed];
  return heads.indexOf(rarest.reduce((best, head) => ((head[key] ?? 0) > (best[key] ?? 0) ? head : best)));
};
const fillSelects = () => {
  data.analyses.forEach((analysis, i) => option($("analysis"), i, titleOf(analysis)));
  for (const [key, words] of [["observed", "observed label"], ["explained", "explained label"], ["disagree", "where labels disagree"]]) option($("colour"), key, words);
  option($("sort"), "", "by layer");
  for (const [key, words] of Object.entries(data.figures)) for (const id of ["colour", "sort"]) option($(id), key, words);
  $("colour").value = data.analyses[0].colour;
  option($("label"), "", "all");
  data.labels.forEach((label) => option($("label"), label, label));
};
const moveBy = (event) => {
  const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
  if (!step) return;
  event.preventDefault();
  const from = chosen() || { layer: -step[0], head: -step[1] };
  const far = (head) => { // the nearest of the shown heads that way, better straight on than aside
    const down = head.layer - from.layer, right = head.head - from.head;
    const along = down * step[0] + right * step[1], aside = Math.abs(down * step[1]) + Math.abs(right * step[0]);
    return along > 0 && matches(head) ? along + 2 * aside : Infinity;
  };
  const distances = current().heads.map(far), least = distances.reduce((a, b) => Math.min(a, b), Infinity);
  if (least < Infinity) choose(distances.indexOf(least));
};
const openAsked = () => { // the head of #L18H5
  const asked = /^#L(\d+)H(\d+)$/.exec(location.hash), index = asked ? indexAt(current(), +asked[1], +asked[2]) : -1;
  if (index < 0) return;
  choose(index);
  $("card").scrollIntoView();
};
const listen = () => {
  for (const key of ["colour", "label", "sort"]) $(key).addEventListener("change", () => { state[key] = $(key).value; drawAtlas(); drawList(); });
  $("ascending").addEventListener("change", () => { state.ascending = $("ascending").checked; drawList(); });
  $("list").addEventListener("keydown", moveInList);
  window.addEventListener("hashchange", openAsked);
  $("find").addEventListener("input", () => {
    state.find = $("find").value;
    const found = current().heads.map((_, i) => i).filter((i) => matches(current().heads[i]));
    drawAtlas(); drawList();
    if (found.length === 1) choose(found[0]);
  });
  $("analysis").addEventListener("change", async () => { state.analysis = +$("analysis").value; await showAnalysis(); drawNeedle(); drawModel(); });
  $("text").addEventListener("change", async () => { await showText(+$("text").value); drawAtlas(); drawCard(); drawNeedle(); drawBudgets(); });
  $("log").addEventListener("change", drawMap);
  $("map").addEventListener("mousemove", readMap);
  $("atlas").addEventListener("keydown", moveBy);
  listenToText(); listenToNeedle(); listenToMeanings();
  $("map").parentElement.querySelector("figcaption").after(savers($("map")));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { refresh(); return drawRest(); });
};
startFolding();
data.notes.forEach(note);
$("notes").open = data.damaged > 0;
if (data.analyses.length) {
  fillSelects(); startCompare(); listen();
  await showAnalysis();
  if (current().heads.length) {
    onClick("atlas", (_, event) => chooseAt(event));
    openAsked();
  }
}
document.documentElement.dataset.ready = "heads"; // they can be looked at; the rest follows
if (data.analyses.length) await drawRest();
document.documentElement.dataset.ready = "all";
