// Small helpers and the charts. Everything that comes from a run enters the page as a text node.

const SVG = "http://www.w3.org/2000/svg";
const BIDI = /[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;
const CONTROL = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f]/g;

/** Text as it is, but marks that would reorder or hide other text become visible. */
function visible(text) {
  const code = (c) => "⟨U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩";
  return String(text).replace(BIDI, code).replace(CONTROL, "\u00b7");
}

/** An element with attributes and children; a string child is a text node. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) {
    if (child === null || child === undefined) continue;
    node.append(child instanceof Node ? child : document.createTextNode(visible(child)));
  }
  return node;
}

function svg(tag, attributes = {}, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = visible(text);
  return node;
}

const SUPERSCRIPT = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

/** A number for people: 1.2M, 0.034, 2.1×10⁻⁵. */
function format(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  let text;
  if (size !== 0 && (size < 1e-3 || size >= 1e15)) {
    const [mantissa, exponent] = value.toExponential(Math.min(2, digits - 1)).split("e");
    const power = [...String(Number(exponent))].map((c) => SUPERSCRIPT[c]).join("");
    text = `${Number(mantissa)}×10${power}`;
  } else if (size >= 1e5) {
    text = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: digits }).format(value);
  } else {
    text = new Intl.NumberFormat("en", { maximumSignificantDigits: digits, useGrouping: size >= 1e4 }).format(value);
  }
  return text.replaceAll("-", "−");
}

/** Labels of the ticks of one axis: powers of ten on all of them, or on none. */
function tickLabels(values) {
  const most = Math.max(...values.map(Math.abs));
  if (most < 1e-3 || most >= 1e5) return values.map((v) => format(v));
  const plain = new Intl.NumberFormat("en", { maximumSignificantDigits: 4, useGrouping: most >= 1e4 });
  return values.map((v) => (Math.abs(v) < 1e-6 * most ? "0" : Math.abs(v) < 1e-3 * most ? format(v) : plain.format(v).replaceAll("-", "−")));
}

function ticks(low, high, wanted, log) {
  if (log) {
    const found = [];
    const decades = Math.log10(high / low);
    const steps = decades > 4 ? [1] : decades > 1.5 ? [1, 3] : decades > 0.5 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 7];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const step of steps) {
        const value = step * 10 ** power;
        if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
      }
    if (found.length > 1) return found;
  }
  const raw = (high - low) / wanted || 1;
  const size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((m) => m * size >= raw) * size;
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(k * step || 0); // never −0
  return found;
}

const PEN = document.createElement("canvas").getContext("2d");

/** Width of a text in pixels, in the font of the page. */
function textWidth(text, size) {
  PEN.font = `${size}px ${getComputedStyle(document.body).fontFamily}`;
  return PEN.measureText(text).width;
}

function scale(low, high, from, to, log) {
  const f = log ? Math.log : (v) => v;
  const width = f(high) - f(low) || 1;
  return (value) => from + ((f(value) - f(low)) / width) * (to - from);
}

/** The x values of a series under the wanted axis, or under the only one it has. */
function along(chart, series, axis) {
  const axes = chart.axes[series.x] ?? {};
  return axes[axis] ?? Object.values(axes)[0] ?? [];
}

function axisLabel(chart, axis) {
  if (chart.axis) return chart.axis;
  const has = chart.series.some((s) => (chart.axes[s.x] ?? {})[axis]);
  const name = has ? axis : Object.keys(chart.axes[0] ?? {})[0] ?? "";
  return LOOK.axes[name] ?? name;
}

/** Attributes that give an element the colour of a style; the stylesheet paints with `--s`. */
function coloured(style, names) {
  return { class: names, style: `--s: var(--c${style % LOOK.colours})` };
}

/** Colour and dashes of a series. */
function strokeOf(s, names) {
  const round = Math.floor(s.style / LOOK.colours);
  return { ...coloured(s.style, names + (round ? " again" : "") + (s.faint ? " faint" : "")), "stroke-dasharray": LOOK.dashes[round % LOOK.dashes.length] };
}

/** Layers of a stack as bands between running sums. */
function stacked(chart) {
  const length = Math.max(0, ...chart.series.map((s) => s.y.length));
  const below = new Array(length).fill(0);
  return chart.series.map((series) => {
    const low = below.slice();
    series.y.forEach((value, i) => (below[i] += value ?? 0));
    return { ...series, low, high: below.slice(), y: below.slice(), value: series.y };
  });
}

