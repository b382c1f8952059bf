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

/** The ranges to draw; `zoom` is the part of the x-axis to show, null for all of it. */
function bounds(series, chart, axis, zoom) {
  const x = zoom ? [...zoom] : [], y = zoom ? [] : chart.levels.map((level) => level[0]);
  if (chart.kind === "stack") y.push(0);
  for (const s of series) {
    const places = along(chart, s, axis);
    const shown = (i) => !zoom || (places[i] >= zoom[0] && places[i] <= zoom[1]);
    places.forEach((value) => value !== null && !zoom && x.push(value));
    for (const values of [s.y, s.low ?? [], s.high ?? []]) values.forEach((v, i) => v !== null && shown(i) && y.push(v));
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

/** Values averaged with a Gaussian of so many points; a gap stays one. */
function smoothed(y, points) {
  const reach = Math.ceil(3 * points);
  const weights = Array.from({ length: reach + 1 }, (_, d) => Math.exp(-0.5 * (d / points) ** 2));
  return y.map((value, i) => {
    if (value === null) return null;
    let sum = 0, total = 0;
    for (let j = Math.max(0, i - reach); j <= Math.min(y.length - 1, i + reach); j++) {
      if (y[j] === null) continue;
      const w = weights[Math.abs(i - j)];
      sum += w * y[j];
      total += w;
    }
    return sum / total;
  });
}

/** Boxes of the labels of a picture, so that none is printed over another. */
class Labels {
  constructor() {
    this.boxes = [];
  }

  /** Whether a text of one line whose box begins at x, y (its top) is free. */
  free(x, y, width) {
    return !this.boxes.some((b) => x < b.x + b.width + 4 && b.x < x + width + 4 && y < b.y + LABEL_LINE && b.y < y + LABEL_LINE);
  }

  take(x, y, width) {
    this.boxes.push({ x, y, width });
  }
}

const LABEL_LINE = 13, LABEL_SIZE = 11.5, MARK_ROWS = 5;
const SMOOTHEST = 0.1; // of a line's length, the width of the Gaussian at the end of the slider
const CHOSEN = new Map(); // chart id → what the reader has zoomed to and hidden, which a refresh keeps

/** A chart that draws itself when it comes into view, and again when its width or the axis changes. */
class ChartView {
  constructor(chart) {
    this.chart = chart;
    if (!CHOSEN.has(chart.id)) CHOSEN.set(chart.id, { hidden: new Set(), zoom: null });
    this.chosen = CHOSEN.get(chart.id);
    this.hidden = this.chosen.hidden;
    this.axis = "step";
    this.smoothing = 0;
    this.at = null;
    this.title = el("h4", {}, chart.title);
    this.plot = el("div", { class: "plot", tabindex: "0", role: "img", "aria-label": this.spoken() });
    this.readout = el("div", { class: "readout", role: "status", "aria-live": "polite" });
    this.legend = el("div", { class: "legend" });
    this.whole = el("button", { type: "button", class: "whole", hidden: true, onclick: () => { this.zoomTo(null); this.plot.focus(); } }, "whole range");
    this.root = el("figure", { class: "chart", id: "chart-" + chart.id }, el("div", { class: "head" }, this.title, this.whole), this.plot, this.readout, this.legend);
    if (chart.note) this.root.append(el("figcaption", {}, chart.note));
    this.plot.addEventListener("pointerdown", (event) => this.grab(event));
    this.plot.addEventListener("pointerup", (event) => this.release(event));
    this.plot.addEventListener("pointercancel", () => this.drop());
    this.plot.addEventListener("dblclick", () => this.zoomTo(null));
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
    return visible(`${this.chart.title}. ${last.join(", ")}. Arrow keys read the values, plus and minus zoom, 0 shows the whole range.`);
  }

  show(axis, smoothing = 0) {
    if (axis !== this.axis && this.seen) this.chosen.zoom = null; // it was in units of the other axis
    this.axis = axis;
    this.smoothing = smoothing;
    if (this.seen) this.draw();
  }

  /** Show a part of the x-axis, [from, to], or all of it. */
  zoomTo(range) {
    this.chosen.zoom = range;
    this.draw();
  }

  draw() {
    const { chart, axis } = this;
    this.width = this.plot.clientWidth;
    const width = Math.max(240, this.width), height = 230;
    const all = chart.kind === "stack" ? stacked({ ...chart, series: chart.series.map((s, i) => (this.hidden.has(i) ? { ...s, y: s.y.map(() => 0) } : s)) }) : chart.series;
    const drawn = all.map((s, i) => ({ ...s, index: i })).filter((s) => !this.hidden.has(s.index));
    const whole = bounds(drawn, chart, axis, null);
    let { zoom } = this.chosen;
    // After a refresh or with another run the part may not be there, or hold no point.
    if (zoom && !drawn.some((s) => along(chart, s, axis).some((v) => v !== null && v >= zoom[0] && v <= zoom[1]))) zoom = this.chosen.zoom = null;
    this.whole.hidden = !zoom;
    const b = zoom ? bounds(drawn, chart, axis, zoom) : whole;
    this.range = [whole.x0, whole.x1];
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
    // A picture of its own cuts off what lies outside of the part shown.
    const [x0, y0, w, h] = [left - 3, top - 3, width - right - left + 6, height - bottom - top + 6]; // whole dots
    const area = svg("svg", { x: x0, y: y0, width: w, height: h, viewBox: `${x0} ${y0} ${w} ${h}` });
    for (const s of drawn) this.drawSeries(area, s, sx, sy);
    picture.append(area);
    const labels = new Labels(), place = { left, right: width - right, top, bottom: height - bottom };
    this.drawLevels(picture, labels, place, sy, drawn); // first: a mark's name has more places to go to
    this.drawMarks(picture, labels, place, sx);
    this.selection = svg("rect", { y: top, height: height - bottom - top, class: "selection", visibility: "hidden" });
    picture.append(this.selection);
    this.cursor = svg("line", { y1: top, y2: height - bottom, class: "cursor", visibility: "hidden" });
    picture.append(this.cursor);
    this.plot.replaceChildren(picture);
    this.sx = sx;
    this.shown = [b.x0, b.x1];
    this.place = place;
    this.reading = drawn;
    this.drawLegend();
    if (this.at !== null) this.move(this.at);
  }

  /** Vertical lines with names that stand one below the other where they would overprint. */
  drawMarks(picture, labels, place, sx) {
    const marks = this.chart.marks.map(([at, label]) => [sx(at[this.axis] ?? Object.values(at)[0]), label]).sort((a, b) => a[0] - b[0]);
    for (const [x, label] of marks) {
      if (x < place.left || x > place.right) continue;
      picture.append(svg("line", { x1: x, x2: x, y1: place.top, y2: place.bottom, class: "mark" }));
      const width = textWidth(label, LABEL_SIZE);
      const from = x + 4 + width > place.right ? x - 4 - width : x + 4;
      const row = [...Array(MARK_ROWS).keys()].find((r) => labels.free(from, place.top + r * LABEL_LINE, width));
      if (row === undefined) continue; // so near to others that its name would not be read
      labels.take(from, place.top + row * LABEL_LINE, width);
      picture.append(svg("text", { x: from, y: place.top + row * LABEL_LINE + 9, class: "mark-label" }, label));
    }
  }

  /** Horizontal lines, named at that end where the curves are farther away, above or below, where it is free. */
  drawLevels(picture, labels, place, sy, drawn) {
    for (const [value, label] of this.chart.levels) {
      const y = sy(value);
      if (!(y >= place.top - 1 && y <= place.bottom + 1)) continue;
      picture.append(svg("line", { x1: place.left, x2: place.right, y1: y, y2: y, class: "level" }));
      const away = (end) => Math.min(...drawn.map((s) => Math.abs(sy(end(s.y.filter((v) => v !== null)) ?? Infinity) - y)));
      const first = this.chart.kind !== "stack" && away((v) => v[0]) > away((v) => v.at(-1));
      const width = textWidth(label, LABEL_SIZE);
      const ends = [place.left + 4, place.right - 2 - width];
      const tries = (first ? ends : ends.reverse()).flatMap((x) => [[x, y - 4 - LABEL_LINE + 3], [x, y + 2]]);
      const inside = ([x, at]) => at >= place.top - 10 && at + LABEL_LINE <= place.bottom + 2 && labels.free(x, at, width);
      const [x, at] = tries.find(inside) ?? tries[0];
      labels.take(x, at, width);
      picture.append(svg("text", { x, y: at + LABEL_LINE - 3, class: "level-label" }, label));
    }
  }

  drawSeries(picture, s, sx, sy) {
    const x = along(this.chart, s, this.axis), layered = this.chart.kind === "stack";
    if (s.low) picture.append(svg("path", { d: bandPath(x, s.low, s.high, sx, sy), ...strokeOf(s, layered ? "layer" : "band") }));
    if (layered) return;
    const points = this.smoothing * SMOOTHEST * s.y.length;
    const smooths = points >= 0.3 && !s.dots;
    picture.append(svg("path", { d: linePath(x, s.y, sx, sy), ...strokeOf(s, smooths ? "line raw" : "line") }));
    if (smooths) picture.append(svg("path", { d: linePath(x, smoothed(s.y, points), sx, sy), ...strokeOf(s, "line smooth") }));
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
    const found = new Set(), { zoom } = this.chosen;
    for (const s of this.reading ?? []) along(this.chart, s, this.axis).forEach((v) => v !== null && (!zoom || (v >= zoom[0] && v <= zoom[1])) && found.add(v));
    return [...found].sort((a, b) => a - b);
  }

  /** Place of an event in the picture, within the axes. */
  within(event) {
    const x = event.clientX - this.plot.getBoundingClientRect().left;
    return Math.min(this.place.right, Math.max(this.place.left, x));
  }

  /** The value of the x-axis at a place of the picture. */
  valueAt(x) {
    const [low, high] = this.shown, { left, right } = this.place;
    return low + ((x - left) / (right - left)) * (high - low);
  }

  grab(event) {
    if (!this.sx || event.button !== 0) return;
    this.from = this.within(event);
    this.plot.setPointerCapture(event.pointerId);
  }

  drop() {
    this.from = null;
    this.selection?.setAttribute("visibility", "hidden");
  }

  release(event) {
    const { from } = this, to = this.sx ? this.within(event) : null;
    this.drop();
    if (from === null || from === undefined || Math.abs(to - from) < 8) return;
    this.zoomTo([this.valueAt(Math.min(from, to)), this.valueAt(Math.max(from, to))]);
  }

  /** Halve or double the part that is shown, around what is read or its middle. */
  zoomBy(factor) {
    const [low, high] = this.shown, centre = this.at ?? (low + high) / 2, half = ((high - low) * factor) / 2;
    const [least, most] = this.range;
    const range = [Math.max(least, centre - half), Math.min(most, centre + half)];
    this.zoomTo(range[0] <= least && range[1] >= most ? null : range);
  }

  point(event) {
    if (!this.sx) return;
    const x = event.clientX - this.plot.getBoundingClientRect().left;
    if (this.from !== null && this.from !== undefined) {
      const to = this.within(event);
      this.selection.setAttribute("x", Math.min(this.from, to));
      this.selection.setAttribute("width", Math.abs(to - this.from));
      this.selection.setAttribute("visibility", "visible");
    }
    const stops = this.stops();
    if (stops.length) this.move(stops.reduce((best, v) => (Math.abs(this.sx(v) - x) < Math.abs(this.sx(best) - x) ? v : best)));
  }

  key(event) {
    const stops = this.stops();
    const now = this.at === null ? -1 : stops.indexOf(this.at);
    const next = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: stops.length - 1 }[event.key];
    if (event.key === "Escape") this.move(null);
    const zooms = { "+": () => this.zoomBy(0.5), "=": () => this.zoomBy(0.5), "-": () => this.zoomBy(2), 0: () => this.zoomTo(null) }[event.key];
    if (zooms && this.sx && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      return zooms();
    }
    if (next === undefined || !stops.length) return;
    event.preventDefault();
    this.move(stops[Math.min(stops.length - 1, Math.max(0, next))]);
  }

  move(value) {
    this.at = value;
    if (!this.cursor) return;
    const { zoom } = this.chosen;
    if (value !== null && zoom && (value < zoom[0] || value > zoom[1])) value = this.at = null;
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
    const values = rows.flatMap((r) => [r.mean, r.low, r.high, ...(r.points ?? [])]).filter((v) => v !== null).concat(neutral);
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
      for (const point of row.points ?? []) picture.append(svg("circle", { cx: sx(point), cy: y, r: 2, ...coloured(row.style, "dot seed") }));
      if (row.low !== null) picture.append(svg("line", { x1: sx(row.low), x2: sx(row.high ?? row.mean), y1: y, y2: y, ...coloured(row.style, "interval") }));
      if (row.mean !== null) picture.append(row.censored
        ? svg("path", { d: `M${sx(row.mean) - 4} ${y - 5}l9 5l-9 5z`, ...coloured(row.style, "dot") })
        : svg("circle", { cx: sx(row.mean), cy: y, r: 4.5, ...coloured(row.style, "dot") }));
      picture.append(svg("text", { x: width - right + 8, y: y + 4, class: "row-note" }, row.note));
    });
    this.plot.replaceChildren(picture);
  }
}
