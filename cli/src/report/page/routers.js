// Routers side by side: survival, gate mass and perplexity against the room they had; prices and what the limit costs.

/** What the limit of a row or a run is, in words, but for its factor; null without one. */
function limitOf(row) {
  if (!isNumber(row.capacity_factor)) return null;
  const pool = isNumber(row.devices) ? `per ${row.devices} devices` : "per expert";
  const profile = row.profile && row.profile !== "uniform" ? `, profile ${row.profile}` : "";
  return pool + profile + (row.capacity_rule === "ceil" ? ", rounded up" : "");
}

/** Rows of `compare` by limit: { name, factors, routers }. */
function limitsOf(rows) {
  const limits = new Map();
  for (const row of rows) {
    const name = limitOf(row);
    if (name === null) continue;
    if (!limits.has(name)) limits.set(name, { name, rows: [] });
    limits.get(name).rows.push(row);
  }
  return [...limits.values()].map(({ name, rows }) => ({
    name, rows, factors: [...new Set(rows.map((row) => row.capacity_factor))].sort((a, b) => a - b),
    routers: [...new Set(rows.map((row) => row.router))],
  }));
}

const MEASURES = [
  { name: "survival", key: "survival", title: "Slots kept", words: "Of all token–expert places that the gate asked for.", format: format.percent, better: 1 },
  { name: "gate-mass", key: "gate_mass", title: "Gate mass kept", words: "Of what dropless top-k keeps: a slot with an expert that the gate did not want adds little.", format: format.percent, better: 1 },
  { name: "of-bound", key: "gate_mass_vs_bound", title: "Gate mass, of what is possible", words: "100 % is the certified upper bound: no router could keep more under the same limits.", format: format.percent, better: 1 },
  { name: "perplexity", key: "perplexity", title: "Perplexity", words: "How well the model predicts the text with this router in its layers; lower is better.", format: format.perplexity, better: -1, increase: true },
];

/** A router below this share of dropless top-k's gate mass chooses all but blindly: it would squeeze the others into a corner. */
const BLIND = 0.5;

function routers() {
  const limits = limitsOf(list(report.result?.rows).filter((row) => row.router));
  if (limits.length === 0) return null;
  const dropless = report.result.dropless?.perplexity;
  const holder = el("div", { class: "panels even" });
  const first = limits.reduce((most, limit) => (limit.factors.length > most.factors.length ? limit : most));
  const blind = (limit) => limit.routers.filter((router) => limit.rows.every((row) => row.router !== router || row.gate_mass < BLIND));
  const show = (limit) => {
    const off = new Set(blind(limit).length < limit.routers.length ? blind(limit) : []);
    const measures = MEASURES.filter((measure) => limit.rows.some((row) => isNumber(row[measure.key])));
    const views = [];
    const panel = limit.factors.length > 1 ? linePanel : dotPanel;
    const figures = measures.map((measure) => panel(limit, measure, dropless, off, views));
    const series = limit.routers.map((router) => ({ label: router, style: styleOf(router) }));
    holder.replaceChildren(el("div", { class: "wide" }, legend(series, off, () => views), off.size ? el("p", { class: "aside" }, offWords([...off])) : null), ...figures);
  };
  show(first);
  const pick = choose("limit", "Limits", limits.map((limit) => [limit, `${limit.name}${limit.factors.length === 1 ? `, factor ${format.factor(limit.factors[0])}` : ""}`]), first, show);
  return section("routers", "Routers", "Routers under a limit",
    "The capacity factor is the room over the demand: at 1.0 there is exactly one place for every slot, so a full expert or device must turn some away. The dotted line is the model without limits.",
    pick ? el("div", { class: "controls above" }, pick) : null, holder);
}

const offWords = (off) => `${off.join(", ")}: less than half of the gate mass at every factor, so switched off at first. Press a name to show or hide it.`;

