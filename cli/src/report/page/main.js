// The page: its head, its sections in the order in which they are read, and what holds for all of it.

const TITLES = { compare: "Routers compared", tune: "Which memory setting to take", replay: "A cache of experts, replayed", generate: "A text, and its experts" };

function modelLine(model) {
  if (!model) return null;
  const words = [model.name, model.family, `${model.layers} layers`, `${model.experts} experts`, `top ${model.top_k}`, isNumber(model.parameters) ? `${grouped((model.parameters / 1e6).toFixed(1))} M parameters` : null];
  return words.filter(Boolean).join(" · ");
}

function facts() {
  const run = report.run ?? {};
  const text = report.result?.text;
  const measured = text && typeof text === "object" ? `${format.count(text.tokens)} tokens of ${list(text.files).join(", ")}, ${format.count(text.batch_tokens)} a batch` : null;
  const dropless = report.result?.dropless;
  const plain = dropless ? `perplexity ${format.perplexity(dropless.perplexity)}, ${format.rate(dropless.tokens_per_second)} tokens/s` : null;
  const rows = [["Command", run.command_line ? el("code", null, run.command_line) : null], ["Text", measured], ["Without limits", plain], ["Machine", run.machine], ["Version", run.version ? `phase-moe ${run.version}` : null], ["When", run.date]];
  return el("dl", { class: "facts" }, rows.filter(([, value]) => value).map(([name, value]) => [el("dt", null, name), el("dd", null, value)]));
}

function notes() {
  const sentences = list(report.notes).filter(Boolean);
  return section("notes", "What it means", "What it means", null,
    sentences.length ? el("ul", { class: "notes" }, sentences.map((sentence) => el("li", null, sentence))) : null, panels(adviceFigure()));
}

/** Of `tune`: what to take with each memory, why, and the command that runs it. */
function adviceFigure() {
  const result = report.result ?? {};
  const advice = list(result.per_memory).filter((one) => one.reason);
  if (advice.length === 0) return null;
  const memory = ({ memory }) => (/^\d+$/.test(memory) ? `${memory} experts a layer` : memory);
  const entry = (one) => [el("dt", null, memory(one)), el("dd", null, one.command === result.command ? el("b", null, one.reason) : one.reason, el("code", null, one.command))];
  return widened(figure("advice", "What to take, by how much memory there is", result.warning ?? null, [],
    el("dl", { class: "facts advice" }, advice.map(entry))));
}

function head() {
  const theme = el("button", { type: "button", "data-action": "theme", click: switchTheme }, themeWord());
  const download = el("button", { type: "button", "data-action": "download", click: downloadJson }, "Download JSON");
  return el("header", null,
    el("div", null, el("p", { class: "kicker" }, `phase-moe ${report.command ?? ""}`), el("h1", null, TITLES[report.command] ?? "phase-moe")),
    el("div", { class: "actions" }, theme, download),
    modelLine(report.model) ? el("p", { class: "model" }, modelLine(report.model)) : null);
}

const themeWord = () => (isDark() ? "Light" : "Dark");

function setTheme(name) {
  if (name) document.documentElement.dataset.theme = name;
  else delete document.documentElement.dataset.theme;
  const button = document.querySelector("[data-action=theme]");
  if (button) button.textContent = themeWord();
  redraw();
}

const switchTheme = () => setTheme(isDark() ? "light" : "dark");

/** The document as it stands in the page, to the letter. */
function downloadJson() {
  const link = el("a", { href: URL.createObjectURL(new Blob([source], { type: "application/json" })), download: `phase-moe-${report.command ?? "report"}.json` });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function main() {
  document.body.append(probe, tip);
  const about = el("section", { id: "run", "data-title": "The run" }, el("h2", { class: "hidden" }, "What was run"), facts());
  about.style.paddingTop = "0";
  // Where a cache is what the command is about, it comes first.
  const cached = ["tune", "replay"].includes(report.command);
  const sections = [about, notes(), cached ? caches() : null, routers(), prices(), experts(), words(), cached ? null : caches(), capacity(), figures()].filter(Boolean);
  const contents = el("nav", { "aria-label": "Sections" }, el("ul", null, sections.map((part) => el("li", null, el("a", { href: `#${part.id}` }, part.dataset.title)))));
  const foot = el("footer", null, `Written by phase-moe ${report.run?.version ?? ""}. This file needs no network; its data can be downloaded above. Plots over an axis by uPlot (MIT licence, © Leon Sorokin).`);
  document.body.append(el("div", { class: "page" }, head(), contents, el("main", null, sections), foot));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme(document.documentElement.dataset.theme));
  let before;
  addEventListener("beforeprint", () => { before = document.documentElement.dataset.theme; setTheme("light"); });
  addEventListener("afterprint", () => setTheme(before));
  addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
  addEventListener("scroll", hideTip, { passive: true, capture: true });
}

main();