function bounds(series, chart, axis) {
  const x = [], y = chart.levels.map((level) => level[0]);
  if (chart.kind === "stack") y.push(0);
  for (const s of series) {
    along(chart, s, axis).forEach((value) => value !== null && x.push(value));
    for (const values of [s.y, s.low ?? [], s.high ?? []]) values.forEach((v) => v !== null && y.push(v));
  }
  const least = (v) => v.reduce((a, b) => Math.min(a, b), Infinity);
  const most = (v) => v.reduce((a, b) => Math.max(a, b), -Infinity);
  let [x0, x1, y0, y1] = [least(x), most(x), least(y), most(y)];
  if (!Number.isFinite(x0)) [x0, x1] = [0, 1];
  if (!Number.isFinite(y0)) [y0, y1] = [0, 1];
  if (x0 === x1) [x0, x1] = [x0 - 0.5, x1 + 0.5];
  const log = chart.log && y0 > 0 && y1 / y0 > 1.2;
  if (y0 === y1) [y0, y1] = log ? [y0 / 2, y1 * 2] : [y0 - (Math.abs(y0) * 0.1 || 0.5), y1 + (Math.abs(y1) * 0.1 || 0.5)];
  else if (chart.kind !== "stack") {
    if (log) [y0, y1] = [y0 / (y1 / y0) ** 0.04, y1 * (y1 / y0) ** 0.04];
    else [y0, y1] = [y0 - (y1 - y0) * 0.05, y1 + (y1 - y0) * 0.05];
  }
  return { x0, x1, y0, y1, log };
}

function linePath(x, y, sx, sy) {
  let path = "", open = false;
  for (let i = 0; i < y.length; i++) {
    if (y[i] === null || x[i] === null || x[i] === undefined) { open = false; continue; }
    path += `${open ? "L" : "M"}${sx(x[i]).toFixed(1)} ${sy(y[i]).toFixed(1)}`;
    open = true;
  }
  return path;
}

function bandPath(x, low, high, sx, sy) {
  const there = [];
  for (let i = 0; i < low.length; i++) if (low[i] !== null && high[i] !== null && x[i] !== undefined) there.push(i);
  if (there.length < 2) return "";
  const point = (i, y) => `${sx(x[i]).toFixed(1)} ${sy(y[i]).toFixed(1)}`;
  return "M" + there.map((i) => point(i, high)).join("L") + "L" + there.reverse().map((i) => point(i, low)).join("L") + "Z";
}

