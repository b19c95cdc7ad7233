// On a phone the parts of the page are folded at first: a table of contents that opens.
const PHONE = matchMedia("(max-width: 50rem)");
const partsOf = () => document.querySelectorAll("main > section > details");
// A plot that was drawn while it was folded does not know its width
const fitPlots = (box) => {
  for (const plot of box.querySelectorAll(".js-plotly-plot")) if (plot.offsetParent) Plotly.Plots.resize(plot);
};
const unfold = (id) => {
  const part = id && document.querySelector(`main > section[id="${CSS.escape(id)}"] > details`);
  if (part) part.open = true;
};
const startFolding = () => {
  for (const part of [...partsOf(), $("all-figures")]) {
    part.open = !PHONE.matches;
    part.addEventListener("toggle", () => { if (part.open) fitPlots(part); });
  }
  for (const link of document.querySelectorAll("nav a")) link.addEventListener("click", () => unfold(link.hash.slice(1)));
  window.addEventListener("hashchange", () => unfold(location.hash.slice(1)));
  unfold(location.hash.slice(1));
};