function linePanel(limit, measure, dropless, off, views) {
  const holder = el("div");
  const valuesOf = (router) => limit.factors.map((factor) => {
    const row = limit.rows.find((row) => row.router === router && row.capacity_factor === factor);
    return isNumber(row?.[measure.key]) ? row[measure.key] : null;
  });
  const against = measure.increase && isNumber(dropless);
  const series = limit.routers.map((router) => {
    const values = valuesOf(router);
    const tell = (index) => `${measure.format(values[index])} (${format.signed(values[index] / dropless - 1)})`;
    return { label: router, style: styleOf(router), values, tell: against ? tell : null };
  }).filter((one) => one.values.some(isNumber));
  views.push(lines(holder, limit.factors, series, {
    name: measure.title, x: format.factor, y: measure.format, label: "capacity factor", off,
    marks: against ? [{ value: dropless, words: "dropless" }] : [], heading: (factor) => `capacity factor ${format.factor(factor)}` }));
  return figure(measure.name, measure.title, wordsOf(measure, limit), [], holder);
}

function dotPanel(limit, measure, dropless, off, views) {
  const holder = el("div");
  const rows = limit.rows.filter((row) => isNumber(row[measure.key])).sort((a, b) => measure.better * (b[measure.key] - a[measure.key]));
  const entryOf = (row) => ({
    label: row.router, mark: `var(${styleOf(row.router).name})`, value: row[measure.key], text: measure.format(row[measure.key]),
    heading: `${row.router}, ${limit.name}, factor ${format.factor(row.capacity_factor)}`,
    pairs: [[measure.title, measure.format(row[measure.key])], ...(measure.increase ? [["over dropless", format.signed(row.perplexity_increase)]] : [])] });
  const draw = () => {
    const entries = rows.filter((row) => !off.has(row.router)).map(entryOf);
    const values = entries.map((entry) => entry.value).concat(measure.increase && isNumber(dropless) ? [dropless] : []);
    holder.replaceChildren(dots(entries, ends(values), measure.format));
  };
  draw();
  views.push({ toggle: draw, stress: () => {} });
  return figure(measure.name, measure.title, wordsOf(measure, limit), [], holder);
}

const wordsOf = (measure, limit) =>
  measure.words + (measure.key === "survival" && limit.rows.some((row) => row.survival > 1) ? " Above 100 %: more than was asked for." : "");

// ---- prices, and what they cost ----

const isLimited = (run) => list(run.layers).some((layer) => list(layer.room).length > 0);
const poolWord = (run) => (isNumber(run.devices) ? "device" : "expert");
const runName = (run) => run.name ?? run.router ?? "router";
const runOptions = (runs) => runs.map((run) => [run, runName(run)]);

/** Slots of a layer per pool of its limit. */
function perPool(layer, slots) {
  const totals = list(layer.room).map(() => 0);
  list(layer.pool_of).forEach((pool, expert) => (totals[pool] += slots[expert] ?? 0));
  return totals;
}

function prices() {
  const runs = list(report.runs);
  const priced = runs.filter((run) => list(run.layers).some((layer) => list(layer.prices).length > 0));
  return section("prices", "Prices", "Prices, and what they cost",
    "Where an expert or a device is asked for more than it has room for, the phase router gives it a price, and each token takes the experts whose score less price is highest. The same prices prove how much any router could keep.",
    panels(priceFigure(priced), regretFigure(runs)));
}

function priceFigure(runs) {
  if (runs.length === 0) return null;
  const holder = el("div");
  let [run, layer] = [hardest(runs), 0];
  const show = () => {
    const of = run.layers[layer];
    const [demand, loads] = [perPool(of, of.demand), perPool(of, of.loads)];
    const load = of.room.map((room, pool) => demand[pool] / room);
    const word = poolWord(run);
    holder.replaceChildren(columns(of.room.length,
      { heading: "price, in units of gate score", format: format.score, values: list(of.prices), mark: () => "var(--phase)" },
      { heading: `what the gate asked of each ${word}, over its room`, format: format.times, values: load, line: 1, mark: (value) => (value > 1 ? "var(--arrival)" : "var(--hash)") },
      (pool) => [`${word} ${pool}, ${layerName(layer)}`, [["price", format.score(of.prices[pool])], ["asked for", `${format.count(demand[pool])} slots`], ["room", `${format.count(of.room[pool])} slots`], ["got", `${format.count(loads[pool])} slots`]]]));
  };
  show();
  return widened(figure("prices", "Price and demand", "A price is the score margin of the first token that found no room: zero where there is room to spare. A mean over the batches.",
    [choose("prices-router", "Router", runOptions(runs), run, (next) => { run = next; show(); }),
      choose("prices-layer", "Layer", layerOptions(run.layers.length), layer, (next) => { layer = next; show(); })], holder));
}

