// Puts the sections together: the overview of all runs, then those of the chosen run.

const VIEWS = { chart: (b) => new ChartView(b), forest: (b) => new ForestView(b), windows: (b) => new ExplorerView(b), queries: (b) => new QueriesView(b) };

/** A sentence in which `code` is code. */
function sentence(text) {
  return text.split("`").map((part, i) => (i % 2 ? el("code", {}, part) : part));
}

function block(content) {
  if (VIEWS[content.type]) return VIEWS[content.type](content);
  let root;
  if (content.type === "prose") root = el("p", { class: "prose" }, sentence(content.text));
  else if (content.type === "table") root = el("div", { class: widthOf(content.header, content.rows) }, el("h4", {}, content.title), table(content.header, content.rows), content.note ? el("p", { class: "note" }, content.note) : null);
  else {
    const text = el("pre", { tabindex: "0" }, content.text);
    root = content.folded
      ? el("details", { class: "wide" }, el("summary", {}, content.title), text)
      : el("div", { class: "wide" }, el("h4", {}, content.title), text);
  }
  return { root, show() {} };
}

class Page {
  constructor(source) {
    this.read(source);
    this.runIndex = 0;
    // A comparison's curves have no steps: its arms may see different numbers of windows in one.
    const first = this.overview.sections[0]?.blocks.find((b) => b.type === "chart");
    this.axis = !first || first.axes.some((axes) => "step" in axes) ? "step" : "windows";
    this.views = [];
    this.controls();
    this.render();
  }

  /** The data blocks of a document; a run's is parsed when it is chosen. */
  read(source) {
    this.overview = JSON.parse(source.getElementById("overview").textContent);
    this.runs = this.overview.runs.map((label, i) => ({ label, data: source.getElementById("run-" + i) }));
  }

  controls() {
    this.runSelect = document.getElementById("run");
    this.axisSelect = document.getElementById("axis");
    this.fillRuns();
    this.smooth = document.getElementById("smooth");
    this.smooth.value = 0; // a browser may keep the place of a slider over a reload
    this.runSelect.addEventListener("change", () => { this.runIndex = Number(this.runSelect.value); CHOSEN.clear(); this.render(); });
    this.axisSelect.addEventListener("change", () => { this.axis = this.axisSelect.value; this.showAll(); });
    this.smooth.addEventListener("input", () => this.showAll());
    this.axisSelect.append(...Object.entries(LOOK.axes).map(([axis, label]) => el("option", { value: axis }, label)));
    this.axisSelect.value = this.axis;
    const theme = document.getElementById("theme"), dark = matchMedia("(prefers-color-scheme: dark)");
    const paint = () => document.documentElement.setAttribute("data-theme", theme.value === "auto" ? (dark.matches ? "dark" : "light") : theme.value);
    for (const chosen of [theme, dark]) chosen.addEventListener("change", paint);
    paint();
  }

  fillRuns() {
    this.runSelect.replaceChildren(...this.runs.map((run, i) => el("option", { value: i, selected: i === this.runIndex }, run.label)));
    document.getElementById("run-label").hidden = this.runs.length < 2;
  }

  sections() {
    const run = this.runs[this.runIndex];
    const own = run ? JSON.parse(run.data.textContent).sections : [];
    return [...this.overview.sections, ...own];
  }

  render() {
    this.views = [];
    const own = this.runs.length > 1 ? this.runs[this.runIndex].label : "";
    const count = this.overview.sections.length;
    const sections = this.sections();
    const parts = sections.map((section, i) => {
      const grids = [el("div", { class: "grid" })];
      for (const content of section.blocks) {
        if (content.type === "heading") grids.push(el("h3", {}, content.text), el("div", { class: "grid" }));
        else {
          const view = block(content);
          this.views.push(view);
          grids.at(-1).append(view.root);
        }
      }
      return el("section", { id: section.id, "aria-labelledby": "h-" + section.id },
        el("h2", { id: "h-" + section.id }, section.title, own && i >= count ? el("small", {}, own) : null),
        el("p", { class: "answer" }, sentence(section.answer)),
        grids.filter((part) => part.firstChild));
    });
    document.getElementById("report").replaceChildren(...parts);
    const nav = sections.map((section) => el("a", { href: "#" + section.id }, section.title));
    document.getElementById("nav").replaceChildren(...nav);
    document.getElementById("facts").textContent = visible(this.overview.facts);
    this.views.forEach((view) => view.join?.(this.views));
    this.showAll();
  }

  showAll() {
    const level = Number(this.smooth.value) / Number(this.smooth.max);
    this.smooth.setAttribute("aria-valuetext", level ? `${Math.round(100 * level)} %` : "off");
    this.views.forEach((view) => view.show(this.axis, level));
  }

  /** The same page with new data: what the reader has chosen stays. */
  update(source) {
    const open = this.views.filter((v) => v instanceof StepExplorer).map((v) => v.state());
    const place = window.scrollY, label = this.runs[this.runIndex]?.label;
    this.read(source);
    this.runIndex = Math.max(0, this.runs.findIndex((run) => run.label === label));
    this.fillRuns();
    this.render();
    this.views.filter((v) => v instanceof StepExplorer).forEach((v, i) => open[i] && v.restore(open[i]));
    window.scrollTo(0, place);
  }
}

/** Fetch the page again and again while the run goes on; says so when nobody answers. */
function refresh(page, seconds) {
  const state = document.getElementById("live");
  state.hidden = false;
  let version = document.documentElement.getAttribute("data-version");
  const again = async () => {
    try {
      const answer = await fetch(location.pathname, { cache: "no-store" });
      const text = await answer.text();
      if (!answer.ok) throw new Error(text);
      const fresh = new DOMParser().parseFromString(text, "text/html");
      const found = fresh.documentElement.getAttribute("data-version");
      const typing = document.activeElement?.matches?.("input:not(#smooth), select");
      if (found !== version && !typing) { version = found; page.update(fresh); }
      state.textContent = typing ? "live, waits while you choose" : `live, every ${seconds} s`;
      state.className = "live";
    } catch {
      state.textContent = "not live: curriq watch does not answer";
      state.className = "live off";
    }
    setTimeout(again, seconds * 1000);
  };
  setTimeout(again, seconds * 1000);
}

const page = new Page(document);
if (page.overview.live) refresh(page, page.overview.live);
document.documentElement.setAttribute("data-ready", "");
