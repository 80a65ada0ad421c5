// Experts: how full each was, which are chosen together, which text goes where, and load against capacity.

const expertNames = (count) => Array.from({ length: count }, (_, index) => String(index));
const layerNames = (count) => Array.from({ length: count }, (_, index) => layerName(index));

function experts() {
  return section("experts", "Experts", "Experts", "What each was asked for, what it got, and for which text.",
    panels(loadFigure(), kindsFigure(), togetherFigure()));
}

/** The load of every expert in every layer. */
function loadFigure() {
  const runs = list(report.runs).filter((run) => list(run.layers).length > 0);
  if (runs.length === 0) return null;
  const layers = runs[0].layers.length;
  const count = runs[0].layers[0].loads.length;
  const modes = [["loads", "load"], ["room", "load over room"], ["demand", "demand"]];
  let [run, mode] = [runs[0], "loads"];
  const holder = el("div");
  const content = () => {
    if (mode === "room") return roomContent(run);
    const most = Math.max(...runs.flatMap((one) => one.layers.flatMap((layer) => [...layer.loads, ...layer.demand])));
    return {
      value: (row, expert) => run.layers[row][mode][expert], format: format.count, high: most, unit: "slots",
      tell: (row, expert) => [`expert ${expert}, ${layerName(row)}`, loadPairs(run.layers[row], expert)] };
  };
  const show = () => {
    if (mode === "room" && !isLimited(run)) return holder.replaceChildren(el("p", { class: "soft" }, "This router had no limit: there is no room to compare with."));
    const wide = mode === "room" ? run.layers[0].room.length : count;
    holder.replaceChildren(grid("load", layerNames(layers), expertNames(wide), 26, content()).element);
  };
  show();
  return widened(figure("load", "Load: layer × expert", "Slots per expert over the whole text. Demand is what the gate's own top-k asks for, before any limit; rows are layers, columns experts (or devices, for load over a device's room).",
    [choose("load-router", "Router", runOptions(runs), run, (next) => { run = next; show(); }),
      choose("load-mode", "Show", runs.some(isLimited) ? modes : modes.filter(([name]) => name !== "room"), mode, (next) => { mode = next; show(); })], holder));
}

const loadPairs = (layer, expert) => {
  const pool = list(layer.pool_of)[expert];
  return [["asked for", `${format.count(layer.demand[expert])} slots`], ["got", `${format.count(layer.loads[expert])} slots`],
    ...(isNumber(pool) && layer.room.length === layer.loads.length ? [["room", `${format.count(layer.room[pool])} slots`]] : [])];
};

function roomContent(run) {
  const of = run.layers.map((layer) => ({ loads: perPool(layer, layer.loads), demand: perPool(layer, layer.demand), room: layer.room }));
  return {
    around: true, format: format.times, unit: "of its room", value: (row, pool) => of[row].loads[pool] / of[row].room[pool],
    tell: (row, pool) => [`${poolWord(run)} ${pool}, ${layerName(row)}`, [
      ["load over room", format.times(of[row].loads[pool] / of[row].room[pool])], ["asked for", `${format.count(of[row].demand[pool])} slots`],
      ["got", `${format.count(of[row].loads[pool])} slots`], ["room", `${format.count(of[row].room[pool])} slots`]]] };
}

