// The text itself, and what happened to each token in each layer.

const FATES = {
  "=": ["", "as the gate chose"],
  "~": ["moved", "got another expert, all slots filled"],
  "-": ["lost", "lost a slot"],
  x: ["none", "got no expert"],
};
const WORSE = "=~-x";

/** A letter of `misses` as a number. */
const missesOf = (letter) => Math.max(parseInt(letter ?? "0", 36) || 0, 0);

function words() {
  const text = report.text;
  const runs = list(report.runs).filter((run) => list(run.words).length > 0);
  if (!text || list(text.tokens).length === 0) return null;
  const state = { run: hardest(runs), layer: 0, mode: "fate" };
  if (state.run && !hasFates(state.run) && hasMisses(state.run)) state.mode = "misses";
  const [holder, legendHolder] = [el("div"), el("div")];
  const tokens = text.tokens.map((token, index) => tokenElement(token, index, text));
  const body = el("div", { class: "words", tabindex: "0", role: "group", "aria-label": "the text: arrow keys walk over its tokens" }, sequencesOf(text, tokens));
  holder.append(body);
  const paint = () => {
    if (!state.run) return;
    tokens.forEach((token, index) => token.setAttribute("class", ["t", classOf(state, index), isNumber(text.new_from) && index >= text.new_from ? "new" : ""].filter(Boolean).join(" ")));
    legendHolder.replaceChildren(wordKeys(state, tokens.length));
  };
  paint();
  hovered(body, tokens, (index) => tokenWords(state, text, index));
  const set = (key) => (value) => { state[key] = value; paint(); };
  const controls = state.run ? [
    choose("words-router", "Router", runOptions(runs), state.run, set("run")),
    choose("words-layer", "Layer", layerOptions(state.run.words.length, true), state.layer, set("layer")),
    runs.some(hasMisses) ? choose("words-mode", "Colour", [["fate", "experts"], ["misses", "cache misses"]], state.mode, set("mode")) : null,
  ] : [];
  const shown = isNumber(text.total) && text.total > tokens.length ? ` ${format.count(tokens.length)} of ${format.count(text.total)} tokens are shown.` : "";
  const made = figure("words", "Token by token", `Hover over a token, or walk with the arrow keys, to see its experts.${shown}`, controls, holder, legendHolder);
  made.classList.add("wide", "long");
  return section("words", "Text", "The text, and what happened to it", "Each token asks its experts in every layer. With all layers chosen, the colour is the worst that happened in any of them.", panels(made));
}

const hasMisses = (run) => list(run.words).some((layer) => layer.misses);
const hasFates = (run) => list(run.words).some((layer) => /[^=]/.test(layer.fate ?? ""));

/** A token as text; what cannot be seen has a sign. */
function tokenElement(token, index, text) {
  const visible = token.replace(/\t/g, "→\t").replace(/\n/g, "↵\n");
  const parts = visible.split(/([→↵]\s|\ufffd)/).filter((part) => part !== "").map((part) => (/^[→↵]/.test(part) ? [el("span", { class: "sign" }, part[0]), part.slice(1)] : part));
  return el("span", { class: "t", "data-token": index }, parts.length ? parts : el("span", { class: "sign" }, "·"));
}

/** Tokens under the name of the text that each sequence is of. */
function sequencesOf(text, tokens) {
  const starts = list(text.sequences).length ? text.sequences : [0];
  return starts.map((start, index) => {
    const name = list(text.kinds)[index] ?? "";
    const number = starts.length > 1 ? ` · sequence ${index + 1}` : "";
    return [el("h4", null, `${name}${number}`), el("div", { class: "run" }, tokens.slice(start, starts[index + 1] ?? tokens.length))];
  });
}

const layersOf = (state) => (state.layer < 0 ? state.run.words : [state.run.words[state.layer]].filter(Boolean));

/** The worst that happened to a token in the layers that are chosen. */
function fateOf(state, index) {
  return layersOf(state).reduce((worst, layer) => (WORSE.indexOf(layer.fate?.[index] ?? "=") > WORSE.indexOf(worst) ? layer.fate[index] : worst), "=");
}

/** Misses of a token a layer, on average over those chosen. */
function meanMisses(state, index) {
  const layers = layersOf(state).filter((layer) => layer.misses);
  return layers.length ? sum(layers.map((layer) => missesOf(layer.misses[index]))) / layers.length : null;
}

