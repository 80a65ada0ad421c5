// All figures: the rows of the result as a table that can be sorted, or its single figures as a list.

/** How a key of the JSON is written, by name; everything else as a plain number. */
const SHAPES = [
  [/^(survival|gate_mass.*|hit_rate|belady_hit_rate|agreement|spread|perplexity_error|.*_share)$/, format.percent],
  [/perplexity_increase$/, format.signed],
  [/perplexity$/, format.perplexity],
  [/(^max_violation|violation|load_cv|gini|jain)$/, format.ratio],
  [/nanos/, format.nanos],
  [/per_second$/, format.rate],
  [/bytes/, format.bytes],
  [/(slots|tokens|requests|hits|misses|parameters|expert)$/, format.count],
  [/(factor|bonus)$/, format.factor],
];

const WORDS = {
  max_violation: "Largest load of an expert over its share, less 1", device_max_violation: "Largest load of a device over its share, less 1",
  demand_max_violation: "The same of the gate's own top-k, before limits", load_cv: "Deviation of loads over their mean", gini: "Inequality of loads, 0 if all are alike", jain: "Evenness of loads, 1 if all are alike",
  gate_mass: "Kept gate mass over that of dropless top-k", gate_mass_vs_bound: "Kept gate mass over the certified upper bound", survival: "Slots kept of those asked for",
  spread: "Of tokens/s: half the distance between the quartiles of the repeated runs, over their median", perplexity_error: "Standard error of the increase",
  perplexity_increase: "Over the model without limits", route_nanos_per_token: "Median time in the router, a token and layer", tokens_without_expert: "Tokens that got no expert, over all layers",
  belady_hit_rate: "Hits of the best possible eviction for the same requests", gate_mass_kept: "Kept gate mass over that of plain top-k", pareto: "No setting with as few experts in memory beats it", agreement: "Slots that are also the gate's choice",
};

/** What is looked for first stands in front; the rest as the JSON has it. */
const FIRST = ["router", "cached_experts", "cache_bonus", "capacity_factor", "devices", "survival", "gate_mass", "gate_mass_vs_bound", "perplexity", "perplexity_increase", "hit_rate", "belady_hit_rate", "tokens_per_second"];

function cellText(key, value) {
  if (value === null || value === undefined) return NONE;
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value === "string") return value;
  if (typeof value === "number") return (SHAPES.find(([pattern]) => pattern.test(key))?.[1] ?? format.plain)(value);
  return Array.isArray(value) ? value.map((one) => cellText(key, one)).join(", ") : JSON.stringify(value);
}

const headingOf = (key) => key.replace(/_/g, " ").replace("tokens per second", "tokens/s").replace("nanos per token", "time");

function figures() {
  const rows = list(report.result?.rows);
  const content = rows.length ? sortable(rows) : single(report.result ?? {});
  return section("figures", "All figures", "All figures", rows.length ? "The rows of the result as --json prints them. Press a heading to sort." : "The result as --json prints it.",
    panels(content));
}

function sortable(rows) {
  const keys = [...new Set([...FIRST, ...rows.flatMap((row) => Object.keys(row))])].filter((key) => rows.some((row) => row[key] !== null && row[key] !== undefined));
  const recommended = JSON.stringify(report.result.recommended ?? null);
  const isText = (key) => rows.some((row) => typeof row[key] === "string");
  const body = el("tbody");
  const fill = (order) => body.replaceChildren(...order.map((row) => el("tr", { class: JSON.stringify(row) === recommended ? "best" : null },
    keys.map((key) => el("td", { class: isText(key) ? "left" : null }, cellText(key, row[key]))))));
  const heads = keys.map((key) => el("th", { scope: "col", class: isText(key) ? "left" : null, title: WORDS[key] },
    el("button", { type: "button", click: () => sort(key) }, headingOf(key))));
  let [by, down] = [null, false];
  function sort(key) {
    down = by === key ? !down : false;
    by = key;
    heads.forEach((head, index) => (keys[index] === key ? head.setAttribute("aria-sort", down ? "descending" : "ascending") : head.removeAttribute("aria-sort")));
    fill([...rows].sort((a, b) => compareCells(a[key], b[key], down)));
  }
  fill(rows);
  const table = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "all figures" }, el("table", null, el("thead", null, el("tr", null, heads)), body));
  const made = figure("figures", `${format.count(rows.length)} rows`, null, [], table);
  made.classList.add("wide", "long");
  return made;
}

/** What has no value stands last, whichever way. */
function compareCells(a, b, down) {
  const [noA, noB] = [a ?? null, b ?? null].map((value) => value === null);
  if (noA || noB) return noA - noB;
  const order = typeof a === "string" ? String(a).localeCompare(String(b)) : a - b;
  return down ? -order : order;
}

function single(result) {
  const entries = Object.entries(result).filter(([, value]) => value !== null && value !== undefined && !(value && typeof value === "object" && !Array.isArray(value)));
  if (entries.length === 0) return null;
  const row = ([key, value]) => el("tr", null, el("th", { class: "left", scope: "row", title: WORDS[key] }, headingOf(key)), el("td", { class: "left", style: "white-space:normal" }, Array.isArray(value) ? `${value.length} entries` : cellText(key, value)));
  return widened(figure("figures", "The result", null, [], el("div", { class: "scroll" }, el("table", { class: "pairs" }, el("tbody", null, entries.map(row))))));
}
