// What every section stands on: the document, elements, numbers as text, colours, the one tooltip, switches.

const source = document.getElementById("document").textContent;
const report = JSON.parse(source);

/** A list that may be missing. */
const list = (value) => (Array.isArray(value) ? value : []);
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const sum = (values) => values.reduce((total, value) => total + value, 0);

/** An element; `attributes` are set as they are, strings become text, never HTML. */
function el(tag, attributes, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function svg(tag, attributes, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

// ---- numbers: one way each ----

const THIN = "\u202f";
const NONE = "–";
const or = (format) => (value) => (isNumber(value) ? format(value) : NONE);
const grouped = (text) => text.replace(/\B(?=(\d{3})+(?!\d))/g, THIN);
/** Digits after the point, with a true minus; no minus before nothing. */
const fixed = (value, digits) => value.toFixed(digits).replace(/^-(?=0\.?0*$)/, "").replace("-", "−");
const format = {
  count: or((value) => grouped(fixed(value, 0))),
  percent: or((value) => `${fixed(100 * value, 2)}${THIN}%`),
  signed: or((value) => `${value < 0 ? "−" : "+"}${fixed(Math.abs(100 * value), 2)}${THIN}%`),
  times: or((value) => `${fixed(value, 2)}${THIN}×`),
  perplexity: or((value) => fixed(value, 3)),
  ratio: or((value) => fixed(value, 3)),
  score: or((value) => (value === 0 ? "0" : value.toPrecision(3).replace("-", "−"))),
  mass: or((value) => grouped(fixed(value, 1))),
  nanos: or((value) => `${grouped(fixed(value, 0))}${THIN}ns`),
  rate: or((value) => grouped(fixed(value, 0))),
  bytes: or((value) => {
    const unit = [[1e9, "GB"], [1e6, "MB"], [1e3, "KB"]].find(([size]) => Math.abs(value) >= size);
    return unit ? `${fixed(value / unit[0], 1)}${THIN}${unit[1]}` : `${fixed(value, 0)}${THIN}B`;
  }),
  factor: or((value) => (Number.isInteger(value) ? fixed(value, 1) : format.plain(value))),
  plain: or((value) => String(Number(value.toPrecision(6))).replace("-", "−")),
};

/** The same at an axis, whose steps are round: no digits that say nothing. */
const ticks = new Map([
  [format.percent, (value) => `${format.plain(100 * value)}${THIN}%`], [format.perplexity, format.plain],
]);
const atAxis = (shape) => ticks.get(shape) ?? shape;

// ---- colours: the style sheet's, as they are now ----

const probe = el("span", { hidden: true });

/** A colour of the style sheet as a canvas takes it. */
function colour(name) {
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}

/** How a router is drawn, the same everywhere: colour, dashes where two share one. */
const ROUTERS = {
  "top-k": ["--plain", [2, 3]],
  "top-k-arrival": ["--arrival", []],
  "top-k-score": ["--score", []],
  "expanded-drop": ["--drop", []],
  hash: ["--hash", []],
  "weighted-hash": ["--hash", [6, 4]],
  "phase-kernel": ["--quota", [6, 4]],
  quota: ["--quota", []],
  phase: ["--phase", []],
  "expert-choice": ["--choice", []],
  sinkhorn: ["--score", [6, 4]],
  auction: ["--drop", [6, 4]],
  cache: ["--choice", [6, 4]],
  "cache+phase": ["--phase", [6, 4]],
};
const styleOf = (router) => {
  const [name, dash] = ROUTERS[router] ?? ["--plain", []];
  return { name, dash, width: router === "phase" ? 3 : 1.8 };
};

/** Colours from nothing to much; the other from too little over just right (1) to too much. */
const RAMPS = {
  light: ["#f4f2ec", "#cfe2e3", "#8fc0cb", "#4590ac", "#1e5f8b", "#123560"],
  dark: ["#1b242e", "#1c3f5b", "#246a8c", "#4a9bb0", "#9ccfc6", "#f4f6dc"],
  around: { light: ["#2a6da8", "#9cc3e0", "#f4f2ec", "#f0b184", "#b2480a"], dark: ["#5fb0ee", "#2b5c85", "#232c36", "#8a4c20", "#ff9a57"] },
};
const isDark = () => getComputedStyle(document.documentElement).colorScheme === "dark"
  || (getComputedStyle(document.documentElement).colorScheme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);

/** The colour of a share of a ramp, from 0 to 1. */
function shade(stops, share) {
  const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const left = Math.min(Math.floor(at), stops.length - 2);
  const part = (hex, channel) => parseInt(hex.slice(1 + 2 * channel, 3 + 2 * channel), 16);
  const mix = (channel) => Math.round(part(stops[left], channel) * (left + 1 - at) + part(stops[left + 1], channel) * (at - left));
  return `rgb(${mix(0)} ${mix(1)} ${mix(2)})`;
}

/** What draws on a canvas and has to do so again when colours change. */
const redrawn = [];
const onColours = (draw) => redrawn.push(draw);
const redraw = () => redrawn.forEach((draw) => draw());

// ---- the tooltip ----

const tip = el("div", { class: "tip", role: "status", "aria-live": "polite" });

/** Shows words at a place of the window: a heading, then pairs of name and value, each with a colour where it has one. */
function showTip(x, y, heading, pairs) {
  const names = pairs.map(([name, value, mark]) => [
    el("dt", null, mark ? el("i", { class: "swatch", style: `background:${mark}` }) : null, name), el("dd", null, value),
  ]);
  tip.replaceChildren(el("b", null, heading), el("dl", null, names));
  tip.classList.add("shown");
  const { width, height } = tip.getBoundingClientRect();
  const left = x + 14 + width > innerWidth ? x - 14 - width : x + 14;
  const top = y + 18 + height > innerHeight ? y - 14 - height : y + 18;
  tip.style.left = `${Math.min(Math.max(left, 6), Math.max(innerWidth - width - 6, 6))}px`;
  tip.style.top = `${Math.max(top, 6)}px`;
}

const hideTip = () => tip.classList.remove("shown");

/** Gives an element words of its own: for a mouse, a finger and the keyboard. */
function explained(element, heading, pairs) {
  const show = (event) => {
    const box = element.getBoundingClientRect();
    const pointer = event.type.startsWith("pointer");
    showTip(pointer ? event.clientX : box.left + box.width / 2, pointer ? event.clientY : box.top + box.height / 2, heading, pairs);
  };
  element.setAttribute("tabindex", "0");
  element.setAttribute("aria-label", [heading, ...pairs.map(([name, value]) => `${name} ${value}`)].join(", "));
  for (const event of ["pointermove", "pointerdown", "focus"]) element.addEventListener(event, show);
  for (const event of ["pointerleave", "blur"]) element.addEventListener(event, hideTip);
  return element;
}

// ---- switches ----

let switches = 0;

/** A choice between `options`, pairs of value and label; nothing where there is no choice. */
function choose(name, label, options, value, change) {
  if (options.length < 2) return null;
  const letters = sum(options.map(([, words]) => words.length + 3));
  return letters <= 48 ? segments(name, label, options, value, change) : selection(name, label, options, value, change);
}

function segments(name, label, options, value, change) {
  const group = `${name}-${switches++}`;
  const radio = ([option, words]) => el("label", null,
    el("input", { type: "radio", name: group, checked: option === value, change: () => change(option) }), el("span", null, words));
  return el("fieldset", { class: "switch", "data-switch": name },
    el("legend", { class: "hidden" }, label), el("span", { "aria-hidden": "true" }, label), el("span", { class: "segments" }, options.map(radio)));
}

function selection(name, label, options, value, change) {
  const entry = ([option, words], index) => el("option", { value: index, selected: option === value }, words);
  const select = el("select", { change: () => change(options[select.value][0]) }, options.map(entry));
  return el("label", { class: "switch", "data-switch": name }, label, select);
}

/** The MoE layers to choose from, by their place in the lists. */
const layerName = (index) => `layer ${list(report.layers)[index] ?? index}`;
const layerOptions = (count, all) =>
  [...(all ? [[-1, "all"]] : []), ...Array.from({ length: count }, (_, index) => [index, String(list(report.layers)[index] ?? index)])];

// ---- sections and figures ----

/** A part of the page; nothing where nothing is in it. `short` is its name in the list of contents. */
function section(id, short, title, words, ...children) {
  const there = children.flat().filter(Boolean);
  return there.length === 0 ? null
    : el("section", { id, "data-title": short }, el("h2", null, title), words ? el("p", null, words) : null, there);
}

/** Figures side by side where there is room; nothing where there are none. */
function panels(...figures) {
  const there = figures.filter(Boolean);
  return there.length ? el("div", { class: "panels" }, there) : null;
}

/** A drawing with its heading, a sentence about it and its switches. `name` is how tests find it. */
function figure(name, title, words, controls, drawing, ...below) {
  const switches = controls.filter(Boolean);
  return el("figure", null,
    el("figcaption", null, el("h3", null, title), words ? el("p", null, words) : null),
    switches.length ? el("div", { class: "controls" }, switches) : null,
    el("div", { class: "drawing", "data-plot": name }, drawing), below);
}

/** Derived numbers under a drawing, each with its words. */
const numbers = (pairs) => el("div", { class: "numbers" }, pairs.map(([value, words]) => el("div", null, el("b", null, value), el("span", null, words))));

/** What colours and signs stand for. */
const keys = (pairs) => el("ul", { class: "keys" }, pairs.map(([style, words]) => el("li", null, el("i", { class: "swatch", style }), words)));
