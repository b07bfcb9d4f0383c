"use strict";
(() => {
const shared = JSON.parse(document.getElementById("models").textContent);
const lives = new Map(); // data of a card, read when it is first used
const chosen = new Map(); // of a card: where its patch is, as shares of the picture
const views = new Map(); // of a card: block, head and direction of its attention map
let uses = 0; // of names for elements

// ---- small tools ----

const SVG = "http://www.w3.org/2000/svg";
const SHAPES = new Set(["svg", "g", "rect", "path", "line", "circle", "text", "use"]);

/** An element with attributes and children; text stays text. */
function make(tag, attributes = {}, ...children) {
  const element = SHAPES.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}
const number = (value) => value === null ? "not finite" : String(value).replace("-", "\u2212");
const short = (value) => number(Number(value.toPrecision(3)));
const classOf = (model, index) => model.classes?.[index] ?? `class ${index}`;
const named = (text) => make("bdi", { title: text }, text);
const placeText = (r, c) => `row ${r + 1}, column ${c + 1}`;

function lifeOf(card) {
  if (!lives.has(card)) lives.set(card, JSON.parse(card.querySelector(".life-data").textContent));
  return lives.get(card);
}
const traceOf = (element) => Number(element.closest("[data-trace]").dataset.trace);
const cardOf = (element) => element.closest(".card");
function patchAt(trace, place) {
  const [rows, columns] = shared.models[trace].grid;
  return [Math.min(rows - 1, Math.floor(place.y * rows)), Math.min(columns - 1, Math.floor(place.x * columns))];
}
function placeOf(trace, r, c) {
  const [rows, columns] = shared.models[trace].grid;
  return { x: (c + 0.5) / columns, y: (r + 0.5) / rows };
}
function viridis(share) {
  const stops = shared.viridis, at = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(at), stops.length - 2), part = at - low;
  const mix = [1, 3, 5].map((k) => {
    const [a, b] = [low, low + 1].map((i) => parseInt(stops[i].slice(k, k + 2), 16));
    return Math.round(a + (b - a) * part);
  });
  return `rgb(${mix})`;
}

// ---- what happened to a patch ----

/** The stages that a patch came to: its place in their lists. */
function stagesOf(data, patch) {
  return data.stages.map((stage) => {
    const i = stage.position.indexOf(patch);
    return { stage, i, kept: i >= 0 && stage.kept[i] === "1" };
  });
}
function fate(stage, i, kept) {
  if (kept) return "stays";
  return stage.share === null ? "leaves" : `is fused, ${number(stage.share[i])} % of the weight`;
}
function scoreText(stage, i) {
  if (stage.score === null) return "not scored";
  const stay = [...stage.kept].filter((one) => one === "1").length;
  return `${stage.scored} ${number(stage.score[i])}, rank ${stage.rank[i] + 1} of ${stage.position.length}, ${stay} stay`;
}
/** A patch at one stage in one line; `k` 0 is the input. */
function lineOf(trace, data, r, c, k) {
  const patch = r * shared.models[trace].grid[1] + c;
  const steps = stagesOf(data, patch);
  if (k === 0) {
    const last = steps.find((step) => !step.kept);
    return `${placeText(r, c)}: ${last ? "leaves " + last.stage.title : "stays to the end"}`;
  }
  const step = steps[k - 1];
  if (!step) return placeText(r, c);
  if (step.i < 0) return `${placeText(r, c)}: left ${steps.find((one) => !one.kept).stage.title}`;
  return `${placeText(r, c)}, ${step.stage.title}: ${fate(step.stage, step.i, step.kept)}, ${scoreText(step.stage, step.i)}`;
}
function summaryOf(trace, data, steps) {
  const out = steps.find((step) => !step.kept), model = shared.models[trace];
  if (!steps.length) return "No patch leaves this model.";
  if (!out) return "Stayed to the end.";
  const { stage, i } = out, rank = stage.rank === null ? "" : `, at rank ${stage.rank[i] + 1} of ${stage.position.length}`;
  return `Left ${stage.title}${rank}. Alone it would have said ${classOf(model, stage.vote[i])} (${number(stage.voteShare[i])} %).`;
}

// ---- the grids: mouse and keyboard ----

function square(kind, r, c, more = {}) {
  return make("rect", { class: kind, x: c, y: r, width: 1, height: 1, ...more });
}
function moveCursor(grid, r, c) {
  const [rows, columns] = shared.models[traceOf(grid)].grid;
  r = Math.min(Math.max(r, 0), rows - 1);
  c = Math.min(Math.max(c, 0), columns - 1);
  const row = grid.querySelector(".row"), card = cardOf(grid), trace = traceOf(grid);
  const line = lineOf(trace, lifeOf(card)[trace], r, c, Number(grid.dataset.stage));
  const mine = chosen.get(card), picked = mine && patchAt(trace, mine).join() === [r, c].join();
  const cell = square("cursor", r, c, {
    id: `cell-${card.dataset.image}-${trace}-${grid.dataset.stage}-${r}-${c}`,
    role: "gridcell", "aria-colindex": c + 1, "aria-label": line, "aria-selected": Boolean(picked),
  });
  row.setAttribute("aria-rowindex", r + 1);
  row.replaceChildren(cell);
  grid.setAttribute("aria-activedescendant", cell.id);
  grid.dataset.cursor = `${r},${c}`;
  card.querySelector(".hover").textContent = line;
}
const cursorOf = (grid) => (grid.dataset.cursor ?? "0,0").split(",").map(Number);
function under(grid, event) {
  const box = grid.getBoundingClientRect();
  return patchAt(traceOf(grid), {
    x: Math.max(0, (event.clientX - box.left) / box.width),
    y: Math.max(0, (event.clientY - box.top) / box.height),
  });
}
function unhover(grid) {
  for (const old of grid.querySelectorAll(".over")) old.remove();
}
document.addEventListener("pointermove", (event) => {
  const grid = event.target.closest?.("svg.stage");
  if (!grid) return;
  const [r, c] = under(grid, event), trace = traceOf(grid), card = cardOf(grid);
  unhover(grid);
  grid.append(square("over", r, c));
  card.querySelector(".hover").textContent = lineOf(trace, lifeOf(card)[trace], r, c, Number(grid.dataset.stage));
});
document.addEventListener("pointerout", (event) => {
  const grid = event.target.closest?.("svg.stage");
  if (grid && !grid.contains(event.relatedTarget)) unhover(grid);
});
document.addEventListener("click", (event) => {
  const grid = event.target.closest?.("svg.stage");
  if (!grid) return;
  const [r, c] = under(grid, event);
  moveCursor(grid, r, c);
  choose(cardOf(grid), placeOf(traceOf(grid), r, c));
});
document.addEventListener("focusin", (event) => {
  if (event.target.matches?.("svg.stage")) moveCursor(event.target, ...cursorOf(event.target));
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    const card = cardOf(event.target);
    if (card && chosen.has(card)) close(card);
    return;
  }
  const grid = event.target;
  if (!grid.matches?.("svg.stage") || event.altKey || event.metaKey) return;
  const [r, c] = cursorOf(grid), [rows, columns] = shared.models[traceOf(grid)].grid;
  const moves = {
    ArrowUp: [r - 1, c], ArrowDown: [r + 1, c], ArrowLeft: [r, c - 1], ArrowRight: [r, c + 1],
    Home: [event.ctrlKey ? 0 : r, 0], End: [event.ctrlKey ? rows - 1 : r, columns - 1],
    PageUp: [0, c], PageDown: [rows - 1, c],
  };
  if (event.key in moves) moveCursor(grid, ...moves[event.key]);
  else if (event.key === "Enter" || event.key === " ") choose(cardOf(grid), placeOf(traceOf(grid), r, c));
  else return;
  event.preventDefault();
});

