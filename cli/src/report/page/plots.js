// Drawings over an axis: lines on a canvas by uPlot, dots in rows, columns and scattered points as SVG.

const PLOT_HEIGHT = 220;

/** Lines over common values of x. Each of `series` is { label, style, values }; `setup` is { x, y, marks, ends, off }: formats, values with a name, the ends of y, labels not shown at first. */
function lines(container, xs, series, setup) {
  const shown = new Set(series.map((one) => one.label).filter((label) => !setup.off?.has(label)));
  const named = list(setup.marks).map(({ value }) => value);
  let strong = null;
  const axis = (format, size, label) => ({
    stroke: () => colour("--soft"), grid: { stroke: () => colour("--grid"), width: 1 }, ticks: { show: false },
    font: "11px system-ui, sans-serif", size, values: (_, values) => values.map((value) => (value === null ? "" : format(value))),
    label, labelFont: "11px system-ui, sans-serif", labelSize: label ? 20 : 0, labelGap: 0, space: size > 40 ? 34 : 56,
  });
  const options = {
    width: 300, height: PLOT_HEIGHT, legend: { show: false }, padding: [8, 10, 0, 0],
    cursor: { y: false, drag: { x: false, y: false }, points: { size: 8 } },
    scales: { x: { time: false, range: (_, low, high) => padded(low, high, 0.03) }, y: { range: (_, low, high) => setup.ends ?? padded(Math.min(low ?? Infinity, ...named), Math.max(high ?? -Infinity, ...named), 0.1) } },
    axes: [axis(atAxis(setup.x), 22, setup.label), axis(atAxis(setup.y), 64, "")],
    series: [{}, ...series.map((one) => ({
      label: one.label, show: shown.has(one.label), spanGaps: true, dash: one.style.dash, width: one.style.width, stroke: () => faded(one),
      points: { show: xs.length < 20, size: 6, fill: () => faded(one), stroke: () => faded(one) },
    }))],
    hooks: { setCursor: [tell], draw: [marks] },
  };
  const faded = (one) => {
    const full = colour(one.style.name);
    return strong && strong !== one.label ? full.replace("rgb(", "rgba(").replace(")", ", 0.18)") : full;
  };

  function tell(plot) {
    const { idx, left, top } = plot.cursor;
    if (idx === null || idx === undefined || left < 0) return hideTip();
    const box = plot.over.getBoundingClientRect();
    const there = series.filter((one) => shown.has(one.label) && isNumber(one.values[idx]));
    there.sort((a, b) => b.values[idx] - a.values[idx]);
    const pairs = there.map((one) => [one.label, one.tell ? one.tell(idx) : setup.y(one.values[idx]), colour(one.style.name)]);
    const height = top >= 0 ? top : box.height / 2;
    if (pairs.length) showTip(box.left + left, box.top + height, setup.heading(xs[idx]), pairs);
  }

  function marks(plot) {
    for (const { value, words } of setup.marks ?? []) {
      const y = Math.round(plot.valToPos(value, "y", true));
      const { ctx, bbox } = plot;
      if (y < bbox.top || y > bbox.top + bbox.height) continue;
      ctx.save();
      ctx.strokeStyle = ctx.fillStyle = colour("--soft");
      ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
      ctx.beginPath();
      ctx.moveTo(bbox.left, y);
      ctx.lineTo(bbox.left + bbox.width, y);
      ctx.stroke();
      ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
      ctx.textAlign = "right";
      ctx.textBaseline = "top";
      ctx.fillText(words, bbox.left + bbox.width - 4 * devicePixelRatio, y + 3 * devicePixelRatio);
      ctx.restore();
    }
  }

  const plot = new uPlot(options, [xs, ...series.map((one) => one.values)], container);
  sized(container, (width) => plot.setSize({ width, height: PLOT_HEIGHT }));
  stepped(plot.over, setup.name, xs.length, (index) => plot.setCursor({ left: plot.valToPos(xs[index], "x"), top: -1 }));
  plot.over.addEventListener("pointerleave", hideTip);
  onColours(() => plot.redraw());
  return {
    element: container,
    /** Shows or hides a line. */
    toggle(label, visible) {
      const index = series.findIndex((one) => one.label === label);
      if (index < 0) return;
      visible ? shown.add(label) : shown.delete(label);
      plot.setSeries(index + 1, { show: visible });
    },
    /** Draws one line strongly and the others weakly; all alike for null. */
    stress(label) {
      strong = label;
      plot.redraw();
    },
  };
}

