// The explorer of queries: each query of a step beside the window that it drew, and one query followed to it.

const QUERY_TITLES = { q: "Q", soft_q: "soft Q", start_q: "start Q", changed: "changed", score: "similarity" };
const BECAME_TITLES = { weight: "weight", loss: "loss", q: "Q of the window", effect: "effect" };

class QueriesView extends StepExplorer {
  constructor(content) {
    super(content, QUERY_TITLES, "query", "search queries and windows");
    this.showStep();
  }

  /** Meet the explorer of windows: texts that it has are not in the page twice. */
  join(views) {
    this.windows = views.find((view) => view instanceof ExplorerView);
    this.showStep();
  }

  drawStep(rows) {
    this.drawHits(rows);
  }

  drawHits(rows, wanted = "") {
    this.list.replaceChildren(...rows.map((row) => this.card(row, wanted)));
  }

  find(wanted) {
    const { queries, window, ids } = this.content;
    const has = (text) => text.toLowerCase().includes(wanted);
    return [...queries.keys()].filter((row) => {
      const drawn = window[row];
      return has(queries[row]) || (drawn !== null && (ids[drawn] === wanted || has(this.textOf(drawn))));
    });
  }

  /** Rows of the queries that drew the window with this id. */
  drew(id) {
    const place = this.content.ids.indexOf(id);
    return place < 0 ? [] : [...this.content.window.keys()].filter((row) => this.content.window[row] === place);
  }

  /** Index among the windows of the other explorer; undefined where it does not show this one. */
  elsewhere(window) {
    return this.windows?.place.get(this.content.ids[window]);
  }

  textOf(window) {
    const { texts, ids } = this.content, there = this.elsewhere(window);
    const text = texts[window] || (there === undefined ? "" : this.windows.content.texts[there] ?? "");
    return begun(text) || "(no text kept; id " + ids[window] + ")";
  }

  queryOf(row) {
    return begun(this.content.queries[row]) || "(an empty string)";
  }

  card(row, wanted = "") {
    const { content } = this, window = content.window[row];
    return el("article", { class: "window pair" },
      el("div", {},
        el("header", {},
          wanted ? this.number("step", String(content.step[row])) : null,
          ...this.numbers(row),
          el("button", { type: "button", class: "to", onclick: () => this.followQuery(row) }, "follow")),
        this.text(this.queryOf(row), wanted)),
      el("div", {}, window === null ? el("p", { class: "prose" }, "drew no window") : [this.becameHeader(row), this.text(this.textOf(window), wanted)]));
  }

  becameHeader(row) {
    const { became, source } = this.content;
    return el("header", {},
      source[row] >= 0 ? this.sourceOf(row) : null,
      Object.keys(became).map((name) => this.number(BECAME_TITLES[name], became[name][row])));
  }

  followQuery(row) {
    const { content } = this, window = content.window[row];
    const title = `query ${content.number[row]} of step ${content.step[row]}`;
    const asked = el("header", {}, this.numbers(row));
    const query = this.text(this.queryOf(row));
    if (window === null) return this.open(title, asked, query, el("p", { class: "prose" }, "It drew no window: other queries had drawn all of its nearest."), this.shortlist(row));
    const names = Object.keys(content.became), there = this.elsewhere(window);
    const drawn = [content.source[row] < 0 ? "–" : content.sources[content.source[row]],
      format(content.columns.score[row]), ...names.map((name) => format(content.became[name][row]))];
    const others = this.drew(content.ids[window]).filter((other) => other !== row);
    this.open(title, asked, query,
      el("h5", {}, `retrieved window ${content.ids[window]}`),
      table(["source", "similarity", ...names.map((name) => BECAME_TITLES[name])], [drawn]),
      this.text(this.textOf(window)),
      this.shortlist(row),
      there === undefined ? null : el("button", { type: "button", onclick: () => this.windows.followWindow(there) }, "why this window?"),
      others.length ? el("h5", {}, "other queries that retrieved it") : null,
      others.length ? this.listed(others) : null);
  }

  /** The windows nearest to a query, folded: one of them was drawn. Null in a log that did not keep them. */
  shortlist(row) {
    const { content } = this, near = content.shortlist?.windows[row] ?? [];
    if (!near.length) return null;
    const { ids, scores, temperature } = content.shortlist, score = scores[row];
    const mass = score.map((s) => Math.exp((s - score[0]) / temperature));
    const total = mass.reduce((sum, m) => sum + m, 0);
    const rows = near.map((window, rank) => {
      const known = content.ids.indexOf(ids[window]);
      const by = known < 0 ? [] : this.drew(ids[window]).filter((other) => content.step[other] === content.step[row]);
      const text = known < 0 ? "" : this.textOf(known).slice(0, 160);
      return [String(rank), format(score[rank]), ...(temperature ? [format(mass[rank] / total, 3)] : []),
        by.includes(row) ? "this query" : by.length ? `query ${content.number[by[0]]}` : "–", text || `id ${ids[window]}`];
    });
    const head = ["rank", "similarity", ...(temperature ? ["probability (Eq. 16)"] : []), "drawn by", "its text, where this page has it"];
    const drawn = rows.findIndex((cells) => cells.includes("this query"));
    const title = `shortlist: the ${near.length} nearest windows` + (drawn < 0 ? "" : `, of which it drew rank ${drawn}`);
    return el("details", {}, el("summary", {}, title), table(head, rows));
  }

  /** A table of some queries; each leads to what it retrieved. */
  listed(rows) {
    const { content } = this;
    const to = (row) => el("button", { type: "button", onclick: () => this.followQuery(row) }, `query ${content.number[row]}`);
    return table(["step", "query", "text", "Q", "similarity"], rows.map((row) => [
      String(content.step[row]), to(row), content.queries[row], format(content.columns.q?.[row]), format(content.columns.score[row])]));
  }
}
