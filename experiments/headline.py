"""Draws the picture at the head of the README: plain training, the best static filter, `recommended`.

    curriq compare experiments/static.toml
    python experiments/headline.py runs/static              # docs/images/headline.png

One panel per stream: the mean validation loss over the seeds against the windows trained on, its range over
the seeds as a band, and the level at which plain training ends. The best static filter is chosen per stream
afterwards, by the windows that it needs to get there (experiments/hindsight.py), so luck is on its side.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np
from hindsight import best_filter
from matplotlib.figure import Figure

from curriq.report import look
from curriq.runlog.read import read_metrics

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "headline.png"
TITLES = {
    "dirty": "prose in code and four kinds of noise",
    "web": "web pages in OCR, chat, languages",
    "wiki": "encyclopedia in novels, reviews, chat",
}


def curves(folder: Path, arm: str, runs: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Windows trained on [e], and the validation loss of each finished seed there [seeds, e], from the runs
    beside the comparison."""
    rows = [
        [
            (row["x/windows_trained"], row["validation/loss"])
            for row in read_metrics(folder / f"{arm}-{run['seed']}")
            if "validation/loss" in row
        ]
        for run in runs
        if run["finished"]
    ]
    found = np.array(rows)
    return found[0, :, 0], found[:, :, 1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", type=Path, help="folder of the comparison and its runs")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--streams", nargs="+", default=list(TITLES))
    options = parser.parse_args()
    found = options.comparison / "comparison.json"
    streams = json.loads(found.read_text(encoding="utf-8"))["streams"]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, stream in zip(figure.subplots(1, len(options.streams)), options.streams, strict=True):
        arms = streams[stream]
        best = best_filter(arms)
        names = {
            "uniform": "plain training",
            best: f"best static filter ({best})",
            "recommended": "recommended",
        }
        for style, (arm, label) in enumerate(names.items()):
            x, y = curves(options.comparison / stream, arm, arms[arm]["runs"])
            axes.plot(x, y.mean(0), color=look.LIGHT[style], label=label, linewidth=1.6)
            axes.fill_between(
                x, y.min(0), y.max(0), color=look.LIGHT[style], alpha=look.BAND_OPACITY, linewidth=0
            )
            if arm == "uniform":
                axes.axhline(y.mean(0)[-1], color="0.4", linewidth=1, linestyle=(0, (2, 2)), zorder=0)
        axes.set_title(TITLES.get(stream, stream), loc="left", fontsize="medium")
        axes.set_xlabel("windows trained on")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    figure.axes[0].set_ylabel("validation loss (nats per token)")
    with matplotlib.rc_context({"svg.hashsalt": "curriq"}):
        figure.savefig(options.picture, dpi=150)
    print(options.picture)


if __name__ == "__main__":
    main()