/** Room at both ends of a range, so that no line lies on the frame. */
function padded(low, high, share) {
  if (!isNumber(low) || !isNumber(high)) return [0, 1];
  const room = (high - low) * share || Math.abs(high) * 0.02 || 1;
  return [low - room, high + room];
}

/** Calls `size` with the width of an element, now and when it changes. */
function sized(element, size) {
  let before = 0;
  new ResizeObserver(([entry]) => {
    const width = Math.floor(entry.contentRect.width);
    if (width > 0 && width !== before) size((before = width));
  }).observe(element);
}

/** Arrow keys that walk over `count` places of an element. */
function stepped(element, label, count, go) {
  let at = -1;
  element.setAttribute("tabindex", "0");
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", `${label}: arrow keys walk over its values`);
  element.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    at = Math.min(Math.max(at + by, 0), count - 1);
    go(at);
  });
  element.addEventListener("blur", hideTip);
}

/** A legend for several plots: hovering stresses one of the series, pressing takes it into `off`, which are not shown, or out. */
function legend(series, off, plots) {
  const sample = ({ style }) => svg("svg", { width: 22, height: 10, "aria-hidden": "true" },
    svg("line", { x1: 0, x2: 22, y1: 5, y2: 5, stroke: `var(${style.name})`, "stroke-width": style.width + 0.4, "stroke-dasharray": style.dash.join(" ") || null }));
  const entry = (one) => {
    const stress = (label) => () => plots().forEach((plot) => plot.stress(label));
    const press = () => {
      const visible = button.getAttribute("aria-pressed") === "false";
      button.setAttribute("aria-pressed", visible);
      visible ? off.delete(one.label) : off.add(one.label);
      plots().forEach((plot) => plot.toggle(one.label, visible));
    };
    const button = el("button", {
      type: "button", "aria-pressed": String(!off.has(one.label)), click: press,
      pointerenter: stress(one.label), focus: stress(one.label), pointerleave: stress(null), blur: stress(null),
    }, sample(one), one.label);
    return el("li", null, button);
  };
  return el("ul", { class: "legend" }, series.map(entry));
}

/** One row per entry with a dot on a common scale: { label, mark, value, text, heading, pairs }, the best first; `span` draws to a second value. */
function dots(entries, ends, format) {
  const [low, high] = ends;
  const place = (value) => `${high > low ? (100 * (value - low)) / (high - low) : 50}%`;
  const row = (entry) => explained(el("div", { class: "row" },
    el("span", { class: "name" }, entry.label),
    el("span", { class: "track" },
      isNumber(entry.span) ? el("i", { class: "span", style: bridge(entry, place) }) : null,
      isNumber(entry.span) ? el("i", { class: "dot", style: `left:${place(entry.span)};box-shadow:inset 0 0 0 2px ${entry.mark};background:var(--card)` }) : null,
      el("i", { class: "dot", style: `left:${place(entry.value)};background:${entry.mark}` })),
    el("span", { class: "value" }, entry.text)), entry.heading, entry.pairs);
  const scale = el("div", { class: "row ends", "aria-hidden": "true" },
    el("span"), el("span", { class: "track" }, el("span", null, format(low)), el("span", null, format(high))), el("span"));
  return el("div", { class: "dots" }, entries.map(row), scale);
}

const bridge = (entry, place) =>
  `left:${place(Math.min(entry.value, entry.span))};right:calc(100% - ${place(Math.max(entry.value, entry.span))});background:${entry.mark}`;

/** The ends of a scale that holds all values, with room beside the outermost. */
function ends(values) {
  const low = Math.min(...values), high = Math.max(...values);
  const room = (high - low) * 0.04 || Math.abs(high) * 0.01 || 1;
  return [low - room, high + room];
}

/** Round steps between two numbers, about `count` of them. */
function steps(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.max(Math.floor(high / step + 1e-9) - first + 1, 0) }, (_, index) => (first + index) * step);
}

/** Points on two axes as SVG. Each of `points` is { x, y, mark, hollow, star, ring, heading, pairs }; `paths` are { points, mark, dash }, `level` is a line of equal values. */
function scatter(points, paths, setup) {
  const holder = el("div");
  sized(holder, (width) => holder.replaceChildren(scattered(points, paths, setup, width)));
  return holder;
}

