"""Draws the picture at the head of the README: plain training, the best static filter, `recommended`.

    python experiments/headline.py                  # docs/images/headline.png, from the published numbers

One panel per stream: the mean validation loss over the seeds against the windows trained on, its range over
the seeds as a band, and the level at which plain training ends. The best static filter is chosen per stream
afterwards, by the windows that it needs to get there (experiments/hindsight.py), so luck is on its side.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
from hindsight import PUBLISHED, best_filter, curves, streams_of
from matplotlib.figure import Figure

from curriq.report import look

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "headline.png"
TITLES = {
    "dirty": "prose in code and four kinds of noise",
    "web": "web pages in OCR, chat, languages",
    "wiki": "encyclopedia in novels, reviews, chat",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", type=Path, nargs="?", default=PUBLISHED / "static.json.gz")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--streams", nargs="+", default=list(TITLES))
    options = parser.parse_args()
    streams = streams_of(options.comparison)
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
            found = list(curves(arms[arm]).values())
            x, y = found[0][0], np.array([losses for _, losses in found])
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
