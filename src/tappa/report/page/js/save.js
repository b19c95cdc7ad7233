// Every picture as a file: PNG for a slide, SVG for a paper; made in the page, without a network.
const PER_HEAD = ["map", "lags", "channels", "persistence"]; // pictures of the chosen head
const slug = (words) => words.replace(/[^\p{L}\p{N}._]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 80) || "picture";
const pictureName = (place) => {
  const caption = place.parentElement.querySelector("figcaption").textContent;
  const figure = place.id.startsWith("plot-") ? caption.split(/[:;,]/)[0] : place.id;
  const head = PER_HEAD.includes(place.id) && chosen() ? [name(chosen()).replace(" ", "")] : [];
  const shown = place.id === "atlas" ? [state.colour] : [];
  return slug([current().title, ...head, figure, ...shown].join("-"));
};
const keep = (url, file) => {
  const link = element("a", undefined, { href: url, download: file });
  document.body.append(link);
  link.click();
  link.remove();
};
const ofCanvas = (canvas, kind) => {
  const inside = canvas.toDataURL("image/png"), { width, height } = canvas;
  if (kind === "png") return inside;
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" width="${4 * width}" height="${4 * height}"><image href="${inside}" width="${width}" height="${height}" style="image-rendering: pixelated"/></svg>`;
  return `data:image/svg+xml,${encodeURIComponent(svg)}`;
};
// Plotly breaks no lines
const lines = (words, most) => words.split(" ").reduce((found, word) => {
  const last = found.length - 1;
  return last >= 0 && found[last].length + word.length < most ? [...found.slice(0, last), `${found[last]} ${word}`] : [...found, word];
}, []);
// On the page's colour, and with the caption, which stands outside of the plot on the page
const ofPlot = (place, kind) => {
  const { width, height } = place._fullLayout, { data: traces, layout: mine } = place;
  const caption = lines(place.parentElement.querySelector("figcaption").textContent, width / 8), room = 20 + 20 * caption.length;
  const title = { text: safe(caption).join("<br>"), font: { size: 15 }, x: 0, xref: "container", y: 1, yref: "container", yanchor: "top", pad: { l: 12, t: 8 } };
  const paper = getComputedStyle(document.documentElement).getPropertyValue("--paper").trim();
  const all = { ...mine, title, width, height: height + room, paper_bgcolor: paper, margin: { ...mine.margin, t: mine.margin.t + room } };
  return Plotly.toImage({ data: traces, layout: all }, { format: kind, width, height: height + room, scale: kind === "png" ? 2 : 1 });
};
const savePicture = async (place, kind) => {
  const url = place.tagName === "CANVAS" ? ofCanvas(place, kind) : await ofPlot(place, kind);
  keep(url, `${pictureName(place)}.${kind}`);
};
const savers = (place) => {
  const box = element("span", undefined, { class: "save" });
  for (const kind of ["png", "svg"]) {
    const button = element("button", kind.toUpperCase(), { type: "button", title: `Save this picture as ${kind.toUpperCase()}` });
    button.addEventListener("click", () => savePicture(place, kind).catch((error) => note(`a picture cannot be saved: ${error.message}`)));
    box.append(button);
  }
  return box;
};