// ---- choosing a patch ----

function choose(card, place) {
  chosen.set(card, place);
  mark(card);
  show(card);
}
function close(card) {
  const inside = card.querySelector(".life").contains(document.activeElement);
  chosen.delete(card);
  mark(card);
  const panel = card.querySelector(".life");
  panel.hidden = true;
  panel.replaceChildren();
  card.querySelector(".said").textContent = "closed";
  if (inside) card.querySelector("section:not([hidden]) svg.stage").focus();
}
function mark(card) {
  const place = chosen.get(card);
  for (const grid of card.querySelectorAll("svg.stage")) {
    for (const old of grid.querySelectorAll(".chosen, .chosen-edge")) old.remove();
    if (!place) continue;
    const [r, c] = patchAt(traceOf(grid), place);
    grid.insertBefore(square("chosen-edge", r, c), grid.querySelector(".row"));
    grid.insertBefore(square("chosen", r, c), grid.querySelector(".row"));
    if (grid.dataset.cursor) grid.querySelector(".cursor").setAttribute("aria-selected", cursorOf(grid).join() === [r, c].join());
  }
}
function show(card) {
  const place = chosen.get(card), panel = card.querySelector(".life");
  const shown = [...card.querySelectorAll(".side:not([hidden])")].map((side) => Number(side.dataset.trace));
  const [r, c] = patchAt(shown[0], place), data = lifeOf(card);
  const lines = shown.map((trace) => summaryOf(trace, data[trace], stagesOf(data[trace], patchNumber(trace, place))));
  const button = make("button", { type: "button" }, "Close");
  button.addEventListener("click", () => close(card));
  const title = `Life of patch (${placeText(r, c)})`;
  panel.replaceChildren(
    make("div", { class: "life-head" }, closeUp(card, shown[0], r, c),
      make("div", {}, make("h4", {}, title), make("p", {}, shown.length === 1 ? lines[0] : "In each model:")), button),
    make("div", { class: "lives", "data-count": shown.length },
      shown.map((trace, k) => lifeSection(card, trace, place, shown.length > 1 ? lines[k] : null))),
  );
  panel.hidden = false;
  card.querySelector(".said").textContent = `${title}. ${lines.join(" ")}`;
}
function patchNumber(trace, place) {
  const [r, c] = patchAt(trace, place);
  return r * shared.models[trace].grid[1] + c;
}
function pictureOf(card, trace) {
  const href = card.querySelector(`.side[data-trace="${trace}"] svg.stage > use`).getAttribute("href");
  const [rows, columns] = shared.models[trace].grid;
  return make("use", { href, transform: `scale(${columns} ${rows})` });
}
function closeUp(card, trace, r, c) {
  return make("svg", { viewBox: `${c - 1} ${r - 1} 3 3`, role: "img", "aria-label": "the patch and its neighbours" },
    pictureOf(card, trace), square("chosen-edge", r, c), square("chosen", r, c));
}