function classOf(state, index) {
  if (state.mode === "fate") return FATES[fateOf(state, index)][0];
  const level = missLevel(state, index);
  return level ? `m${level}` : "";
}

/** How many of a token's experts missed, in quarters of them, rounded up: 0 for none. */
const missLevel = (state, index) => Math.min(Math.ceil((4 * (meanMisses(state, index) ?? 0)) / (report.top_k || 1)), 4);

/** What colours mean, with how many tokens have each. */
function wordKeys(state, count) {
  const indices = Array.from({ length: count }, (_, index) => index);
  const share = (fits) => { const many = indices.filter(fits).length; return `${format.count(many)} tokens, ${format.percent(many / (count || 1))}`; };
  if (state.mode === "fate") {
    const fates = indices.map((index) => fateOf(state, index));
    const style = { "": "box-shadow:inset 0 0 0 1px var(--faint)", moved: "background:var(--moved);box-shadow:inset 0 -3px var(--moved-line)", lost: "background:var(--lost);box-shadow:inset 0 -3px var(--lost-line)", none: "background:var(--none)" };
    return keys(Object.entries(FATES).map(([letter, [name, words]]) => [style[name], `${words}: ${share((index) => fates[index] === letter)}`]));
  }
  const levels = indices.map((index) => missLevel(state, index));
  const style = ["box-shadow:inset 0 0 0 1px var(--faint)", "background:color-mix(in srgb,var(--lost) 40%,transparent)", "background:color-mix(in srgb,var(--lost) 75%,transparent)", "background:var(--lost);box-shadow:inset 0 -3px var(--lost-line)", "background:var(--lost-line)"];
  const label = ["no expert missed", "up to a quarter of its experts", "up to a half", "up to three quarters", "more"];
  return keys(style.map((one, level) => [one, `${label[level]}: ${share((index) => levels[index] === level)}`]));
}

/** What happened to a token, in words: its fate and its experts beside the gate's. */
function tokenWords(state, text, index) {
  const heading = `“${text.tokens[index].replace(/\n/g, "↵")}” · token ${index}`;
  if (!state.run) return [heading, []];
  const gate = list(report.runs)[0];
  const place = (run, layer) => expertsOf(run, layer, index);
  const layers = state.run.words.map((layer, number) => [layer, number]).filter(([, number]) => state.layer < 0 || number === state.layer);
  const pairs = layers.flatMap(([layer, number]) => {
    const own = place(state.run, number);
    const wanted = gate && gate !== state.run ? place(gate, number) : null;
    const misses = layer.misses ? [[`${layerName(number)} misses`, String(missesOf(layer.misses[index]))]] : [];
    if (state.layer < 0) return [[layerName(number), `${FATES[layer.fate?.[index] ?? "="][1]}${misses.length ? `, ${misses[0][1]} missed` : ""}`]];
    return [["fate", FATES[layer.fate?.[index] ?? "="][1]], ...(wanted ? [["the gate's choice", wanted]] : []), ["experts", own], ...misses];
  });
  return [heading, pairs];
}

function expertsOf(run, layer, index) {
  const all = list(run.words?.[layer]?.experts);
  const width = all.length / (list(report.text.tokens).length || 1);
  return all.slice(index * width, (index + 1) * width).map((expert) => (expert < 0 ? "dropped" : expert)).join(", ");
}

/** Words for a token under the mouse, a finger, or where the arrow keys are. */
function hovered(body, tokens, tell) {
  let at = -1;
  const mark = (index) => {
    if (at >= 0) tokens[at].classList.remove("at");
    at = index;
    if (at >= 0) tokens[at].classList.add("at");
  };
  const show = (event) => {
    const token = event.target.closest?.("[data-token]");
    if (!token) return hideTip();
    showTip(event.clientX, event.clientY, ...tell(Number(token.dataset.token)));
  };
  const walk = (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    mark(Math.min(Math.max(at + by, 0), tokens.length - 1));
    tokens[at].scrollIntoView({ block: "nearest" });
    const box = tokens[at].getBoundingClientRect();
    showTip(box.left + box.width / 2, box.bottom, ...tell(at));
  };
  for (const event of ["pointermove", "pointerdown"]) body.addEventListener(event, show);
  body.addEventListener("pointerleave", hideTip);
  body.addEventListener("keydown", walk);
  body.addEventListener("blur", () => { mark(-1); hideTip(); });
}