/** A chart that draws itself when it comes into view, and again when its width or the axis changes. */
class ChartView {
  constructor(chart) {
    this.chart = chart;
    this.hidden = new Set();
    this.axis = "step";
    this.at = null;
    this.title = el("h4", {}, chart.title);
    this.plot = el("div", { class: "plot", tabindex: "0", role: "img", "aria-label": this.spoken() });
    this.readout = el("div", { class: "readout", role: "status", "aria-live": "polite" });
    this.legend = el("div", { class: "legend" });
    this.root = el("figure", { class: "chart", id: "chart-" + chart.id }, this.title, this.plot, this.readout, this.legend);
    if (chart.note) this.root.append(el("figcaption", {}, chart.note));
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.move(null));
    this.plot.addEventListener("blur", () => this.move(null));
    this.plot.addEventListener("keydown", (event) => this.key(event));
    new IntersectionObserver((entries, observer) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      observer.disconnect();
      this.seen = true;
      this.draw();
      new ResizeObserver(() => this.plot.clientWidth !== this.width && this.draw()).observe(this.plot);
    }, { rootMargin: "300px" }).observe(this.root);
  }

  spoken() {
    const last = this.chart.series
      .filter((s) => s.label)
      .map((s) => `${s.label} ends at ${format([...s.y].reverse().find((v) => v !== null))}`);
    return visible(`${this.chart.title}. ${last.join(", ")}. Arrow keys read the values.`);
  }

  show(axis) {
    this.axis = axis;
    if (this.seen) this.draw();
  }

  draw() {
    const { chart, axis } = this;
    this.width = this.plot.clientWidth;
    const width = Math.max(240, this.width), height = 230;
    const all = chart.kind === "stack" ? stacked({ ...chart, series: chart.series.map((s, i) => (this.hidden.has(i) ? { ...s, y: s.y.map(() => 0) } : s)) }) : chart.series;
    const drawn = all.map((s, i) => ({ ...s, index: i })).filter((s) => !this.hidden.has(s.index));
    const b = bounds(drawn, chart, axis);
    const yTicks = ticks(b.y0, b.y1, 6, b.log);
    const yLabels = tickLabels(yTicks), unit = chart.y ? "↑ " + chart.y : "", below = axisLabel(chart, axis);
    // Two long names of axes do not fit into one line.
    const crowded = 6.3 * (unit.length + below.length + 2) > width;
    const left = 14 + 7 * Math.max(...yLabels.map((t) => t.length), 2), right = 14, top = 10, bottom = crowded ? 52 : 38;
    const sx = scale(b.x0, b.x1, left, width - right), sy = scale(b.y0, b.y1, height - bottom, top, b.log);
    const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
    yTicks.forEach((tick, i) => {
      picture.append(svg("line", { x1: left, x2: width - right, y1: sy(tick), y2: sy(tick), class: "grid" }));
      picture.append(svg("text", { x: left - 6, y: sy(tick) + 4, class: "tick", "text-anchor": "end" }, yLabels[i]));
    });
    for (const tick of ticks(b.x0, b.x1, Math.max(2, width / 80), false))
      picture.append(svg("text", { x: sx(tick), y: height - bottom + 16, class: "tick", "text-anchor": "middle" }, format(tick)));
    picture.append(svg("line", { x1: left, x2: width - right, y1: height - bottom, y2: height - bottom, class: "axis" }));
    picture.append(svg("text", { x: width - right, y: height - 5, class: "axis-label", "text-anchor": "end" }, below));
    picture.append(svg("text", { x: 2, y: height - (crowded ? 20 : 5), class: "axis-label" }, unit));
    for (const s of drawn) this.drawSeries(picture, s, sx, sy);
    for (const [value, label] of chart.levels) {
      picture.append(svg("line", { x1: left, x2: width - right, y1: sy(value), y2: sy(value), class: "level" }));
      // At that end of the line where the curves are farther away.
      const away = (end) => Math.min(...drawn.map((s) => Math.abs(sy(end(s.y.filter((v) => v !== null)) ?? Infinity) - sy(value))));
      const first = chart.kind !== "stack" && away((y) => y[0]) > away((y) => y.at(-1));
      picture.append(svg("text", { x: first ? left + 4 : width - right - 2, y: sy(value) - 4, class: "level-label", "text-anchor": first ? "start" : "end" }, label));
    }
    for (const [at, label] of chart.marks) {
      const x = sx(at[axis] ?? Object.values(at)[0]);
      picture.append(svg("line", { x1: x, x2: x, y1: top, y2: height - bottom, class: "mark" }));
      picture.append(svg("text", { x: x + 4, y: top + 9, class: "mark-label" }, label));
    }
    this.cursor = svg("line", { y1: top, y2: height - bottom, class: "cursor", visibility: "hidden" });
    picture.append(this.cursor);
    this.plot.replaceChildren(picture);
    this.sx = sx;
    this.reading = drawn;
    this.drawLegend();
    if (this.at !== null) this.move(this.at);
  }

  drawSeries(picture, s, sx, sy) {
    const x = along(this.chart, s, this.axis), layered = this.chart.kind === "stack";
    if (s.low) picture.append(svg("path", { d: bandPath(x, s.low, s.high, sx, sy), ...strokeOf(s, layered ? "layer" : "band") }));
    if (layered) return;
    picture.append(svg("path", { d: linePath(x, s.y, sx, sy), ...strokeOf(s, "line") }));
    if (!s.faint && (s.dots || s.y.filter((v) => v !== null).length <= LOOK.mostDots))
      s.y.forEach((value, i) => {
        if (value !== null && x[i] !== undefined) picture.append(svg("circle", { cx: sx(x[i]), cy: sy(value), r: 2.6, ...coloured(s.style, "dot") }));
      });
  }

  drawLegend() {
    const named = this.chart.series.map((s, i) => [s, i]).filter(([s]) => s.label);
    if (named.length < 2 && !this.chart.series.some((s) => s.dots)) return this.legend.replaceChildren();
    const focused = [...this.legend.children].indexOf(document.activeElement);
    this.legend.replaceChildren(...named.map(([s, i]) => {
      const key = svg("svg", { width: 22, height: 10, "aria-hidden": "true" });
      key.append(this.chart.kind === "stack"
        ? svg("rect", { width: 22, height: 10, ...strokeOf(s, "layer") })
        : svg("line", { x1: 0, x2: 22, y1: 5, y2: 5, ...strokeOf(s, "line") }));
      return el("button", {
        type: "button", "aria-pressed": String(!this.hidden.has(i)), title: "show or hide",
        onclick: () => { this.hidden.has(i) ? this.hidden.delete(i) : this.hidden.add(i); this.draw(); },
      }, key, s.label);
    }));
    if (focused >= 0) this.legend.children[focused]?.focus();
  }

  /** All x values that can be read, ascending. */
  stops() {
    const found = new Set();
    for (const s of this.reading ?? []) along(this.chart, s, this.axis).forEach((v) => v !== null && found.add(v));
    return [...found].sort((a, b) => a - b);
  }

  point(event) {
    if (!this.sx) return;
    const x = event.clientX - this.plot.getBoundingClientRect().left;
    const stops = this.stops();
    if (stops.length) this.move(stops.reduce((best, v) => (Math.abs(this.sx(v) - x) < Math.abs(this.sx(best) - x) ? v : best)));
  }

  key(event) {
    const stops = this.stops();
    const now = this.at === null ? -1 : stops.indexOf(this.at);
    const next = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: stops.length - 1 }[event.key];
    if (event.key === "Escape") this.move(null);
    if (next === undefined || !stops.length) return;
    event.preventDefault();
    this.move(stops[Math.min(stops.length - 1, Math.max(0, next))]);
  }

  move(value) {
    this.at = value;
    if (!this.cursor) return;
    this.cursor.setAttribute("visibility", value === null ? "hidden" : "visible");
    if (value === null) return this.readout.replaceChildren();
    for (const end of ["x1", "x2"]) this.cursor.setAttribute(end, this.sx(value));
    const parts = [el("b", {}, `${axisLabel(this.chart, this.axis)} ${format(value, 6)}`)];
    for (const s of this.reading) {
      const i = along(this.chart, s, this.axis).indexOf(value);
      const read = i < 0 ? null : (s.value ?? s.y)[i];
      if (read !== null && read !== undefined && s.label) {
        const range = s.low && this.chart.kind !== "stack" ? ` [${format(s.low[i])}, ${format(s.high[i])}]` : "";
        parts.push(el("span", {}, el("i", coloured(s.style, "swatch")), `${s.label} ${format(read)}${range}`));
      }
    }
    this.readout.replaceChildren(...parts);
  }
}

