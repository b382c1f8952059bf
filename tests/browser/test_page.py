"""The page in a real browser: it draws without an error, its controls work, hostile text does no harm."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.reports import write_run

from curriq.report.chart import Chart, Section
from curriq.report.command import build
from curriq.report.page import render
from curriq.report.runlog import Detail, load_run_log
from curriq.report.watch import LivePage, make_server

playwright = pytest.importorskip(
    "playwright.sync_api", reason="no playwright: the page is not tested in a browser"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: the page is not tested in a browser"),
]
SECONDS = 15
QUERIES = ("rain on the village", "import sys", "old harvest <b>")
HOSTILE = (
    "</script><script>window.harm = 1</script><img src=x onerror='window.harm = 1'> \u202ereversed\u202c ",
    "x" * 1_000_000,
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """A page with whatever went wrong in it."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.page = browser.new_page(**({"viewport": {"width": 1280, "height": 900}} | options))
        self.page.set_default_timeout(SECONDS * 1000)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on(
            "console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None
        )
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)
        self.page.wait_for_selector("html[data-ready]")

    def scroll_through(self) -> None:
        """Bring every chart into view, so that it draws."""
        for chart in self.page.query_selector_all("figure.chart"):
            chart.scroll_into_view_if_needed()
        self.page.wait_for_function(
            "[...document.querySelectorAll('figure.chart .plot')].every(p => p.firstChild)"
        )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with everything that a run can have."""
    folder = write_run(
        tmp_path_factory.mktemp("run"), steps=60, shift=30, effect=True, tasks=True, queries=QUERIES
    )
    (folder / "report.html").write_text(build([folder]).page(), encoding="utf-8")
    return folder / "report.html"


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[Opened]:
    opened = Opened(browser, report.as_uri())
    yield opened
    assert opened.errors == []
    assert opened.requests == [report.as_uri()]  # no network: the file is all there is
    opened.page.close()


def test_every_view_draws(opened: Opened):
    page = opened.page
    opened.scroll_through()
    assert [s.get_attribute("id") for s in page.query_selector_all("main > section")] == [
        *("did-it-help", "learned", "policy", "why", "retrieval", "ran")
    ]
    for chart in page.query_selector_all("figure.chart"):
        assert chart.query_selector("svg path[d^=M], svg circle"), chart.get_attribute("id")
        assert "NaN" not in chart.inner_html(), chart.get_attribute("id")
    assert page.query_selector("#chart-preference .mark-label").text_content() == "stage 2"
    assert page.query_selector("#chart-task-hellaswag-acc_norm .level-label").text_content() == "chance level"


def test_the_axis_changes_in_all_charts(opened: Opened):
    opened.scroll_through()
    labels = "[...document.querySelectorAll('#chart-validation .axis-label')].map(n => n.textContent)"
    assert opened.page.evaluate(labels)[0] == "step"
    opened.page.select_option("#axis", "tokens")
    assert opened.page.evaluate(labels)[0] == "tokens"


def test_step_slider_and_order(opened: Opened):
    page = opened.page
    why = page.locator("#why")
    slider = why.locator("input.time")
    first = why.locator("article.window").first
    slider.focus()
    page.keyboard.press("Home")
    assert why.locator("output.where").text_content() == "0"
    assert why.locator("article.window").count() == 8
    at_zero = first.text_content()
    page.keyboard.press("ArrowRight")
    assert why.locator("output.where").text_content() != "0"
    assert first.text_content() != at_zero
    why.get_by_label("order", exact=True).select_option("weight")
    weights = [float(text) for text in why.locator("article.window .number.by b").all_text_contents()]
    highest, lowest = weights[:4], weights[4:]
    assert highest == sorted(highest, reverse=True)
    assert lowest == sorted(lowest)
    assert min(highest) >= max(lowest)


def test_search_and_follow(opened: Opened):
    why = opened.page.locator("#why")
    why.locator("input.search").fill("HARVEST")
    marks = why.locator("article.window mark").all_text_contents()
    assert marks
    assert set(marks) == {"harvest"}
    assert why.locator(".count").text_content().split()[0] == str(why.locator("article.window").count())
    why.locator("article.window button.to").first.click()
    follow = why.locator(".follow")
    assert "in the log" in follow.text_content()
    assert follow.locator("table").first.locator("tbody tr").count() == int(
        follow.locator("h5").first.text_content().split("in the log ")[1].split()[0]
    )
    why.locator("input.search").fill("no such text anywhere")
    assert why.locator("article.window").count() == 0


def test_queries_beside_their_windows(opened: Opened):
    page = opened.page
    section = page.locator("#retrieval")
    cards = section.locator("article.pair")
    section.locator("input.time").focus()
    page.keyboard.press("Home")
    assert section.locator("output.where").text_content() == "0"
    assert cards.count() == 8
    assert "drew no window" in cards.last.text_content()
    section.get_by_label("order", exact=True).select_option("score")
    scores = section.locator("article.pair .number.by b").all_text_contents()
    assert scores[-1] == "–"
    assert [float(score) for score in scores[:-1]] == sorted(map(float, scores[:-1]), reverse=True)
    section.locator("input.search").fill("VILLAGE")
    marks = section.locator("article.pair mark").all_text_contents()
    assert set(marks) == {"village"}
    assert {len(c.query_selector_all("mark")) > 0 for c in cards.element_handles()} == {True}


def test_a_query_is_followed_to_its_window_and_back_by_keyboard(opened: Opened):
    page = opened.page
    queries, why = page.locator("#retrieval .follow"), page.locator("#why .follow")
    page.locator("#retrieval article.pair button.to").first.focus()
    page.keyboard.press("Enter")
    assert "query 0 of step 59" in queries.text_content()
    assert queries.locator("table").first.locator("thead th").all_text_contents() == [
        *("source", "similarity", "weight", "loss", "Q of the window", "effect")
    ]
    window = queries.locator("h5", has_text="retrieved window").text_content().split()[-1]
    shortlist = queries.locator("details")
    assert not shortlist.locator("table").is_visible()
    shortlist.locator("summary").focus()
    page.keyboard.press("Enter")
    ranks = shortlist.locator("tbody tr")
    assert ranks.first.locator("td").all_text_contents()[2] == "this query"
    chances = [float(row.locator("td").nth(1).text_content()) for row in ranks.all()]
    assert sum(chances) == pytest.approx(1, abs=0.01)
    queries.get_by_role("button", name="why this window?").focus()
    page.keyboard.press("Enter")
    assert f"window {window}, in the log" in why.text_content()
    assert page.evaluate("document.activeElement.closest('#why') !== null")
    assert why.evaluate("node => node.getBoundingClientRect().top") >= 0
    link = why.locator("table button", has_text="query 0").last
    assert link.is_visible()
    link.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.closest('#retrieval') !== null")
    page.keyboard.press("Enter")  # the button `close` has the focus
    assert queries.is_hidden()
    assert page.evaluate("document.activeElement.closest('#why') !== null")


def test_a_chart_is_read_by_keyboard_and_pointer(opened: Opened):
    page = opened.page
    plot = page.locator("#chart-validation .plot")
    plot.focus()
    page.wait_for_selector("#chart-validation svg")
    page.keyboard.press("Home")
    assert "step 9" in page.locator("#chart-validation .readout").text_content()
    page.keyboard.press("ArrowRight")
    assert "step 19" in page.locator("#chart-validation .readout").text_content()
    page.keyboard.press("Escape")
    assert page.locator("#chart-validation .readout").text_content() == ""
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 20, box["y"] + 50)
    assert "step 59" in page.locator("#chart-validation .readout").text_content()


def ticks(page: Any, chart: str) -> list[float]:
    """The numbers along the x-axis of a chart."""
    found = page.locator(f"#chart-{chart} svg .tick[text-anchor=middle]").all_text_contents()
    return [float(text.replace(",", "")) for text in found]


def test_a_part_of_the_axis_is_dragged_out_and_the_whole_comes_back(opened: Opened):
    opened.scroll_through()
    page = opened.page
    whole = ticks(page, "preference")
    button = page.locator("#chart-preference button.whole")
    assert button.is_hidden()
    plot = page.locator("#chart-preference .plot")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 80)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 90, steps=4)
    assert page.locator("#chart-preference .selection").get_attribute("visibility") == "visible"
    page.mouse.up()
    part = ticks(page, "preference")
    assert max(part) - min(part) < 0.5 * (max(whole) - min(whole))
    page.select_option("#axis", "tokens")  # a part is of one axis
    assert button.is_hidden()
    page.select_option("#axis", "step")
    assert ticks(page, "preference") == whole


def test_zoom_by_keyboard(opened: Opened):
    opened.scroll_through()
    page = opened.page
    whole = ticks(page, "preference")
    page.locator("#chart-preference .plot").focus()
    for _ in range(2):
        page.keyboard.press("+")
    part = ticks(page, "preference")
    assert max(part) - min(part) < 0.4 * (max(whole) - min(whole))
    page.keyboard.press("Home")
    first = float(page.locator("#chart-preference .readout b").text_content().split()[1])
    assert first >= min(whole) + 10  # what is read lies in the part
    page.keyboard.press("-")
    wider = ticks(page, "preference")
    assert max(wider) - min(wider) > max(part) - min(part)
    page.keyboard.press("0")
    assert ticks(page, "preference") == whole
    page.keyboard.press("+")
    page.locator("#chart-preference button.whole").click()
    assert ticks(page, "preference") == whole


def test_smoothing_keeps_the_measured_line_behind(opened: Opened):
    opened.scroll_through()
    page = opened.page

    def roughness(kind: str) -> float:
        """Mean change of direction along a line."""
        path = page.locator(f"#chart-preference path.line{kind}").first.get_attribute("d")
        y = [float(point.split()[1]) for point in path.replace("M", "L").split("L")[1:]]
        return sum(abs(a - 2 * b + c) for a, b, c in zip(y, y[1:], y[2:], strict=False)) / len(y)

    measured = roughness("")
    assert page.locator("#chart-preference path.line.smooth").count() == 0
    page.locator("#smooth").focus()
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    assert page.locator("#smooth").get_attribute("aria-valuetext") == "60 %"
    assert roughness(".raw") == measured
    assert roughness(".smooth") < 0.2 * measured
    page.keyboard.press("Home")
    assert page.locator("#chart-preference path.line.smooth").count() == 0


def test_no_label_is_printed_over_another(browser: Any, tmp_path: Path):
    """Stages that lie near to each other, and a reference line at the top of the picture."""
    run = load_run_log(write_run(tmp_path, steps=60), "run", Detail(topics=0))
    (line,) = run.metric_line("train/loss", "loss")
    steps = (3, 5, 8, 9, 30, 55, 57, 58, 59)
    marks = [({"step": float(step)}, f"stage {i + 2}") for i, step in enumerate(steps)]
    chart = Chart("stages", "Stages", "nats", [line], levels=[(6.0, "as offered")], marks=marks)
    path = tmp_path / "report.html"
    path.write_text(render("t", [Section("one", "One", "answer", [chart])], [], ""), encoding="utf-8")
    for width in (360, 1280):
        opened = Opened(browser, path.as_uri(), viewport={"width": width, "height": 800})
        opened.scroll_through()
        labels = opened.page.locator("#chart-stages .mark-label, #chart-stages .level-label").all()
        boxes = [label.bounding_box() for label in labels]
        assert len(boxes) >= 8
        plot = opened.page.locator("#chart-stages svg").first.bounding_box()
        for i, a in enumerate(boxes):
            assert plot["x"] <= a["x"]
            assert a["x"] + a["width"] <= plot["x"] + plot["width"]
            for b in boxes[:i]:
                apart_x = a["x"] >= b["x"] + b["width"] or b["x"] >= a["x"] + a["width"]
                # A box has the height of the font's tallest letters, some pixels more than these have.
                assert apart_x or abs(a["y"] - b["y"]) >= 12
        assert opened.errors == []
        opened.page.close()


def test_a_line_can_be_hidden(opened: Opened):
    opened.scroll_through()
    button = opened.page.locator("#chart-preference .legend button").first
    lines = opened.page.locator("#chart-preference path.line")
    assert lines.count() == 2
    button.click()
    assert lines.count() == 1
    assert (
        opened.page.locator("#chart-preference .legend button").first.get_attribute("aria-pressed") == "false"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_every_width_and_theme(browser: Any, report: Path, scheme: str, width: int):
    """No sideways scrolling, and text that stands out from its ground by at least 4.5 to 1."""
    opened = Opened(browser, report.as_uri(), viewport={"width": width, "height": 800}, color_scheme=scheme)
    opened.scroll_through()
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    contrast = opened.page.evaluate(
        """() => {
          const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map((v) => v / 255)
            .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
          const ground = light(getComputedStyle(document.body).backgroundColor);
          return ['.answer', 'figcaption', 'nav a', 'h4', '.window .number'].map((s) => {
            const text = light(getComputedStyle(document.querySelector(s)).color);
            return (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05); });
        }"""
    )
    assert min(contrast) >= 4.5
    assert opened.errors == []
    opened.page.close()


def test_hostile_text_does_no_harm(browser: Any, tmp_path: Path):
    write_run(
        tmp_path,
        steps=12,
        sources=("<b onclick=harm()>\u202eevil", "long"),
        texts=HOSTILE,
        queries=HOSTILE,
        window=40,
    )
    path = tmp_path / "report.html"
    path.write_text(build([tmp_path]).page(), encoding="utf-8")
    assert path.stat().st_size < 1e6
    opened = Opened(browser, path.as_uri())
    opened.scroll_through()
    page = opened.page
    assert page.evaluate("window.harm") is None
    assert page.query_selector("main img, main script") is None
    assert page.query_selector("main b[onclick]") is None
    shown = page.locator("main").text_content()
    assert "window.harm = 1" in shown.replace("\n", "")
    assert "\u202e" not in shown
    assert "⟨U+202E⟩evil" in shown
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    asked = page.locator("#retrieval article.pair")
    assert "</script><script>window.harm = 1" in asked.first.text_content()
    asked.first.locator("button.to").click()
    page.locator("#retrieval input.search").fill("<img src=x")
    assert page.locator("#retrieval mark").first.text_content() == "<img src=x"
    assert page.evaluate("window.harm") is None
    assert page.query_selector("main img, main script") is None
    assert opened.errors == []
    page.close()


def test_many_runs_are_chosen_from_a_list(browser: Any, tmp_path: Path):
    folders = [write_run(tmp_path / name, steps=20, seed=seed) for seed, name in enumerate("abc")]
    path = tmp_path / "report.html"
    path.write_text(build(folders).page(), encoding="utf-8")
    opened = Opened(browser, path.as_uri())
    page = opened.page
    assert page.locator("#run option").all_text_contents() == ["a", "b", "c"]
    opened.scroll_through()
    assert page.locator("#chart-validation .legend button").count() == 3
    page.select_option("#run", "2")
    assert page.locator("#learned h2 small").text_content() == "c"
    opened.scroll_through()
    assert opened.errors == []
    page.close()


def test_the_live_page_refreshes_in_place(browser: Any, tmp_path: Path):
    """New steps come in by themselves; the reader's choices stay."""
    write_run(tmp_path, steps=10)
    with make_server(LivePage([tmp_path], 1.0, topics=0, share=1.0).get, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            opened = Opened(browser, f"http://localhost:{server.server_port}/")
            page = opened.page
            page.select_option("#axis", "tokens")
            page.locator("#axis").blur()
            page.locator("#chart-validation .plot").focus()
            page.keyboard.press("End")
            page.keyboard.press("+")
            part = ticks(page, "validation")
            page.locator("#ran .answer", has_text="10 of 10").wait_for()
            log = tmp_path / "metrics.jsonl"
            last = log.read_text().splitlines()[-1]
            with log.open("a") as file:
                file.write(last.replace('"step": 9', '"step": 10') + "\n")
            page.locator("#ran .answer", has_text="11 of 10").wait_for()
            assert page.locator("#axis").input_value() == "tokens"
            assert ticks(page, "validation") == part
            assert "live" in page.locator("#live").text_content()
            assert opened.errors == []
            page.close()
        finally:
            server.shutdown()
            thread.join()


def test_windows_that_a_stream_filter_rejected(browser: Any, tmp_path: Path):
    write_run(tmp_path, steps=20, steered=True)
    path = tmp_path / "report.html"
    path.write_text(build([tmp_path]).page(), encoding="utf-8")
    opened = Opened(browser, path.as_uri())
    opened.scroll_through()
    page = opened.page
    assert page.locator("#chart-accepted").count() == 1
    why = page.locator("#why")
    assert why.locator("output.where").text_content() == "19"
    cards = why.locator("article.window").all_text_contents()
    rejected = [card for card in cards if "rejected" in card]
    assert len(rejected) == len(cards) / 2
    assert all(
        "acceptance probability 0.25" in card and "weight" not in card and "loss" not in card
        for card in rejected
    )
    page.select_option("#axis", "read")
    assert "windows read" in page.locator("#chart-preference .axis-label").all_text_contents()
    assert opened.errors == []
    page.close()
