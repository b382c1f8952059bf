// The explorer: windows of one step, a search over all texts, and one window followed over the run.

const MOST_HITS = 60;
const COLUMN_TITLES = { q: "Q", score: "score", weight: "weight", loss: "loss", effect: "effect" };

class ExplorerView {
  constructor(content) {
    this.content = content;
    this.steps = [...new Set(content.step)];
    this.columns = Object.keys(content.columns);
    this.order = content.order;
    this.chosen = null;
    this.slider = el("input", {
      type: "range", min: 0, max: Math.max(0, this.steps.length - 1), value: Math.max(0, this.steps.length - 1),
      step: 1, "aria-label": "step", class: "time", oninput: () => this.showStep(),
    });
    this.where = el("output", { class: "where" });
    this.sort = el("select", { "aria-label": "order", onchange: () => { this.order = this.sort.value; this.showStep(); } },
      this.columns.map((name) => el("option", { value: name, selected: name === this.order }, COLUMN_TITLES[name] ?? name)));
    this.query = el("input", {
      type: "search", placeholder: "search the texts", "aria-label": "search the texts", class: "search",
      oninput: () => this.search(),
    });
    this.count = el("span", { class: "count", role: "status" });
    this.list = el("div", { class: "windows" });
    this.follow = el("div", { class: "follow", hidden: true });
    this.root = el("div", { class: "explorer" },
      el("div", { class: "controls" },
        el("label", {}, "step ", this.slider, this.where), el("label", {}, "order by ", this.sort),
        el("label", {}, this.query), this.count),
      this.follow, this.list);
    this.showStep();
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

  rowsOf(step) {
    const rows = [];
    this.content.step.forEach((s, i) => s === step && rows.push(i));
    const values = this.content.columns[this.order];
    return rows.sort((a, b) => (values[b] ?? -Infinity) - (values[a] ?? -Infinity));
  }

  showStep() {
    const step = this.steps[this.slider.value];
    this.query.value = "";
    this.count.textContent = "";
    this.where.textContent = step === undefined ? "–" : String(step);
    this.slider.setAttribute("aria-valuetext", "step " + step);
    const rows = this.rowsOf(step);
    const title = COLUMN_TITLES[this.order] ?? this.order;
    const middle = Math.ceil(rows.length / 2);
    this.list.replaceChildren(
      el("div", {}, el("h5", {}, `highest ${title}`), rows.slice(0, middle).map((i) => this.card(i))),
      el("div", {}, el("h5", {}, `lowest ${title}, lowest first`), rows.slice(middle).reverse().map((i) => this.card(i))));
  }

  search() {
    const wanted = this.query.value.toLowerCase();
    if (!wanted) return this.showStep();
    const { texts, ids, window } = this.content;
    const hits = new Set();
    ids.forEach((id, i) => ((texts[i] ?? "").toLowerCase().includes(wanted) || id === wanted) && hits.add(i));
    const rows = [], met = new Set();
    window.forEach((w, i) => { if (hits.has(w) && !met.has(w)) { met.add(w); rows.push(i); } });
    this.count.textContent = `${rows.length} window${rows.length === 1 ? "" : "s"}` + (rows.length > MOST_HITS ? `, ${MOST_HITS} shown` : "");
    const cards = rows.slice(0, MOST_HITS).map((i) => this.card(i, wanted));
    const half = Math.ceil(cards.length / 2);
    this.list.replaceChildren(el("div", {}, cards.slice(0, half)), el("div", {}, cards.slice(half)));
  }

  numbers(row) {
    const columns = [this.order, ...this.columns.filter((name) => name !== this.order)];
    return columns.map((name) => {
      const value = this.content.columns[name][row];
      return el("span", { class: name === this.order ? "number by" : "number" }, `${COLUMN_TITLES[name] ?? name} `, el("b", {}, format(value)));
    });
  }

  card(row, wanted = "") {
    const { content } = this, window = content.window[row], topic = content.topic[window];
    const seen = content.seen[window].length;
    return el("article", { class: "window" },
      el("header", {},
        el("span", { class: `source c${content.source[row] % COLOURS}` }, content.sources[content.source[row]]),
        topic >= 0 ? el("span", { class: "topic" }, content.topics[topic]) : null,
        wanted ? el("span", { class: "number" }, "step ", el("b", {}, String(content.step[row]))) : null,
        ...this.numbers(row),
        el("button", { type: "button", class: "to", onclick: () => this.followWindow(window) }, `follow (${seen}×)`)),
      this.text(window, wanted));
  }

  text(window, wanted) {
    const text = (this.content.texts[window] ?? "").replace(/^\s*\n/, "") || "(no text kept; id " + this.content.ids[window] + ")";
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

  followWindow(window) {
    const { content } = this;
    const seen = content.seen[window];
    const rows = seen.map(([step, weight, loss, q]) => [String(step), format(weight), format(loss), format(q)]);
    const close = el("button", { type: "button", onclick: () => { this.follow.hidden = true; } }, "close");
    this.follow.replaceChildren(
      el("h5", {}, `window ${content.ids[window]}, offered ${seen.length} time${seen.length === 1 ? "" : "s"}`, " ", close),
      this.text(window, ""),
      table(["step", "weight", "loss", "Q"], rows));
    this.follow.hidden = false;
    close.focus({ preventScroll: true });
    this.follow.scrollIntoView({ block: "nearest" });
  }
}

function table(header, rows) {
  const number = /^([−+–]|> ?)?\d[\d.,]*( ?[%×]|×10\S+|e[−+]?\d+)?$|^–$|^\[.*\]$/;
  const numeric = header.map((_, i) => i > 0 && rows.length > 0 && rows.every((row) => number.test(row[i].replaceAll("-", "−"))));
  return el("div", { class: "scroll", tabindex: "0" }, el("table", {},
    el("thead", {}, el("tr", {}, header.map((name, i) => el("th", { scope: "col", class: numeric[i] ? "n" : "" }, name)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell, i) =>
      i === 0 ? el("th", { scope: "row" }, cell) : el("td", { class: numeric[i] ? "n" : "" }, cell)))))));
}