/** Estimates with intervals beside a line of no change. */
class ForestView {
  constructor(forest) {
    this.forest = forest;
    this.plot = el("div", { class: "plot", role: "img", "aria-label": visible(`${forest.title}: ` + forest.rows.map((r) => `${r.label} ${format(r.mean)}`).join(", ")) });
    this.root = el("figure", { class: "chart forest", id: "chart-" + forest.id }, el("h4", {}, forest.title), this.plot);
    if (forest.note) this.root.append(el("figcaption", {}, forest.note));
    new ResizeObserver(() => this.plot.clientWidth !== this.width && this.draw()).observe(this.plot);
  }

  show() {}

  draw() {
    const { rows, neutral, x } = this.forest;
    this.width = this.plot.clientWidth;
    const width = Math.max(260, this.width), line = 26, top = 8, height = top + line * rows.length + 36;
    const widest = (name, size) => Math.max(...rows.map((r) => textWidth(r[name], size)), 30);
    const left = Math.min(width * 0.34, 12 + widest("label", 12.5)), right = 16 + widest("note", 11.5);
    const values = rows.flatMap((r) => [r.mean, r.low, r.high]).filter((v) => v !== null).concat(neutral);
    let [low, high] = [Math.min(...values), Math.max(...values)];
    if (low === high) [low, high] = [low - 0.5, high + 0.5];
    const pad = (high - low) * 0.06, sx = scale(low - pad, high + pad, left, width - right);
    const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
    for (const tick of ticks(low, high, Math.max(2, (width - left - right) / 90), false)) {
      picture.append(svg("line", { x1: sx(tick), x2: sx(tick), y1: top, y2: height - 34, class: "grid" }));
      picture.append(svg("text", { x: sx(tick), y: height - 20, class: "tick", "text-anchor": "middle" }, format(tick, 3)));
    }
    picture.append(svg("line", { x1: sx(neutral), x2: sx(neutral), y1: top, y2: height - 34, class: "level" }));
    picture.append(svg("text", { x: width - right, y: height - 4, class: "axis-label", "text-anchor": "end" }, x));
    rows.forEach((row, i) => {
      const y = top + line * (i + 0.5);
      let label = row.label;
      while (label.length > 2 && textWidth(label, 12.5) > left - 8) label = label.replace(/…$/, "").slice(0, -1) + "…";
      picture.append(svg("text", { x: left - 8, y: y + 4, class: "row-label", "text-anchor": "end" }, label));
      if (row.low !== null) picture.append(svg("line", { x1: sx(row.low), x2: sx(row.high ?? row.mean), y1: y, y2: y, ...coloured(row.style, "interval") }));
      if (row.mean !== null) picture.append(row.censored
        ? svg("path", { d: `M${sx(row.mean) - 4} ${y - 5}l9 5l-9 5z`, ...coloured(row.style, "dot") })
        : svg("circle", { cx: sx(row.mean), cy: y, r: 4.5, ...coloured(row.style, "dot") }));
      picture.append(svg("text", { x: width - right + 8, y: y + 4, class: "row-note" }, row.note));
    });
    this.plot.replaceChildren(picture);
  }
}