const widened = (element) => { element.classList.add("wide"); return element; };

const limitName = (run) => (isNumber(run.capacity_factor) ? `${format.factor(run.capacity_factor)} ${isNumber(run.devices) ? `per ${run.devices} devices` : "per expert"}` : runName(run));

/** The run to look at first: of phase, else of any router with a limit, where the limit costs most; else any. */
function hardest(runs) {
  const limited = runs.filter(isLimited);
  const phase = limited.filter((run) => run.router === "phase");
  const keeps = (run) => sum(run.layers.map((layer) => layer.kept_mass)) / (sum(run.layers.map((layer) => layer.top_k_mass)) || 1);
  const among = phase.length ? phase : limited;
  return among.length ? among.reduce((least, run) => (keeps(run) < keeps(least) ? run : least)) : runs[1] ?? runs[0];
}

/** What each run lost of the gate's mass: what no router could have kept, and the router's own regret. */
function regretFigure(runs) {
  const bounded = runs.filter((run) => isLimited(run) && run.layers.some((layer) => isNumber(layer.bound)));
  if (bounded.length === 0) return null;
  const layers = Math.max(...bounded.map((run) => run.layers.length));
  const limits = [...new Set(bounded.map(limitName))];
  const holder = el("div");
  let [limit, layer] = [limitName(hardest(bounded)), -1];
  const show = () => {
    const costs = bounded.filter((run) => limitName(run) === limit).map((run) => costOf(run, layer)).sort((a, b) => a.total - b.total);
    const most = Math.max(...costs.map((cost) => cost.total), 1e-9);
    holder.replaceChildren(el("div", { class: "dots" }, costs.map((cost) => costRow(cost, most))));
  };
  show();
  const marks = keys([["background:var(--hash)", "the limit itself: top-k mass − bound"], ["background:var(--arrival)", "regret: bound − kept mass"]]);
  return widened(figure("regret", "Gate mass lost: to the limit, and to the router",
    "The bound is what the best assignment could keep at most. What dropless top-k has above it is lost to any router; regret is what this router lost on top. Shares of top-k's gate mass, which differ a little from router to router: each layer is given what the layers before it made.",
    [choose("regret-limit", "Limit", limits.map((name) => [name, name]), limit, (next) => { limit = next; show(); }),
      choose("regret-layer", "Layer", layerOptions(layers, true), layer, (next) => { layer = next; show(); })], holder, marks));
}

function costOf(run, chosen) {
  const layers = run.layers.filter((layer, index) => (chosen < 0 || index === chosen) && isNumber(layer.bound));
  const total = (key) => sum(layers.map((layer) => layer[key]));
  const [kept, bound, topK] = [total("kept_mass"), total("bound"), total("top_k_mass")];
  const [limit, regret] = [Math.max(topK - bound, 0) / topK, Math.max(bound - kept, 0) / topK];
  return { run, kept, bound, topK, limit, regret, total: limit + regret };
}

function costRow({ run, kept, bound, topK, limit, regret, total }, most) {
  const share = (value) => `${(100 * value) / most}%`;
  const pairs = [["top-k's mass", format.mass(topK)], ["bound", format.mass(bound)], ["kept", format.mass(kept)], ["lost to the limit", format.percent(limit)], ["regret", format.percent(regret)]];
  return explained(el("div", { class: "row" }, el("span", { class: "name" }, run.router ?? runName(run)),
    el("span", { class: "track" },
      el("i", { class: "fill", style: `left:0;width:${share(limit)};background:var(--hash)` }),
      el("i", { class: "fill", style: `left:${share(limit)};width:${share(regret)};background:var(--arrival)` })),
    el("span", { class: "value" }, format.percent(total))), runName(run), pairs);
}