/** Which kind of text goes to which expert. */
function kindsFigure() {
  const kinds = list(report.kinds).filter((kind) => list(kind.layers).length > 0);
  if (kinds.length === 0) return null;
  let [layer, order] = [0, "number"];
  const holder = el("div");
  const show = () => {
    const shares = kinds.map((kind) => { const total = sum(kind.layers[layer]) || 1; return kind.layers[layer].map((slots) => slots / total); });
    const at = expertsInOrder(shares, order);
    holder.replaceChildren(grid("kinds of text", kinds.map((kind) => kind.name), at.map(String), 34, {
      value: (row, column) => shares[row][at[column]], format: format.percent, unit: "of a kind's slots",
      tell: (row, column) => [`expert ${at[column]}, ${layerName(layer)}`, kinds.map((kind, index) => [kind.name, `${format.percent(shares[index][at[column]])} (${format.count(kind.layers[layer][at[column]])})`])],
    }).element);
  };
  show();
  return widened(figure("kinds", "Kind of text × expert", "Where the gate's own choice sends each kind of text: the share of a kind's slots that an expert gets. Ordered by kind, experts of one kind stand together.",
    [choose("kinds-layer", "Layer", layerOptions(kinds[0].layers.length), layer, (next) => { layer = next; show(); }),
      choose("kinds-order", "Order", [["number", "by number"], ["kind", "by kind"]], order, (next) => { order = next; show(); })], holder));
}

/** Experts by number, or by the kind that uses each most and how clearly it does. */
function expertsInOrder(shares, order) {
  const experts = shares[0].map((_, expert) => expert);
  if (order === "number") return experts;
  const parts = experts.map((expert) => {
    const own = shares.map((kind) => kind[expert]);
    const kind = own.indexOf(Math.max(...own));
    return { kind, part: own[kind] / (sum(own) || 1) };
  });
  return experts.sort((a, b) => parts[a].kind - parts[b].kind || parts[b].part - parts[a].part);
}

/** Which experts are chosen by the same token. */
function togetherFigure() {
  const layers = list(report.together);
  if (!layers.some((layer) => list(layer).length > 0)) return null;
  let [layer, mode] = [Math.max(layers.findIndex((one) => list(one).length > 0), 0), "chance"];
  const holder = el("div");
  const show = () => {
    const pairs = list(layers[layer]);
    const count = Math.round(Math.sqrt(pairs.length));
    if (count === 0) return holder.replaceChildren(el("p", { class: "soft" }, "Left out for this layer."));
    const load = (expert) => pairs[expert * count + expert];
    const tokens = sum(expertNames(count).map((_, expert) => load(expert))) / (report.top_k || 1);
    const both = (a, b) => pairs[a * count + b];
    // Of two experts of a token the second is drawn from the top_k − 1 others.
    const share = report.top_k > 1 ? (report.top_k - 1) / report.top_k : 1;
    const chance = (a, b) => (share * load(a) * load(b)) / (tokens || 1);
    const lift = (a, b) => (chance(a, b) > 0 ? both(a, b) / chance(a, b) : null);
    holder.replaceChildren(grid("chosen together", expertNames(count).map((name) => (count > 40 ? "" : name)), expertNames(count), count > 40 ? 8 : 18, {
      around: mode === "chance", format: mode === "chance" ? format.times : format.count, unit: mode === "chance" ? "as often as by chance" : "tokens",
      value: (a, b) => (a === b ? null : mode === "chance" ? lift(a, b) : both(a, b)),
      tell: (a, b) => (a === b ? [`expert ${a}, ${layerName(layer)}`, [["chosen by", `${format.count(load(a))} tokens`]]]
        : [`experts ${a} and ${b}, ${layerName(layer)}`, [["both chosen by", `${format.count(both(a, b))} tokens`], ["derived: over chance", format.times(lift(a, b))]]]),
    }, count > 40 ? 14 : 26).element);
  };
  show();
  return widened(figure("together", "Experts chosen together", "How many tokens choose both of two experts. Derived: how often that is, compared with experts of the same load chosen independently of each other.",
    [choose("together-layer", "Layer", layerOptions(layers.length), layer, (next) => { layer = next; show(); }),
      choose("together-mode", "Show", [["chance", "against chance"], ["tokens", "tokens"]], mode, (next) => { mode = next; show(); })], holder));
}

// ---- load against capacity ----

