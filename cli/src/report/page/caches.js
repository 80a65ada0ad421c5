// Experts in fast memory: settings as a front, what was held when, bytes against the best possible.

/** Colours for up to six sizes of memory; larger ones share the last. */
const SIZES = ["--phase", "--arrival", "--quota", "--drop", "--score", "--choice"];

function caches() {
  const rows = list(report.result?.rows).filter((row) => isNumber(row.cached_experts));
  return section("caches", "Memory", "Experts in fast memory",
    "A request finds its expert in fast memory (a hit) or has to read it (a miss). The bonus lets a token prefer experts that are already there, within a bound on what it may lose.",
    panels(frontFigure(rows), bytesFigure(), residencyFigure()));
}

const sizeOf = (row) => (isNumber(row.expert_cache_bytes) ? format.bytes(row.expert_cache_bytes) : `${row.cached_experts} experts`);

function frontFigure(rows) {
  if (rows.length === 0) return null;
  const measures = [["tokens_per_second", "tokens/s", format.rate], ["hit_rate", "hit rate", format.percent], ["bytes_read_per_token", "bytes/token", format.bytes]].filter(([key]) => rows.some((row) => isNumber(row[key])));
  const sizes = [...new Set(rows.map(sizeOf))];
  const mark = (row) => `var(${SIZES[Math.min(sizes.indexOf(sizeOf(row)), SIZES.length - 1)]})`;
  const chosen = new Set([report.result.recommended, ...list(report.result.per_memory).map((one) => one.recommended)].filter(Boolean).map((row) => JSON.stringify(row)));
  const holder = el("div");
  const show = (measure) => {
    const [key, name, shape] = measure;
    const there = rows.filter((row) => isNumber(row[key]) && isNumber(row.perplexity));
    const points = there.map((row) => ({ x: row.perplexity, y: row[key], mark: mark(row), star: row.pareto, hollow: !row.pareto, ring: chosen.has(JSON.stringify(row)), heading: settingOf(row), pairs: rowPairs(row) }));
    const paths = sizes.map((size) => ({ points: points.filter((_, index) => sizeOf(there[index]) === size).sort((a, b) => a.x - b.x), mark: `var(${SIZES[Math.min(sizes.indexOf(size), SIZES.length - 1)]})` }));
    holder.replaceChildren(scatter(points, paths, { x: format.perplexity, y: shape, xLabel: "perplexity (lower is better)", yLabel: name }));
  };
  show(measures[0]);
  const marks = keys([...sizes.map((size, index) => [`background:var(${SIZES[Math.min(index, SIZES.length - 1)]})`, size]),
    ["border-radius:50%;box-shadow:inset 0 0 0 2px var(--soft)", "hollow: not on the front"], ...(chosen.size ? [["border-radius:50%;box-shadow:0 0 0 1.5px var(--ink)", "ring: the one to take with that memory"]] : [])]);
  return widened(figure("front", "Speed, quality, hits", "Every setting that was tried. Lines join settings with the same memory; filled ones are on the front.",
    [choose("front-measure", "Against perplexity", measures.map((measure) => [measure, measure[1]]), measures[0], show)], holder, marks));
}

const settingOf = (row) => `${row.baseline ? "plain top-k" : `bonus ${format.factor(row.cache_bonus)}`}, ${sizeOf(row)}${isNumber(row.top_k) ? `, top ${row.top_k}` : ""}`;
const rowPairs = (row) => [["tokens/s", isNumber(row.spread) ? `${format.rate(row.tokens_per_second)} ± ${format.percent(row.spread)}` : format.rate(row.tokens_per_second)], ["perplexity", format.perplexity(row.perplexity)], ["hit rate", format.percent(row.hit_rate)], ["Belady's hit rate", format.percent(row.belady_hit_rate)], ["bytes/token", format.bytes(row.bytes_read_per_token)], ["on the front", row.pareto ? "yes" : "no"]];

function bytesFigure() {
  const entries = list(report.cache).filter((cache) => isNumber(cache.bytes_per_token) || isNumber(cache.hit_rate));
  if (entries.length === 0) return null;
  const bytes = entries.some((cache) => isNumber(cache.bytes_per_token));
  const [key, best, shape] = bytes ? ["bytes_per_token", "belady_bytes_per_token", format.bytes] : ["hit_rate", "belady_hit_rate", format.percent];
  const values = entries.flatMap((cache) => [cache[key], cache[best]]).filter(isNumber);
  const rows = entries.filter((cache) => isNumber(cache[key])).map((cache, index) => ({
    label: cache.name, mark: `var(${SIZES[index % SIZES.length]})`, value: cache[key], span: cache[best], text: shape(cache[key]), heading: cache.name,
    pairs: [["bytes/token", format.bytes(cache.bytes_per_token)], ["Belady's bytes/token", format.bytes(cache.belady_bytes_per_token)], ["hit rate", format.percent(cache.hit_rate)], ["Belady's hit rate", format.percent(cache.belady_hit_rate)], ["experts in memory", format.count(cache.cached_experts)]] }));
  return widened(figure("bytes", bytes ? "Bytes per token against Belady" : "Hit rate against Belady", bytes ? "Filled: what was read. Hollow: what Belady's rule would read, which knows the future; no eviction policy reads less for the same requests."
    : "Filled: what was found. Hollow: what Belady's rule would find, which knows the future; no eviction policy finds more for the same requests.",
    [], dots(rows, [0, bytes ? Math.max(...values, 1e-9) * 1.03 : 1], shape)));
}

function residencyFigure() {
  const entries = list(report.cache).filter((cache) => list(cache.layers).some((layer) => list(layer.resident).length > 0));
  if (entries.length === 0) return null;
  let [cache, layer] = [entries[0], 0];
  const holder = el("div");
  const show = () => {
    const of = cache.layers[Math.min(layer, cache.layers.length - 1)];
    const sets = list(of.resident).map(bitsOf);
    const count = report.experts || Math.max(...sets.map((set) => 4 * set.length));
    const held = (step, expert) => Boolean((sets[step][sets[step].length - 1 - (expert >> 2)] ?? 0) & (1 << (expert & 3)));
    const size = (step) => expertNames(count).filter((_, expert) => held(step, expert)).length;
    const stride = isNumber(of.steps) && of.shown > 0 ? of.steps / of.shown : 1;
    const stepAt = (column) => Math.round(column * stride);
    const names = expertNames(count).map((name, expert) => (expert % Math.ceil(count / 16) === 0 ? name : ""));
    holder.replaceChildren(grid("residency", names, sets.map((_, column) => String(stepAt(column))), count > 64 ? 5 : 9, {
      value: (expert, step) => (held(step, expert) ? 1 : 0), format: (value) => (value ? "in fast memory" : "not"), high: 1, two: true,
      tell: (expert, step) => [`step ${format.count(stepAt(step))}, expert ${expert}`, [["in fast memory", held(step, expert) ? "yes" : "no"], ["experts there", String(size(step))], ["layer", layerName(layer)]]],
    }).element);
  };
  show();
  return widened(figure("residency", "Residency over time: expert × step", "Which experts are in fast memory after each step. A long bar is an expert that stays; speckles are experts that come and go.",
    [choose("residency-cache", "Setting", entries.map((entry) => [entry, entry.name]), cache, (next) => { cache = next; show(); }),
      choose("residency-layer", "Layer", layerOptions(cache.layers.length), layer, (next) => { layer = next; show(); })], holder));
}

/** The hex digits of a set as numbers, the highest first. */
const bitsOf = (digits) => Array.from(String(digits), (digit) => parseInt(digit, 16) || 0);