function scattered(points, paths, setup, wide) {
  const [high, left, bottom] = [300, 64, 40];
  const [x0, x1] = setup.xEnds ?? ends(points.map((point) => point.x));
  const [y0, y1] = setup.yEnds ?? ends(points.map((point) => point.y));
  const x = (value) => left + ((value - x0) / (x1 - x0)) * (wide - left - 12);
  const y = (value) => high - bottom - ((value - y0) / (y1 - y0)) * (high - bottom - 12);
  const across = steps(y0, y1, 5).map((value) => [
    svg("line", { class: "line", x1: left, x2: wide - 12, y1: y(value), y2: y(value) }),
    svg("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, atAxis(setup.y)(value))]);
  const up = steps(x0, x1, 5).map((value) => svg("text", { x: x(value), y: high - bottom + 18, "text-anchor": "middle" }, atAxis(setup.x)(value)));
  const route = ({ points: way, mark, dash }) => svg("polyline", {
    points: way.map((point) => `${x(point.x)},${y(point.y)}`).join(" "), fill: "none", stroke: mark, "stroke-width": 1.6, "stroke-dasharray": dash, opacity: 0.65 });
  const shape = (point) => explained(svg("circle", {
    class: "mark", cx: x(point.x), cy: y(point.y), r: point.star ? 6.5 : 4.5, fill: point.hollow ? "var(--card)" : point.mark,
    stroke: point.hollow ? point.mark : "var(--card)", "stroke-width": 1.5 }), point.heading, point.pairs);
  const ring = (point) => svg("circle", { cx: x(point.x), cy: y(point.y), r: 11, fill: "none", stroke: "var(--ink)", "stroke-width": 1.5 });
  return svg("svg", { viewBox: `0 0 ${wide} ${high}`, role: "group" },
    across, up, svg("line", { class: "line", x1: left, x2: wide - 12, y1: high - bottom, y2: high - bottom }),
    svg("text", { x: (left + wide) / 2, y: high - 4, "text-anchor": "middle" }, setup.xLabel), svg("text", { x: 0, y: 10 }, setup.yLabel),
    paths.map(route), points.filter((point) => point.ring).map(ring), points.map(shape));
}

/** Columns of two measures of the same things, one above the other, each { heading, format, values, line }; `tell` gives a column's words. */
function columns(count, upper, lower, tell) {
  const step = Math.max(Math.min(Math.floor(1000 / count), 110), 7);
  const [left, wide, tall, gap] = [58, 58 + step * count + 4, 96, 26];
  const band = (measure, top) => {
    const most = Math.max(...measure.values.filter(isNumber), measure.line ?? 0, 1e-12);
    const size = (value) => (value / most) * tall;
    const column = (value, index) => svg("rect", {
      x: left + index * step + step * 0.12, width: step * 0.76, y: top + tall - size(value), height: Math.max(size(value), value > 0 ? 1.5 : 0),
      rx: 1.5, fill: measure.mark(value) });
    return [
      svg("text", { x: left, y: top - 7 }, measure.heading),
      svg("text", { x: left - 6, y: top + 8, "text-anchor": "end" }, measure.format(most)),
      svg("text", { x: left - 6, y: top + tall, "text-anchor": "end" }, "0"),
      svg("line", { class: "line", x1: left, x2: wide, y1: top + tall, y2: top + tall }),
      measure.values.map((value, index) => (isNumber(value) ? column(value, index) : null)),
      isNumber(measure.line) ? svg("line", { x1: left, x2: wide, y1: top + tall - size(measure.line), y2: top + tall - size(measure.line), stroke: "var(--ink)", "stroke-dasharray": "3 3" }) : null,
    ];
  };
  const [first, second] = [20, 20 + tall + gap + 6];
  const height = second + tall + 20;
  const every = Math.ceil(26 / step);
  const hit = (index) => explained(svg("rect", {
    class: "mark", x: left + index * step, width: step, y: first, height: second + tall - first, fill: "transparent", "pointer-events": "all" }), ...tell(index));
  const labels = Array.from({ length: count }, (_, index) => (index % every ? null : svg("text", { x: left + (index + 0.5) * step, y: height - 4, "text-anchor": "middle" }, String(index))));
  return el("div", { class: "scroll" }, svg("svg", { viewBox: `0 0 ${wide} ${height}`, style: `min-width:${Math.min(wide, Math.max(count * 7 + 58, 300))}px;max-width:${wide}px`, role: "group" },
    band(upper, first), band(lower, second), labels, Array.from({ length: count }, (_, index) => hit(index))));
}
