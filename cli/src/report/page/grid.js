// Maps: a canvas of cells, coloured by value, with a scale beneath and words for every cell.

/** Pixels of a cell at least. */
const SMALLEST = 5;

/**
 * A map of `rows` × `columns`, lists of labels. `content` is { value(row, column), tell(row, column), format, around, low, high, few }:
 * with `around` the colours part at 1; cells without a value stay empty. `draw(content)` draws another content of the same shape.
 */
function grid(label, rows, columns, height, content, widest = 64) {
  const canvas = el("canvas");
  const scale = el("div", { class: "bar" });
  const wrap = el("div", { class: "scroll" }, canvas);
  const names = el("div", { class: "names", style: `grid-template-rows:repeat(${rows.length},${height}px)` }, rows.map((name) => el("span", { title: name }, name)));
  const named = rows.some((name) => name !== "");
  const element = el("div", null, el("div", { class: "map", style: named ? null : "grid-template-columns:minmax(0,1fr)" }, named ? names : null, wrap), scale);
  let cell = SMALLEST, current = content, at = null;
  const FOOT = columns.some((name) => name !== "") ? 18 : 2;

  function draw(next) {
    current = next ?? current;
    const ratio = devicePixelRatio || 1;
    const [wide, tall] = [cell * columns.length, height * rows.length];
    canvas.width = Math.round(wide * ratio);
    canvas.height = Math.round((tall + FOOT) * ratio);
    canvas.style.width = `${wide}px`;
    canvas.style.height = `${tall + FOOT}px`;
    const ctx = canvas.getContext("2d");
    ctx.scale(ratio, ratio);
    const stops = rampOf(current);
    const [low, high] = rangeOf(current, rows.length, columns.length);
    const gap = cell >= 9 && height >= 9 ? 1 : 0;
    for (let row = 0; row < rows.length; row++) {
      for (let column = 0; column < columns.length; column++) {
        const value = current.value(row, column);
        if (!isNumber(value)) continue;
        ctx.fillStyle = shade(stops, shareOf(current, value, low, high));
        ctx.fillRect(column * cell, row * height, cell - gap, height - gap);
      }
    }
    foot(ctx, tall);
    if (at) outline(ctx);
    scale.replaceChildren(...scaleOf(current, stops, low, high));
  }

  function foot(ctx, tall) {
    if (FOOT < 10) return;
    ctx.fillStyle = colour("--soft");
    ctx.font = "10px system-ui, sans-serif";
    ctx.textAlign = "center";
    const widest = Math.max(...columns.map((name) => name.length)) * 6.5 + 8;
    const every = [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 256, 512, 1024].find((step) => step * cell >= widest) ?? 2048;
    for (let column = 0; column < columns.length; column += every) ctx.fillText(columns[column], (column + 0.5) * cell, tall + 13);
  }

  function outline(ctx) {
    ctx.strokeStyle = colour("--ink");
    ctx.lineWidth = 2;
    ctx.strokeRect(at[1] * cell, at[0] * height, cell - 1, height - 1);
  }

  function tell(x, y) {
    draw();
    const pairs = current.tell(...at);
    showTip(x, y, pairs[0], pairs[1]);
  }

  function pointed(event) {
    const box = canvas.getBoundingClientRect();
    const [row, column] = [Math.floor((event.clientY - box.top) / height), Math.floor((event.clientX - box.left) / cell)];
    if (row < 0 || row >= rows.length || column < 0 || column >= columns.length) return left();
    at = [row, column];
    tell(event.clientX, event.clientY);
  }

  function left() {
    at = null;
    draw();
    hideTip();
  }

  function walked(event) {
    const by = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!by) return;
    event.preventDefault();
    const within = (value, count) => Math.min(Math.max(value, 0), count - 1);
    at = at ? [within(at[0] + by[0], rows.length), within(at[1] + by[1], columns.length)] : [0, 0];
    const x = at[1] * cell;
    if (x < wrap.scrollLeft || x + cell > wrap.scrollLeft + wrap.clientWidth) wrap.scrollLeft = x - wrap.clientWidth / 2;
    const box = canvas.getBoundingClientRect();
    tell(box.left + (at[1] + 0.5) * cell, box.top + (at[0] + 0.5) * height);
  }

  canvas.setAttribute("tabindex", "0");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${label}: arrow keys walk over its cells`);
  for (const event of ["pointermove", "pointerdown"]) canvas.addEventListener(event, pointed);
  for (const event of ["pointerleave", "blur"]) canvas.addEventListener(event, left);
  canvas.addEventListener("keydown", walked);
  sized(wrap, (width) => {
    cell = Math.min(Math.max(width / columns.length, SMALLEST), widest);
    cell = cell > 12 ? Math.floor(cell) : Math.max(Math.floor(cell * 2) / 2, SMALLEST);
    draw();
  });
  onColours(() => draw());
  return { element, draw };
}

const rampOf = (content) => (content.around ? RAMPS.around : RAMPS)[isDark() ? "dark" : "light"];

/** The values at the ends of the colours. */
function rangeOf(content, rows, columns) {
  if (isNumber(content.high)) return [content.low ?? 0, content.high];
  let high = 0;
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const value = content.value(row, column);
      if (isNumber(value) && value > high) high = value;
    }
  }
  // Around 1, a colour stands for as much too little as too much: no wider than three times.
  return content.around ? [0, Math.min(Math.max(high, 1.2), 3)] : [content.low ?? 0, high || 1];
}

function shareOf(content, value, low, high) {
  if (!content.around) return (value - low) / (high - low || 1);
  return value <= 1 ? value / 2 : 0.5 + (value - 1) / (high - 1) / 2;
}

/** The scale of colours with its ends in words. */
function scaleOf(content, stops, low, high) {
  // Two values need no gradient: a mark each.
  if (content.two) return [low, high].map((value) => el("span", { class: "pair" }, el("i", { class: "swatch", style: `background:${shade(stops, value)}` }), content.format(value)));
  const gradient = `background:linear-gradient(to right,${stops.join(",")})`;
  const middle = content.around ? ` · middle: ${content.format(1)}` : "";
  return [content.format(low), el("i", { style: gradient }), `${content.format(high)}${content.around ? " and above" : ""}`, ` ${content.unit ?? ""}${middle}`];
}