function capacity() {
  const runs = list(report.runs).filter(isLimited);
  if (runs.length === 0) return null;
  let [run, layer] = [hardest(runs), 0];
  const [holder, table, curve] = [el("div"), el("div"), el("div")];
  const below = el("div");
  const show = () => {
    const pools = poolsOf(run, layer);
    const varied = pools.some((pool) => pool.room !== pools[0].room);
    holder.replaceChildren(varied ? capacityScatter(run, pools) : capacityRanks(run, pools));
    const correlation = (key) => (varied ? correlate(pools.map((pool) => pool.room), pools.map((pool) => pool[key])) : null);
    const shown = (value) => (isNumber(value) ? value.toFixed(3) : NONE);
    below.replaceChildren(numbers([
      ...(varied ? [[shown(correlation("load")), "derived: correlation of load with capacity"], [shown(correlation("demand")), "derived: the same of the demand, before limits"]] : []),
      [format.percent(sum(pools.map((pool) => pool.load)) / sum(pools.map((pool) => pool.room))), "derived: of all room in use"]]), varied ? "" : el("p", { class: "aside" }, "All have the same room here, so there is no correlation to give."));
    table.replaceChildren(endsTable(run, pools, varied));
    headroom(curve, run, layer);
  };
  const switches = [choose("capacity-router", "Router", runOptions(runs), run, (next) => { run = next; show(); }),
    choose("capacity-layer", "Layer", layerOptions(run.layers.length), layer, (next) => { layer = next; show(); })].filter(Boolean);
  const figures = panels(
    switches.length ? el("div", { class: "controls" }, switches) : null,
    figure("load-capacity", "Load against capacity", "Filled: what it got. Hollow: what the gate asked for.", [], holder, below),
    figure("load-ends", "Load over capacity, top and bottom", "The ten at either end: by capacity where capacities differ, else by what was asked of them.", [], table),
    widened(figure("headroom", "Headroom for 90 % survival", "Derived from the gate's demand: how many slots fit if a full expert or device just drops the rest, against the room as a multiple of this run's.", [], curve)));
  const made = section("capacity", "Capacity", "Load and capacity", "A limit is met where load follows capacity. How much more room than demand does a router that only drops need?", figures);
  show();
  return made;
}

function poolsOf(run, layer) {
  const of = run.layers[layer];
  const [demand, loads] = [perPool(of, of.demand), perPool(of, of.loads)];
  return of.room.map((room, pool) => ({ pool, room, load: loads[pool], demand: demand[pool] }));
}

const poolWords = (run, pool) => [`${poolWord(run)} ${pool.pool}`, [["capacity", `${format.count(pool.room)} slots`], ["asked for", `${format.count(pool.demand)} slots`], ["got", `${format.count(pool.load)} slots`], ["load over capacity", format.times(pool.load / pool.room)]]];

function capacityPoints(run, pools, x) {
  const mark = `var(${styleOf(run.router).name})`;
  const point = (key, hollow) => (pool, index) => {
    const [heading, pairs] = poolWords(run, pool);
    return { x: x(pool, index), y: pool[key], mark: hollow ? "var(--hash)" : mark, hollow, heading, pairs };
  };
  return [...pools.map(point("demand", true)), ...pools.map(point("load", false))];
}

function capacityScatter(run, pools) {
  const points = capacityPoints(run, pools, (pool) => pool.room);
  const [low, high] = [Math.min(...pools.map((pool) => pool.room)), Math.max(...pools.map((pool) => pool.room))];
  return scatter(points, [{ points: [{ x: low, y: low }, { x: high, y: high }], mark: "var(--soft)", dash: "3 3" }],
    { x: format.count, y: format.count, xLabel: "capacity, slots (dashed: load = capacity)", yLabel: "slots" });
}

