// The explorer of windows: highest and lowest of one step, and one window followed over the run.

const WINDOW_TITLES = { q: "Q", score: "score", weight: "weight", loss: "loss", effect: "effect", accept_prob: "acceptance probability", static_score: "static score" };

class ExplorerView extends StepExplorer {
  constructor(content) {
    super(content, WINDOW_TITLES, "window", "search the texts");
    this.list.className = "windows";
    this.place = new Map(content.ids.map((id, i) => [id, i]));
    this.showStep();
  }

  /** Meet the explorer of queries, where the run has one. */
  join(views) {
    this.queries = views.find((view) => view instanceof QueriesView);
    if (this.queries) this.showStep();
  }

  drawStep(rows) {
    const title = WINDOW_TITLES[this.order] ?? this.order;
    const middle = Math.ceil(rows.length / 2);
    this.list.replaceChildren(
      el("div", {}, el("h5", {}, `highest ${title}`), rows.slice(0, middle).map((i) => this.card(i))),
      el("div", {}, el("h5", {}, `lowest ${title}, lowest first`), rows.slice(middle).reverse().map((i) => this.card(i))));
  }

  /** One row of each window whose text or id matches. */
  find(wanted) {
    const { texts, ids, window } = this.content;
    const hits = new Set();
    ids.forEach((id, i) => ((texts[i] ?? "").toLowerCase().includes(wanted) || id === wanted) && hits.add(i));
    const rows = [], met = new Set();
    window.forEach((w, i) => { if (hits.has(w) && !met.has(w)) { met.add(w); rows.push(i); } });
    return rows;
  }

  drawHits(rows, wanted) {
    const cards = rows.map((i) => this.card(i, wanted));
    const half = Math.ceil(cards.length / 2);
    this.list.replaceChildren(el("div", {}, cards.slice(0, half)), el("div", {}, cards.slice(half)));
  }

  card(row, wanted = "") {
    const { content } = this, window = content.window[row], topic = content.topic[window];
    const seen = content.seen[window].length, asked = this.askedBy(window).length;
    return el("article", { class: "window" },
      el("header", {},
        this.sourceOf(row),
        topic >= 0 ? el("span", { class: "topic" }, content.topics[topic]) : null,
        wanted ? this.number("step", String(content.step[row])) : null,
        this.forwarded(row) ? null : el("span", { class: "over" }, content.columns.accept_prob?.[row] == null ? "not forwarded" : "rejected"),
        ...this.numbers(row),
        el("button", { type: "button", class: "to", onclick: () => this.followWindow(window) },
          `follow (${seen}×` + (asked ? `, ${asked} quer${asked === 1 ? "y" : "ies"})` : ")"))),
      this.text(this.textOf(window), wanted));
  }

  /** A window that was not has no loss, and no weight to speak of. */
  forwarded(row) {
    const { loss } = this.content.columns;
    return !loss || loss[row] !== null;
  }

  numbers(row) {
    const { columns } = this.content, weighed = this.forwarded(row);
    const shown = (name) => name === this.order || (columns[name][row] !== null && (weighed || name !== "weight"));
    return super.numbers(row, [this.order, ...this.columns.filter((name) => name !== this.order)].filter(shown));
  }

  textOf(window) {
    return begun(this.content.texts[window] ?? "") || "(no text kept; id " + this.content.ids[window] + ")";
  }

  /** Rows of the explorer of queries that drew this window. */
  askedBy(window) {
    return this.queries?.drew(this.content.ids[window]) ?? [];
  }

  followWindow(window) {
    const { content } = this;
    const seen = content.seen[window], asked = this.askedBy(window);
    const rows = seen.map(([step, weight, loss, q]) => [String(step), format(weight), format(loss), format(q)]);
    this.open(
      `window ${content.ids[window]}, in the log ${seen.length} time${seen.length === 1 ? "" : "s"}`,
      this.text(this.textOf(window)),
      table(["step", "weight", "loss", "Q"], rows),
      asked.length ? el("h5", {}, "queries that retrieved it, of those shown in this page") : null,
      asked.length ? this.queries.listed(asked) : null);
  }
}