// ---- the panel ----

function lifeSection(card, trace, place, line) {
  const data = lifeOf(card)[trace], model = shared.models[trace], patch = patchNumber(trace, place);
  const section = make("section", { "data-trace": trace });
  if (line !== null) {
    section.append(make("h4", { class: "model-title" }, named(model.title)), make("p", { class: "remark" }, line));
  }
  const steps = stagesOf(data, patch);
  const largest = Math.max(1e-9, ...steps.flatMap(({ stage, i }) =>
    i < 0 ? [] : Object.values(stage.effect).map((effect) => Math.abs(effect[i] ?? 0))));
  section.append(make("div", { class: "decisions" }, steps.map((step) => decision(model, step, largest))));
  const lower = make("div", { class: "lower" });
  const counted = data.blocks.filter((block) => block.statistics);
  const mapped = data.blocks.filter((block) => block.attention);
  if (counted.length) lower.append(make("div", {}, make("h4", {}, "Its attention, block by block"), statistics(model, data, counted, patch)));
  if (mapped.length) lower.append(make("div", {}, make("h4", {}, "Attention"), attention(card, trace, data, mapped, patch)));
  lower.classList.toggle("single", lower.children.length === 1);
  section.append(lower);
  return section;
}

function decision(model, { stage, i, kept }, largest) {
  const box = make("div", { class: "decision" });
  box.style.setProperty("--stage", stage.colour);
  const title = stage.title[0].toUpperCase() + stage.title.slice(1);
  if (i < 0) {
    box.append(make("h5", {}, title), make("p", { class: "absent" }, "It had left."));
    return box;
  }
  const word = kept ? "✓ stays" : stage.share === null ? "✕ leaves" : "⊕ fused";
  box.append(make("h5", {}, title, make("span", { class: kept ? "stays" : "left" }, word)));
  if (!kept && stage.share !== null) box.append(make("p", {}, `with ${number(stage.share[i])} % of the fused token's weight`));
  if (stage.score === null) box.append(make("p", {}, "Chance decided: nothing scored it."));
  else {
    const stay = [...stage.kept].filter((one) => one === "1").length;
    box.append(
      make("p", {}, `${stage.scored} `, make("b", {}, number(stage.score[i]))),
      make("p", {}, "rank ", make("b", {}, String(stage.rank[i] + 1)), ` of ${stage.position.length}, ${stay} stay` +
        (stage.cut === null ? "" : `; cut at ${number(stage.cut)}`)),
      scoreStrip(stage, i));
  }
  const effects = Object.entries(stage.effect);
  if (effects.length) {
    box.append(make("dl", { class: "effects" }, effects.flatMap(([group, effect]) => {
      const value = effect[i] ?? 0, width = 48 * Math.abs(value) / largest;
      return [make("dt", {}, group),
        make("dd", {}, make("svg", { viewBox: "-50 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" },
          make("line", { x1: 0, x2: 0, y1: 0, y2: 8, class: "tick", "vector-effect": "non-scaling-stroke" }),
          make("rect", { class: value < 0 ? "minus" : "plus", x: value < 0 ? -width : 0, y: 1, width, height: 6 }))),
        make("dd", {}, (value > 0 ? "+" : "") + number(effect[i]))];
    })));
  }
  box.append(make("p", { class: "vote" }, "Alone it says ", named(classOf(model, stage.vote[i])), `, ${number(stage.voteShare[i])} %`));
  return box;
}