/** Where all have the same room there is nothing to set load against: those asked for most come first. */
function capacityRanks(run, pools) {
  const ranked = [...pools].sort((a, b) => b.demand - a.demand);
  const points = capacityPoints(run, ranked, (_, index) => index + 1);
  const room = pools[0].room;
  return scatter(points, [{ points: [{ x: 1, y: room }, { x: Math.max(ranked.length, 2), y: room }], mark: "var(--ink)", dash: "3 3" }],
    { x: (value) => (Number.isInteger(value) ? String(value) : ""), y: format.count, xLabel: `${poolWord(run)}s, the most asked for first (dashed: capacity)`, yLabel: "slots", yEnds: [0, Math.max(...points.map((point) => point.y), room) * 1.06] });
}

/** Pearson's correlation; null where one side does not vary. */
function correlate(xs, ys) {
  const [mx, my] = [sum(xs) / xs.length, sum(ys) / ys.length];
  const [xy, xx, yy] = [sum(xs.map((x, i) => (x - mx) * (ys[i] - my))), sum(xs.map((x) => (x - mx) ** 2)), sum(ys.map((y) => (y - my) ** 2))];
  return xx > 0 && yy > 0 ? xy / Math.sqrt(xx * yy) : null;
}

function endsTable(run, pools, varied) {
  const sorted = [...pools].sort((a, b) => (varied ? b.room - a.room || b.load / b.room - a.load / a.room : b.demand / b.room - a.demand / a.room));
  const few = Math.min(10, Math.ceil(sorted.length / 2));
  const row = (pool) => (pool ? [String(pool.pool), format.count(pool.room), format.times(pool.demand / pool.room), format.times(pool.load / pool.room)] : ["", "", "", ""]);
  const head = [poolWord(run), "room", "asked / room", "load / room"];
  const part = (title, part) => [el("tr", null, el("th", { colspan: 4, class: "left", scope: "rowgroup" }, title)), part.map((pool) => el("tr", null, row(pool).map((cell) => el("td", null, cell))))];
  return el("div", { class: "scroll" }, el("table", null, el("tbody", null,
    el("tr", null, head.map((cell) => el("th", { scope: "col" }, cell))),
    part("top", sorted.slice(0, few)), part("bottom", sorted.slice(Math.max(sorted.length - few, few))))));
}

/** What survives if every pool drops what it has no room for, by headroom. */
function headroom(holder, run, layer) {
  const pools = poolsOf(run, layer);
  const asked = sum(pools.map((pool) => pool.demand));
  const survival = (more) => sum(pools.map((pool) => Math.min(pool.demand, more * pool.room))) / (asked || 1);
  const factor = run.capacity_factor ?? 1;
  const needed = headroomFor(survival, 0.9);
  const most = Math.max(2, Math.min(Math.ceil((needed ?? 2) * 1.5), 8));
  const xs = Array.from({ length: 81 }, (_, index) => (index * most) / 80);
  const drawing = el("div");
  holder.replaceChildren(drawing, numbers([
    [format.times(needed), `derived: this run's room that 90 % survival takes where full ones drop, in ${layerName(layer)}`],
    [isNumber(needed) ? format.factor(Number((needed * factor).toFixed(2))) : NONE, "derived: as a capacity factor"],
    [format.percent(run.layers[layer].kept / run.layers[layer].slots), `${runName(run)}: slots kept, measured`]]));
  lines(drawing, xs, [{ label: "slots that fit", style: { name: "--plain", dash: [], width: 2 }, values: xs.map(survival) }], {
    name: "headroom", x: (value) => `${Number(value.toFixed(2))}×`, y: format.percent, label: "room, as a multiple of this run's", ends: [0, 1.02],
    marks: [{ value: 0.9, words: "90 %" }], heading: (value) => `${format.times(value)} of the room` });
}

/** The least headroom at which so much survives, by halving; null where none does. */
function headroomFor(survival, wanted) {
  let [low, high] = [0, 1024];
  if (survival(high) < wanted) return null;
  for (let turn = 0; turn < 60; turn++) {
    const middle = (low + high) / 2;
    if (survival(middle) >= wanted) high = middle;
    else low = middle;
  }
  return high;
}
