// What the explorers share: a step slider, an order, a search over all texts, and a panel that follows one item.

const MOST_HITS = 60;

/** A text without the blank lines that it begins with. */
function begun(text) {
  return text.replace(/^\s*\n/, "");
}

/** The rows of one step, or those that a search finds. A subclass says what a row is and draws it. */
class StepExplorer {
  constructor(content, titles, thing, placeholder) {
    this.content = content;
    this.titles = titles;
    this.thing = thing;
    this.steps = [...new Set(content.step)];
    this.columns = Object.keys(content.columns);
    this.order = content.order;
    this.slider = el("input", {
      type: "range", min: 0, max: Math.max(0, this.steps.length - 1), value: Math.max(0, this.steps.length - 1),
      step: 1, "aria-label": "step", class: "time", oninput: () => this.showStep(),
    });
    this.where = el("output", { class: "where" });
    this.sort = el("select", { "aria-label": "order", onchange: () => { this.order = this.sort.value; this.showStep(); } },
      this.columns.map((name) => el("option", { value: name, selected: name === this.order }, titles[name] ?? name)));
    this.query = el("input", {
      type: "search", placeholder, "aria-label": placeholder, class: "search",
      oninput: () => this.search(),
    });
    this.count = el("span", { class: "count", role: "status" });
    this.list = el("div", { class: "rows" });
    this.follow = el("div", { class: "follow", hidden: true });
    this.root = el("div", { class: "explorer" },
      el("div", { class: "controls" },
        el("label", {}, "step ", this.slider, this.where), el("label", {}, "order by ", this.sort),
        el("label", {}, this.query), this.count),
      this.follow, this.list);
  }

  show() {}

  state() {
    return { step: this.steps[this.slider.value], latest: Number(this.slider.value) === this.steps.length - 1, query: this.query.value, order: this.order };
  }

  restore(state) {
    const place = state.latest ? this.steps.length - 1 : this.steps.indexOf(state.step);
    if (place >= 0) this.slider.value = place;
    if (this.columns.includes(state.order)) this.order = this.sort.value = state.order;
    this.query.value = state.query;
    this.query.value ? this.search() : this.showStep();
  }

  showStep() {
    const step = this.steps[this.slider.value];
    this.query.value = "";
    this.count.textContent = "";
    this.where.textContent = step === undefined ? "–" : String(step);
    this.slider.setAttribute("aria-valuetext", "step " + step);
    const rows = [], values = this.content.columns[this.order];
    this.content.step.forEach((s, i) => s === step && rows.push(i));
    this.drawStep(rows.sort((a, b) => (values[b] ?? -Infinity) - (values[a] ?? -Infinity)));
  }

  search() {
    const wanted = this.query.value.toLowerCase();
    if (!wanted) return this.showStep();
    const rows = this.find(wanted);
    this.count.textContent = `${rows.length} ${rows.length === 1 ? this.thing : this.plural()}` + (rows.length > MOST_HITS ? `, ${MOST_HITS} shown` : "");
    this.drawHits(rows.slice(0, MOST_HITS), wanted);
  }

  plural() {
    return this.thing.replace(/y$/, "ie") + "s";
  }

  numbers(row, names = [this.order, ...this.columns.filter((name) => name !== this.order)]) {
    return names.map((name) => this.number(this.titles[name] ?? name, this.content.columns[name][row], name === this.order));
  }

  number(title, value, by = false) {
    return el("span", { class: by ? "number by" : "number" }, `${title} `, el("b", {}, typeof value === "string" ? value : format(value)));
  }

  sourceOf(row) {
    const { source, sources } = this.content;
    return el("span", coloured(source[row], "source"), sources[source[row]]);
  }

  text(text, wanted = "") {
    const body = el("p", { class: "text", dir: "auto" });
    const lower = text.toLowerCase();
    let from = 0;
    // Where lower-casing changes the length (İ), positions would not match: the text stays unmarked.
    for (let hit = wanted && lower.length === text.length ? lower.indexOf(wanted) : -1; hit >= 0; hit = lower.indexOf(wanted, from)) {
      body.append(visible(text.slice(from, hit)), el("mark", {}, text.slice(hit, hit + wanted.length)));
      from = hit + wanted.length;
    }
    body.append(visible(text.slice(from)));
    return body;
  }

  /** Show what is followed above the rows, and go there; closing leads back to where the reader was. */
  open(title, ...parts) {
    const before = document.activeElement;
    const close = el("button", {
      type: "button",
      onclick: () => { this.follow.hidden = true; if (before?.isConnected) before.focus(); },
    }, "close");
    this.follow.replaceChildren(el("h5", {}, title, " ", close), ...parts.filter(Boolean));
    this.follow.hidden = false;
    close.focus({ preventScroll: true });
    this.follow.scrollIntoView({ block: "nearest" });
  }
}

const NUMBER = /^([−+–]|> ?)?\d[\d.,]*(\/\d+| ?[%×]|×10\S+|e[−+]?\d+)?( [[(].*[\])])?$|^–$|^\[.*\]$/;

/** Which columns hold numbers alone, with what stands in brackets behind them. */
function numericColumns(header, rows) {
  const text = (cell) => (cell instanceof Node ? "" : cell.replaceAll("-", "−"));
  return header.map((_, i) => i > 0 && rows.length > 0 && rows.every((row) => NUMBER.test(text(row[i]))));
}

/** Whether the last column, of four or more, holds sentences: they need room. */
function sentences(rows, i) {
  return i >= 3 && rows.some((row) => i === row.length - 1 && row[i].length > 24);
}

/** How many columns of the page a table takes: its numbers never wrap, its words do. */
function widthOf(header, rows) {
  const numeric = numericColumns(header, rows);
  const pixels = header.reduce((sum, heading, i) => {
    const longest = Math.max(heading.length, ...rows.map((row) => row[i].length));
    return sum + (i === 0 ? 136 : numeric[i] ? 26 + 7 * longest : sentences(rows, i) ? 176 : 90);
  }, 0);
  return pixels > 780 || header.length > 6 ? "wide" : pixels > 380 || header.length > 4 ? "double" : "cell";
}

function table(header, rows) {
  const numeric = numericColumns(header, rows);
  const roomy = sentences(rows, header.length - 1);
  const short = rows.every(([cell]) => typeof cell === "string" && cell.length <= 6);
  return el("div", { class: "scroll", tabindex: "0" }, el("table", short ? { class: "short" } : {},
    el("thead", {}, el("tr", {}, header.map((name, i) => el("th", { scope: "col", class: numeric[i] ? "n" : "" }, name)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell, i) =>
      i === 0 ? el("th", { scope: "row" }, cell) : el("td", { class: numeric[i] ? "n" : roomy && i === row.length - 1 ? "sentence" : "" }, cell)))))));
}