/** Scores of a stage as a small histogram, its cut, and where this patch is. */
function scoreStrip(stage, i) {
  const scores = stage.score.filter((one) => one !== null), bins = 36, width = 180;
  const low = Math.min(...scores), spread = Math.max(...scores) - low || 1;
  const place = (score) => width * (score - low) / spread;
  const count = Array.from({ length: bins }, () => [0, 0]);
  stage.score.forEach((score, k) => {
    if (score !== null) count[Math.min(bins - 1, Math.floor(bins * (score - low) / spread))][Number(stage.kept[k])] += 1;
  });
  const most = Math.max(...count.map(([left, stayed]) => left + stayed)), svg = make("svg", { viewBox: "-5 0 190 42", "aria-hidden": "true" });
  count.forEach(([left, stayed], k) => {
    const [a, b] = [stayed, left].map((one) => 30 * one / most), x = k * width / bins + 0.5, w = width / bins - 1;
    if (stayed) svg.append(make("rect", { class: "stayed", x, y: 32 - a, width: w, height: a }));
    if (left) svg.append(make("rect", { class: "left", x, y: 32 - a - b, width: w, height: b }));
  });
  if (stage.cut !== null) svg.append(make("path", { class: "mean cut", d: `M${place(stage.cut)} 0v34` }));
  if (stage.score[i] !== null) svg.append(make("path", { class: "mark", d: `M${place(stage.score[i])} 34l4 7h-8z` }));
  return svg;
}

/** Statistic values of a patch: [statistic][head] over blocks that saw it. */
function series(block, heads, patch) {
  const i = block.position.indexOf(patch), { bytes, low, high } = block.statistics;
  if (i < 0) return null;
  block.unpacked ??= Uint8Array.from(atob(bytes), (one) => one.charCodeAt(0));
  const n = block.position.length;
  return shared.statistics.map((_, s) => Array.from({ length: heads }, (_, h) => {
    const at = s * heads + h, byte = block.unpacked[at * n + i] / 255;
    return low[at] + (high[at] - low[at]) * byte * byte;
  }));
}
function statistics(model, data, blocks, patch) {
  const heads = blocks[0].statistics.low.length / shared.statistics.length;
  const points = blocks.map((block) => ({ block: block.block, values: series(block, heads, patch) })).filter((one) => one.values);
  if (!points.length) return make("p", { class: "absent" }, "It had left before the first block that counts.");
  const last = Math.max(model.depth - 1, 1), x = (block) => 4 + 152 * block / last;
  return make("div", { class: "statistics" }, shared.statistics.map((title, s) => {
    const all = points.flatMap((one) => one.values[s]), most = Math.max(...all, 1e-12);
    const y = (value) => 58 - 46 * value / most;
    const line = (pick) => points.map((one, k) => `${k ? "L" : "M"}${x(one.block).toFixed(1)} ${y(pick(one.values[s])).toFixed(1)}`).join("");
    const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
    const end = points[points.length - 1], means = points.map((one) => mean(one.values[s]));
    const svg = make("svg", { viewBox: "0 -4 160 77", role: "img", "aria-label":
        `${title}, mean over heads: ${points.map((one, k) => `block ${one.block} ${short(means[k])}`).join(", ")}` },
      make("path", { class: "rule", d: "M4 58.5H156" }),
      data.stages.map((stage) => make("line", { class: "tick", x1: x(stage.block), x2: x(stage.block), y1: 8, y2: 58, "stroke-dasharray": "2 2" })),
      Array.from({ length: heads }, (_, h) => make("path", { class: "head-line", d: line((values) => values[h]) })),
      make("path", { class: "mean-line", d: line(mean) }),
      make("circle", { class: "mean-dot", cx: x(end.block), cy: y(means[means.length - 1]), r: 2.8 }),
      make("text", { x: 4, y: 70 }, "0"), make("text", { x: 156, y: 70, "text-anchor": "end" }, `block ${last}`),
      make("text", { x: 156, y: 6, "text-anchor": "end" }, short(most)));
    return make("figure", {}, make("figcaption", {}, title), svg);
  }));
}

