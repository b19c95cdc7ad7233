"use strict";
(async () => {
  const $ = (id) => document.getElementById(id);
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const unpack = async (text) => {
    const stream = new Blob([bytes(text)]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  };
  const data = await unpack($("data").textContent);
  const element = (name, text, attributes = {}) => {
    const found = document.createElement(name);
    if (text !== undefined) found.textContent = text; // text only: names and tokens are untrusted
    for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
    return found;
  };
  const number = (x) => {
    if (x === null || x === undefined) return "–";
    if (typeof x !== "number") return String(x);
    if (Number.isInteger(x)) return x.toLocaleString("en");
    return Math.abs(x) >= 1e5 || Math.abs(x) < 1e-3 ? x.toExponential(2) : String(+x.toPrecision(3));
  };
  // Okabe and Ito's colours, told apart by all eyes
  const COLOURS = ["#0072b2", "#009e73", "#cc79a7", "#e69f00", "#999999", "#d55e00", "#56b4e9", "#f0e442"];
  const LEGEND = { orientation: "h", yref: "container", y: 0, yanchor: "bottom" };
  const LETTERS = { "re-access": "R", sequential: "S", periodic: "P", seasonal: "L", unpredictable: "·" };
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const layout = (more) => {
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--ink").trim(), line = style.getPropertyValue("--line").trim();
    const axis = { gridcolor: line, zerolinecolor: line, automargin: true };
    const found = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: 14 },
      margin: { l: 50, r: 15, t: 40, b: more.legend ? 95 : 45 }, ...more };
    for (const key of ["xaxis", "yaxis", "yaxis2"]) if (key !== "yaxis2" || more[key]) found[key] = { ...axis, ...(more[key] || {}) };
    return found;
  };
  const draw = (id, traces, more) =>
    Plotly.react(id, traces, layout(more), { displaylogo: false, responsive: true, displayModeBar: false });
  const title = (text) => ({ text: plain(text), font: { size: 15 } });

  const state = { analysis: 0, colour: "q_similarity", label: "", find: "", sort: "", head: -1 };
  const current = () => data.analyses[state.analysis];
  const name = (head) => `L${head.layer} H${head.head}`;
  const matches = (head) => {
    if (state.label && head.observed !== state.label) return false;
    const wanted = state.find.trim().toUpperCase().split(/[\s,;]+/).filter(Boolean);
    return wanted.every((w) => {
      const full = /^L?(\d+)[.H](\d+)$/.exec(w);
      if (full) return head.layer === +full[1] && head.head === +full[2];
      return w === `L${head.layer}` || w === `H${head.head}` || (head.observed || "").toUpperCase().includes(w);
    });
  };

  // ---- atlas
  const colourOf = (head) => {
    if (state.colour === "observed" || state.colour === "explained") {
      const place = data.labels.indexOf(head[state.colour]);
      return place < 0 ? null : place;
    }
    if (state.colour === "disagree") return head.observed === head.explained ? 0 : 1;
    if (state.colour.startsWith("kept:")) return state.analysis === 0 ? tokensOf(state.colour.slice(5), head) : null;
    return head[state.colour];
  };
  const drawAtlas = () => {
    const heads = current().heads;
    if (!heads.length) { $("atlas").textContent = "No heads in this file."; return; }
    const rows = Math.max(...heads.map((h) => h.layer)) + 1, columns = Math.max(...heads.map((h) => h.head)) + 1;
    const empty = () => Array.from({ length: rows }, () => Array(columns).fill(null));
    const z = empty(), text = empty(), letters = empty();
    for (const head of heads) {
      if (!matches(head)) continue;
      const value = colourOf(head);
      z[head.layer][head.head] = value;
      text[head.layer][head.head] = `${name(head)}: ${number(state.colour.startsWith("kept:") ? value : head[state.colour] ?? head.observed)}`;
      if (["observed", "explained", "disagree"].includes(state.colour))
        letters[head.layer][head.head] = LETTERS[head[state.colour === "explained" ? "explained" : "observed"]] || "";
    }
    const trace = { type: "heatmap", z, hovertext: text, hoverinfo: "text", xgap: 1, ygap: 1, colorscale: "Cividis", colorbar: { thickness: 12 } };
    if (state.colour === "observed" || state.colour === "explained") {
      const n = data.labels.length;
      Object.assign(trace, { zmin: -0.5, zmax: n - 0.5, colorscale: data.labels.flatMap((_, i) => [[i / n, COLOURS[i]], [(i + 1) / n, COLOURS[i]]]),
        colorbar: { thickness: 12, tickvals: data.labels.map((_, i) => i), ticktext: data.labels.map(plain) } });
    }
    if (state.colour === "disagree") Object.assign(trace, { zmin: 0, zmax: 1, colorscale: [[0, "#56b4e9"], [1, "#d55e00"]], showscale: false });
    const few = rows * columns <= 600;
    if (few && ["observed", "explained", "disagree"].includes(state.colour)) Object.assign(trace, { text: letters, texttemplate: "%{text}" });
    const chosen = heads[state.head];
    const shapes = chosen ? [{ type: "rect", x0: chosen.head - 0.5, x1: chosen.head + 0.5, y0: chosen.layer - 0.5, y1: chosen.layer + 0.5, line: { color: "#d55e00", width: 3 } }] : [];
    draw("atlas", [trace], { height: Math.min(900, Math.max(300, rows * 17 + 90)), shapes, title: title($("colour").selectedOptions[0].textContent),
      xaxis: { title: { text: "head" }, dtick: Math.ceil(columns / 16), showgrid: false }, yaxis: { title: { text: "layer" }, autorange: "reversed", showgrid: false } });
  };
  const indexAt = (layer, head) => current().heads.findIndex((h) => h.layer === layer && h.head === head);
  const drawList = () => {
    const heads = current().heads.map((head, index) => [head, index]).filter(([head]) => matches(head));
    const key = state.sort;
    if (key) heads.sort((a, b) => (b[0][key] ?? -Infinity) - (a[0][key] ?? -Infinity));
    const list = $("list");
    list.replaceChildren(element("p", `${heads.length} heads`, { class: "hint" }));
    for (const [head, index] of heads.slice(0, 300)) {
      const figure = key ? `${number(head[key])}  ` : "";
      const button = element("button", `${name(head)}  ${figure}${head.observed || ""}: ${head.sentence || ""}`, { type: "button" });
      if (index === state.head) button.setAttribute("aria-current", "true");
      button.addEventListener("click", () => choose(index));
      list.append(button);
    }
    if (heads.length > 300) list.append(element("p", `and ${heads.length - 300} more: filter or sort`, { class: "hint" }));
  };

  // ---- head card
  const views = data.views && {
    maps: bytes(data.views.maps), weights: bytes(data.views.weights), kept: bytes(data.views.kept),
    keys: new Uint16Array(bytes(data.views.keys).buffer), ...{ size: data.views.size, top: data.views.top, tokens: data.views.tokens },
  };
  const drawMap = () => {
    const { size } = views, log = $("log").checked, canvas = $("map");
    canvas.width = canvas.height = size;
    const context = canvas.getContext("2d"), image = context.createImageData(size, size);
    const most = Math.log1p(data.views.stretch);
    for (let i = 0; i < size * size; i++) {
      const stored = views.maps[state.head * size * size + i] / 255;
      const share = log ? stored : Math.expm1(stored * most) / data.views.stretch;
      const [r, g, b] = [Math.round(255 * Math.min(1, share * 1.6)), Math.round(255 * share), Math.round(90 + 60 * share * (1 - share) * 4 - 90 * share)];
      image.data.set([r, g, b, 255], i * 4);
    }
    context.putImageData(image, 0, 0);
    canvas.setAttribute("aria-label", `Attention map of ${name(current().heads[state.head])}`);
  };
  const drawCard = () => {
    const analysis = current(), head = analysis.heads[state.head];
    $("card").hidden = !head;
    if (!head) return;
    $("card-title").textContent = `${name(head)}: ${head.observed || "?"}` + (head.explained && head.explained !== head.observed ? ` (explained as ${head.explained})` : "");
    $("card-sentence").textContent = head.sentence ? head.sentence[0].toUpperCase() + head.sentence.slice(1) + (head.q_similarity === null ? "." : `. Queries are self-similar with S = ${number(head.q_similarity)}.`) : "";
    const mapped = views && state.analysis === 0 && views.maps.length >= (state.head + 1) * views.size ** 2;
    $("map-figure").hidden = !mapped;
    if (mapped) drawMap();
    const attention = analysis.attention && analysis.attention[state.head];
    $("lags").hidden = $("channels").hidden = !attention;
    if (attention) {
      const lags = attention.map((_, i) => i);
      const shapes = [];
      const turn = head.measured_period;
      if (turn && turn >= 2) for (let x = turn; x < lags.length; x += turn) shapes.push({ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { color: "#e69f00", width: 1, dash: "dot" } });
      draw("lags", [{ x: lags, y: analysis.logits[state.head], name: "mean logit", line: { color: COLOURS[0] } },
        { x: lags, y: attention, name: "mean attention", yaxis: "y2", line: { color: COLOURS[5] } }],
      { height: 280, shapes: shapes.slice(0, 60), title: title(turn ? `By distance; dotted: every ${number(turn)} tokens` : "By distance"), xaxis: { title: { text: "tokens back" } },
        yaxis2: { overlaying: "y", side: "right", showgrid: false }, legend: LEGEND });
      const theta = analysis.theta[head.layer] || [], energy = analysis.energy[state.head];
      draw("channels", [{ type: "bar", x: energy.map((_, i) => i), y: energy, marker: { color: energy.map((_, i) => (i === head.dominant_channel ? COLOURS[5] : COLOURS[0])) },
        text: energy.map((_, i) => (theta[i] ? `channel ${i}: one turn in ${number((2 * Math.PI) / theta[i])} tokens` : "not rotated")), textposition: "none", hoverinfo: "text+y" }],
      { height: 280, title: title(`Energy by RoPE channel; ${number(head.dominant_channel)} dominates`), xaxis: { title: { text: "channel, fast to slow" } }, yaxis: { title: { text: "share" } } });
    }
    const names = ["vertical", "diagonal", "seasonal", "predictability"];
    draw("persistence", [{ type: "bar", name: "observed", x: names, y: names.map((n) => head[n]), marker: { color: COLOURS[0] } },
      { type: "bar", name: "expected", x: names, y: names.map((n) => head[`expected_${n}`] ?? null), marker: { color: COLOURS[3] } }],
    { height: 280, title: title("Persistence of attention"), yaxis: { range: [0, 1] }, legend: LEGEND });
    const table = $("figures");
    table.replaceChildren();
    for (const [key, words] of Object.entries(data.figures)) {
      const row = element("tr");
      row.append(element("th", words, { scope: "row" }), element("td", number(head[key]), { class: "n" }));
      table.append(row);
    }
    (head.tightness || []).forEach((value, i) => {
      const row = element("tr");
      row.append(element("th", `bound ÷ actual, ${data.tightness[i]}`, { scope: "row" }), element("td", number(value), { class: "n" }));
      table.append(row);
    });
  };
  const choose = (index) => {
    state.head = index;
    drawAtlas(); drawList(); drawCard(); shade();
    const head = current().heads[index];
    if (head) history.replaceState(null, "", `#${name(head).replace(" ", "")}`);
  };

  // ---- text
  let spans = [], pinned = -1;
  const keptBy = (method, token) => {
    const place = data.views.methods.indexOf(method), row = Math.ceil(views.tokens.length / 8), kv = data.views.kv_heads;
    const at = (h) => (views.kept[(place * kv + h) * row + (token >> 3)] >> (7 - (token & 7))) & 1;
    const heads = current().heads, head = heads[state.head];
    const perLayer = kv / (Math.max(...heads.map((h) => h.layer)) + 1);
    if (head && Number.isInteger(perLayer)) return at(head.layer * perLayer + head.kv_head);
    let sum = 0;
    for (let h = 0; h < kv; h++) sum += at(h);
    return sum / kv;
  };
  const shade = () => {
    if (!views) return;
    const method = $("method").value;
    let kept = 0;
    spans.forEach((span, token) => {
      const share = method ? keptBy(method, token) : 1;
      kept += share;
      span.classList.toggle("gone", share === 0);
      span.style.opacity = method && share > 0 ? String(0.4 + 0.6 * share) : "";
    });
    const head = current().heads[state.head];
    $("kept-hint").textContent = method ? `${Math.round(kept)} of ${spans.length} tokens ${head ? `in ${name(head)}` : "on average over heads"}, at a budget of ${data.views.budget} for each head` : "";
  };
  const lookFrom = (token) => {
    spans.forEach((span) => span.classList.remove("seen", "here"));
    if (token < 0) return;
    spans[token].classList.add("here");
    const head = current().heads[state.head], { top } = views;
    if (!head || state.analysis !== 0) { $("looks").textContent = "Choose a head in the atlas first."; return; }
    const base = (state.head * spans.length + token) * top, parts = [];
    for (let i = 0; i < top; i++) {
      const weight = views.weights[base + i] / 255, key = views.keys[base + i];
      if (!weight) continue;
      spans[key].classList.add("seen");
      parts.push(`${JSON.stringify(views.tokens[key])} (${key}) ${Math.round(weight * 100)}%`);
    }
    $("looks").textContent = `${name(head)} at ${JSON.stringify(views.tokens[token])} (${token}) looks at ${parts.join(", ") || "nothing in particular"}`;
  };
  const writeText = () => {
    if (!views) return;
    $("text-part").hidden = false;
    $("method").append(element("option", "– all tokens –", { value: "" }));
    for (const method of data.views.methods) $("method").append(element("option", method));
    $("method").addEventListener("change", shade);
    const box = $("tokens");
    spans = views.tokens.map((token, index) => element("span", token, { "data-token": index, tabindex: index ? "-1" : "0" }));
    box.append(...spans);
    const at = (event) => (event.target.dataset && event.target.dataset.token !== undefined ? +event.target.dataset.token : -1);
    box.addEventListener("mouseover", (event) => { if (at(event) >= 0 && pinned < 0) lookFrom(at(event)); });
    box.addEventListener("focusin", (event) => { if (at(event) >= 0) lookFrom(at(event)); });
    box.addEventListener("click", (event) => { pinned = pinned === at(event) ? -1 : at(event); if (at(event) >= 0) lookFrom(at(event)); });
    box.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], to = at(event) + step;
      if (step && spans[to]) { event.preventDefault(); spans[at(event)].tabIndex = -1; spans[to].tabIndex = 0; spans[to].focus(); }
    });
  };

  // ---- model
  const ones = Uint8Array.from({ length: 256 }, (_, byte) => byte.toString(2).replaceAll("0", "").length);
  const tokensIn = (method, first, count) => { // kept by a method in `count` KV heads from `first` on
    const row = Math.ceil(views.tokens.length / 8), from = (data.views.methods.indexOf(method) * data.views.kv_heads + first) * row;
    return views.kept.subarray(from, from + count * row).reduce((sum, byte) => sum + ones[byte], 0);
  };
  const perLayer = () => data.views.kv_heads / (Math.max(...data.analyses[0].heads.map((h) => h.layer)) + 1);
  const tokensOf = (method, head) => tokensIn(method, head.layer * perLayer() + head.kv_head, 1);
  const tokensByLayer = (method) =>
    Array.from({ length: data.views.kv_heads / perLayer() }, (_, layer) => tokensIn(method, layer * perLayer(), perLayer()) / perLayer());
  const byLayer = (analysis, key) => {
    const sums = [];
    for (const head of analysis.heads) if (head[key] !== null) (sums[head.layer] ||= []).push(head[key]);
    return Array.from(sums, (values) => (values ? values.reduce((a, b) => a + b, 0) / values.length : null));
  };
  const drawModel = () => {
    const keys = ["q_similarity", "k_similarity", "predictability", "sink_mass"];
    draw("layers", keys.map((key, i) => ({ y: byLayer(current(), key), name: plain(data.figures[key]), mode: "lines+markers", line: { color: COLOURS[i] } })),
      { height: 340, title: title("Means over the heads of each layer"), xaxis: { title: { text: "layer" } }, legend: LEGEND });
    $("budgets").hidden = !(views && state.analysis === 0 && data.views.methods.length);
    if (!$("budgets").hidden)
      draw("budgets", data.views.methods.map((method, i) => ({ y: tokensByLayer(method), name: plain(method), mode: "lines+markers", line: { color: COLOURS[i % 8], width: method === "tappa" ? 4 : 2 } })),
        { height: 340, title: title(`Tokens kept by layer, at ${data.views.budget} for each head on average`), xaxis: { title: { text: "layer" } }, legend: LEGEND });
    const pruning = (data.results["pruning.json"] || [])[0];
    $("blocks").hidden = !(pruning && Array.isArray(pruning.content.layers));
    if (!$("blocks").hidden) {
      const rows = pruning.content.layers;
      draw("blocks", [["bi", "BI"], ["bi_prime", "BI′"]].map(([key, words], i) => ({ x: rows.map((r) => r.layer), y: rows.map((r) => r[key]), name: words, mode: "lines+markers", line: { color: COLOURS[i] } })),
        { height: 320, title: title(`Block influence (${pruning.name}); shaded: removed`), xaxis: { title: { text: "layer" } }, yaxis: { type: "log" },
          shapes: rows.filter((r) => r.removed).map((r) => ({ type: "rect", x0: r.layer - 0.5, x1: r.layer + 0.5, yref: "paper", y0: 0, y1: 1, fillcolor: "#999", opacity: 0.3, line: { width: 0 } })) });
    }
    const verified = (data.results["verification.json"] || []).find((x) => Array.isArray(x.content.needs) && x.content.needs.length);
    $("needs").hidden = !verified;
    if (verified) {
      const needs = verified.content.needs;
      draw("needs", [{ x: needs.map((n) => n.dissimilarity), y: needs.map((n) => n.kl), text: needs.map((n) => `layer ${n.layer}`), mode: "markers", marker: { color: COLOURS[0], size: 9 } }],
        { height: 340, title: title(`Who needs tokens (${verified.name})`), xaxis: { title: { text: "1 − S of the layer" } }, yaxis: { type: "log", title: { text: "KL when it alone keeps 64 tokens" } } });
    }
    $("compare").hidden = data.analyses.length < 2;
    if (data.analyses.length > 1)
      draw("compare", data.analyses.map((analysis, i) => ({ y: byLayer(analysis, "q_similarity"), name: plain(`${analysis.title} (${analysis.file})`), mode: "lines+markers", line: { color: COLOURS[i % 8] } })),
        { height: 340, title: title("q-similarity of all analyses"), xaxis: { title: { text: "layer" } }, legend: LEGEND });
    const confusion = current().agreement.confusion, table = $("confusion");
    table.replaceChildren();
    if (confusion) {
      table.append(element("caption", "Observed (rows) and explained (columns)"));
      const head = element("tr");
      head.append(element("td", ""), ...data.labels.map((label) => element("th", label, { scope: "col" })));
      table.append(head);
      for (const label of data.labels) {
        const row = element("tr");
        row.append(element("th", label, { scope: "row" }), ...data.labels.map((other) => element("td", number((confusion[label] || {})[other] ?? 0), { class: "n" })));
        table.append(row);
      }
    }
  };

  // ---- results
  const tableOf = (columns, rows, caption) => {
    const box = element("div", undefined, { class: "scroll" }), table = element("table"), head = element("tr");
    if (caption) table.append(element("caption", caption));
    head.append(...columns.map((c) => element("th", c, { scope: "col" })));
    table.append(head);
    for (const cells of rows) { const row = element("tr"); row.append(...cells.map((c) => element("td", number(c), typeof c === "number" ? { class: "n" } : {}))); table.append(row); }
    box.append(table);
    return box;
  };
  const drawResults = () => {
    const box = $("results");
    $("results-part").hidden = false; // a hidden plot does not know its width
    let count = 0;
    for (const { name: from, content } of data.results["results.json"] || []) {
      const tables = Array.isArray(content.tables) ? content.tables : [];
      if (!tables.length) continue;
      const part = element("div"), pick = element("select", undefined, { "aria-label": `Table of ${from}` }), plot = element("div", undefined, { class: "plot wide", id: `quality-${count++}` });
      part.append(element("h3", from), pick, plot);
      box.append(part);
      tables.forEach((table, i) => pick.append(element("option", table.name, { value: i })));
      pick.value = String(tables.length - 1);
      const show = () => {
        const table = tables[+pick.value], methods = [...new Set(table.rows.map((r) => r.method))];
        const full = table.rows.find((r) => r.budget === null);
        const traces = methods.filter((m) => table.rows.some((r) => r.method === m && r.budget !== null)).map((method, i) => {
          const rows = table.rows.filter((r) => r.method === method);
          return { x: rows.map((r) => r.budget), y: rows.map((r) => r.mean), name: plain(method), mode: "lines+markers", line: { color: COLOURS[i % 8], dash: i < 8 ? "solid" : "dot", width: method === "tappa" ? 4 : 2 },
            error_y: { type: "data", array: rows.map((r) => 1.96 * (r.error ?? 0)), thickness: 1 } };
        });
        draw(plot.id, traces, { height: 420, title: title(`${table.name}: ${table.metric}${table.lower_is_better ? " (less is better)" : ""}, n = ${table.rows[0].n}, 95% intervals`), legend: LEGEND,
          xaxis: { title: { text: "tokens kept per layer and KV head" }, type: "log", tickvals: [...new Set(table.rows.map((r) => r.budget).filter(Boolean))], ticktext: [...new Set(table.rows.map((r) => r.budget).filter(Boolean))].map(String) },
          shapes: full && !table.lower_is_better ? [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: full.mean, y1: full.mean, line: { dash: "dash", color: "#999" } }] : [] });
      };
      pick.addEventListener("change", show);
      show();
    }
    for (const { name: from, content } of data.results["pruning.json"] || []) {
      if (!content.before || !content.after) continue;
      const rows = ["parameters", "nbytes", "tokens_per_second", "perplexity"].map((key) => [key, content.before[key], content.after[key]]);
      box.append(element("h3", from), tableOf(["", "before", "after"], rows, "Pruning"));
    }
    for (const { name: from, content } of data.results["verification.json"] || []) {
      box.append(element("h3", from));
      const bounds = Array.isArray(content.bounds) ? content.bounds : [], moved = Array.isArray(content.relocations) ? content.relocations : [];
      if (bounds.length) box.append(tableOf(["bound", "checked", "violations", "median bound / actual", "verdict"], bounds.map((b) => [b.name, b.checked, b.violations, b.tightness, b.verdict]), "Bounds"));
      if (moved.length) box.append(tableOf(["head", "channel", "base ×", "predicted", "measured", "error", "verdict"],
        moved.map((m) => [`L${m.layer} H${m.head}`, `${m.source} → ${m.target}`, m.base_factor, m.predicted, m.measured, m.error, m.verdict]), "Channels moved: tokens between diagonals"));
    }
    $("results-part").hidden = !box.childElementCount;
  };

  // ---- begin
  const option = (select, value, text) => $(select).append(element("option", text, { value }));
  const refresh = () => {
    const analysis = current();
    const tokens = analysis.prompts.reduce((a, b) => a + b, 0);
    $("summary").textContent = `${analysis.model.class || "?"}, ${number(analysis.model.layers)} layers, ${number(analysis.heads.length)} heads, ${number(tokens)} tokens in ${analysis.prompts.length} prompt(s); ` +
      `${number(analysis.bound_violations)} violations of the bounds in ${number(analysis.bounds_checked)} checks`;
    drawAtlas(); drawList(); drawCard(); drawModel(); shade();
  };
  data.analyses.forEach((analysis, i) => option("analysis", i, `${analysis.title} (${analysis.file})`));
  for (const [key, words] of Object.entries(data.figures)) { option("colour", key, words); option("sort", key, words); }
  option("colour", "observed", "observed label"); option("colour", "explained", "explained label"); option("colour", "disagree", "where labels disagree");
  for (const method of data.views ? data.views.methods : []) option("colour", `kept:${method}`, `tokens kept by ${method}`);
  $("sort").prepend(element("option", "by layer", { value: "" }));
  $("sort").value = "";
  option("label", "", "all"); data.labels.forEach((label) => option("label", label, label));
  if (data.notes.length) {
    $("notes").hidden = false;
    $("notes").querySelector("summary").textContent = `${data.notes.length} note(s) on what is missing`;
    data.notes.forEach((note) => $("notes").querySelector("ul").append(element("li", note)));
  }
  writeText();
  if (data.analyses.length) {
    for (const key of ["colour", "label", "sort"]) $(key).addEventListener("change", () => { state[key] = $(key).value; drawAtlas(); drawList(); });
    $("find").addEventListener("input", () => {
      state.find = $("find").value;
      const found = current().heads.map((h, i) => i).filter((i) => matches(current().heads[i]));
      if (found.length === 1) choose(found[0]); else { drawAtlas(); drawList(); }
    });
    $("analysis").addEventListener("change", () => { state.analysis = +$("analysis").value; state.head = -1; refresh(); });
    $("log").addEventListener("change", drawMap);
    refresh();
    if (current().heads.length) {
      $("atlas").on("plotly_click", (event) => { const { x, y } = event.points[0]; const index = indexAt(y, x); if (index >= 0) choose(index); });
      $("atlas").addEventListener("keydown", (event) => {
        const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
        if (!step) return;
        event.preventDefault();
        const head = current().heads[state.head] || { layer: -step[0], head: -step[1] };
        const index = indexAt(head.layer + step[0], head.head + step[1]);
        if (index >= 0) choose(index);
      });
      const asked = /^#L(\d+)H(\d+)$/.exec(location.hash);
      if (asked && indexAt(+asked[1], +asked[2]) >= 0) choose(indexAt(+asked[1], +asked[2]));
    }
  }
  drawResults();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => data.analyses.length && refresh());
  document.documentElement.dataset.ready = "1";
})();