// ---- attention ----

/** Attention maps of a block as numbers: pixels of its picture, decoded once. */
function weights(block) {
  block.decoded ??= (async () => {
    const image = new Image();
    image.src = block.attention.picture;
    await image.decode();
    const canvas = make("canvas", { width: image.width, height: image.height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    return { width: image.width, side: image.height, pixels: context.getImageData(0, 0, image.width, image.height).data };
  })();
  return block.decoded;
}
function weightAt({ width, side, pixels }, largest, head, query, key) {
  const share = pixels[4 * (query * width + head * side + key)] / shared.levels;
  return largest[head] * share * share;
}
function attention(card, trace, data, blocks, patch) {
  const model = shared.models[trace], id = `attention-${uses++}`;
  const alive = blocks.filter((block) => block.position.includes(patch));
  if (!alive.length) return make("p", { class: "absent" }, "It had left before the first block whose map is here.");
  const view = views.get(card) ?? views.set(card, { head: -1, incoming: false }).get(card);
  const select = (label, options, value, set) => {
    const box = make("select", {}, options.map(([key, text, off]) => make("option", { value: key, disabled: off ? "" : null }, text)));
    box.value = String(value);
    box.addEventListener("change", () => { set(box.value); draw(); });
    return make("label", {}, label, box);
  };
  const starting = alive.find((block) => block.block === view.block) ?? alive[alive.length - 1];
  let block = starting;
  const heads = starting.attention.largest.length, out = make("div", { class: "attention", id, "aria-live": "polite" });
  if (view.head >= heads) view.head = -1;
  const controls = make("div", { class: "controls" },
    select("block", blocks.map((one) => [one.block, alive.includes(one) ? String(one.block) : `${one.block}, it had left`, !alive.includes(one)]),
      block.block, (value) => { view.block = Number(value); block = blocks.find((one) => one.block === view.block); }),
    select("head", [[-1, "mean"], ...Array.from({ length: heads }, (_, h) => [h, String(h)])], view.head, (value) => { view.head = Number(value); }),
    select("", [["0", "what it attends to"], ["1", "who attends to it"]], Number(view.incoming), (value) => { view.incoming = value === "1"; }));
  controls.lastChild.lastChild.setAttribute("aria-label", "direction");
  let drawn = 0;
  async function draw() {
    const mine = ++drawn, map = await weights(block);
    if (mine !== drawn) return; // another choice came meanwhile
    out.replaceChildren(...attentionMap(card, trace, model, block, map, patch, view));
  }
  draw();
  return make("div", {}, controls, out);
}
function attentionMap(card, trace, model, block, map, patch, view) {
  const { largest } = block.attention, me = block.front + block.position.indexOf(patch);
  const heads = view.head < 0 ? largest.map((_, h) => h) : [view.head];
  const values = Array.from({ length: map.side }, (_, other) => heads.reduce((sum, h) =>
    sum + (view.incoming ? weightAt(map, largest, h, other, me) : weightAt(map, largest, h, me, other)), 0) / heads.length);
  const [rows, columns] = model.grid, most = Math.max(...values.slice(block.front), 1e-12);
  const svg = make("svg", { viewBox: `0 0 ${columns} ${rows}`, role: "img" }, pictureOf(card, trace),
    make("rect", { class: "grey", width: columns, height: rows }), make("rect", { width: columns, height: rows, "fill-opacity": 0.45 }));
  const where = (k) => [Math.floor(block.position[k] / columns), block.position[k] % columns];
  const outlines = [];
  block.position.forEach((position, k) => {
    if (position >= rows * columns) return;
    const [r, c] = where(k), value = values[block.front + k];
    svg.append(square("attended", r, c, { fill: viridis(Math.sqrt(value / most)) }));
    if (block.named && value > 0) outlines.push(square("named", r + 0.06, c + 0.06, { width: 0.88, height: 0.88 }));
  });
  svg.addEventListener("click", (event) => choose(card, placeOf(trace, ...under(svg, event))));
  const [r, c] = [Math.floor(patch / columns), patch % columns];
  svg.append(...outlines, square("chosen-edge", r, c), square("chosen", r, c));
  const tokens = values.map((value, k) => ({ value, text: k < block.front
    ? model.prefix[k] ? `${model.prefix[k]} token` : "fused token"
    : block.position[k - block.front] >= rows * columns ? "fused token" : placeText(...where(k - block.front)) + (k === me ? ", itself" : "") }));
  const top = tokens.map((token, k) => ({ ...token, k })).sort((a, b) => b.value - a.value)
    .filter((token, place) => token.k < block.front || place < 6).slice(0, 7);
  const percent = (value) => `≈ ${short(Number((100 * value).toPrecision(2)))} %`;
  const says = make("div", { class: "says" }, make("ul", {}, top.map((token) =>
    make("li", {}, make("span", {}, token.text), make("span", {}, percent(token.value))))));
  if (block.named) {
    const mean = (list) => short(heads.reduce((sum, h) => sum + list[h], 0) / heads.length);
    const at = block.position.indexOf(patch), all = `${block.position.length} patches here`;
    says.append(make("p", {}, view.incoming ? `${outlines.length} of ${all} see it (outlined).`
      : `It sees ${mean(block.named[at])} of ${all}${heads.length > 1 ? " on average over heads" : ""} (all that some head sees are outlined); with the tokens in front these hold ${mean(block.held[at])} % of its dense attention.`));
  }
  svg.setAttribute("aria-label", `${view.incoming ? "Who attends to it" : "What it attends to"}, most: ${top.slice(0, 3).map((token) => `${token.text} ${percent(token.value)}`).join("; ")}`);
  const scale = make("p", { class: "scale" }, ["0", make("i"), percent(most), "(square root)"].map((part) => typeof part === "string" ? make("span", {}, part) : part));
  return [make("div", {}, svg, scale), says];
}

// ---- filter and budgets ----

function filter() {
  const wanted = document.querySelector("input[name=filter]:checked").value;
  const cards = [...document.querySelectorAll(".card")];
  for (const card of cards) {
    card.hidden = wanted !== "all" && ![...card.querySelectorAll(".side:not([hidden])")].some((side) => side.dataset[wanted] === "1");
  }
  for (const group of document.querySelectorAll(".group")) {
    const count = group.querySelectorAll(".card:not([hidden])").length;
    group.hidden = count === 0;
    group.querySelector(".count").textContent = count;
  }
  const count = cards.filter((card) => !card.hidden).length;
  document.getElementById("shown").textContent = `${count} of ${cards.length}`;
}
for (const input of document.querySelectorAll("input[name=filter]")) input.addEventListener("change", filter);
const budget = document.getElementById("budget");
function setBudget() {
  const title = shared.models[budget.value].title;
  document.getElementById("budget-title").textContent = title;
  budget.setAttribute("aria-valuetext", title);
  for (const part of document.querySelectorAll("main [data-trace], header [data-trace]")) {
    if (!part.closest(".life")) part.hidden = part.dataset.trace !== budget.value;
  }
  for (const card of chosen.keys()) show(card);
  filter();
}
budget?.addEventListener("input", setBudget);
if (budget) setBudget();
filter();
})();
