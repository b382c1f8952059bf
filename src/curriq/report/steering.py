"""When did the policy select, why not before, and what did it keep? From the log alone."""

from dataclasses import dataclass

import numpy as np

from curriq.report.chart import Table, fixed
from curriq.report.runlog import RunLog
from curriq.runlog.read import Columns

KEPT = {
    "static_score": ("static score (target-likeness, sd)", "+.2f"),
    "loss": ("loss before training on it (nats per token)", ".3f"),
    "difficulty": ("rarity of the tokens (nats per token)", ".3f"),
    "length": ("characters per window", ".1f"),
    "repetition": ("repeated 4-grams", ".1%"),
}
"""Measure of windows → what it is called, and its format."""
EVEN = 1e-3
"""A window whose weight is so near to that of a uniform policy was neither preferred nor passed over."""
FEWEST_TEXTS = 20
"""Texts on either side from which words are compared."""


@dataclass(frozen=True)
class Evidence:
    """What spoke for Q at a probe: its rank correlation with measured effects, and the standard error."""

    step: int
    probes: int  # so far
    correlation: float
    error: float

    @property
    def sentence(self) -> str:
        probes = f"{self.probes} probe{'s' * (self.probes != 1)}"
        return (
            f"{probes}, rank correlation with the measured effects {self.correlation:+.2f} ± {self.error:.2f}"
        )


@dataclass(frozen=True)
class Steering:
    """When a run's policy began to select.

    Attributes:
        steps: of the log.
        rejected_from: first step in which a stream filter rejected a window; None where none did.
        q_from: first step with a finite β; None where Q never had a say.
        share_steered: share of the steps from then on with a finite β.
        opened: the evidence by which the gate opened; None where it never did.
        last: the evidence at the last probe; None without a gate.
        accepted_before: share of the windows read before `q_from` that were accepted.
    """

    steps: int
    rejected_from: int | None
    q_from: int | None
    share_steered: float
    opened: Evidence | None
    last: Evidence | None
    accepted_before: float

    @staticmethod
    def of(columns: Columns) -> "Steering":
        step = columns.full("step")
        read, proposed = (columns.full(f"x/windows_{name}") for name in ("read", "proposed"))
        rejecting = np.flatnonzero(np.diff(read - proposed, prepend=0.0) > 0)
        probed, confidence = columns.raw("gate/confidence")
        opened = np.flatnonzero(confidence > 0)
        finite = np.flatnonzero(~np.isnan(columns.full("policy/beta")))
        if len(probed):  # before, logs of earlier versions have a β that was not solved for
            finite = finite[finite > probed[opened[0]]] if len(opened) else finite[:0]
        q_from = int(finite[0]) if len(finite) else None
        before = len(step) if q_from is None else q_from

        def evidence(index: int) -> Evidence:
            found = (columns.raw(f"gate/{name}")[1][index] for name in ("calibration", "calibration_error"))
            return Evidence(int(step[probed[index]]), index + 1, *map(float, found))

        return Steering(
            steps=len(step),
            rejected_from=int(step[rejecting[0]]) if len(rejecting) else None,
            q_from=None if q_from is None else int(step[q_from]),
            share_steered=len(finite) / max(1, len(step) - before) if len(finite) else 0.0,
            opened=evidence(int(opened[0])) if len(opened) else None,
            last=evidence(len(probed) - 1) if len(probed) else None,
            accepted_before=float(proposed[before - 1] / read[before - 1]) if before and read.any() else 1.0,
        )

    def sentences(self, *, filters: bool, prior: bool) -> list[str]:
        """From which step on the policy selected, by what, and why not before.

        Args:
            filters: the policy is a stream filter.
            prior: a static prior chooses where Q does not.
        """
        if self.last is None:  # without a gate there is nothing that it waited for
            if not filters or self.rejected_from is None:
                return []
            return [f"The filter rejected windows from step {self.rejected_from} on."]
        of = f"of {self.steps}"
        if self.q_from is None or self.opened is None:
            why = f"too little evidence that Q ranks windows rightly ({self.last.sentence})"
            return [f"Q selected in no step {of}: {why}. {self._until('All along', filters, prior)}"]
        found = f"Q selected from step {self.q_from} {of} on: the gate opened after {self.opened.sentence}."
        if self.share_steered < 0.995:
            found += f" It was open in {self.share_steered:.0%} of the steps from there on."
        if self.q_from == 0:
            return [found]
        return [found, self._until("Until then, with too little evidence,", filters, prior)]

    def _until(self, when: str, filters: bool, prior: bool) -> str:
        """What chose where Q did not."""
        if filters and prior and self.accepted_before < 1:
            share = f"{self.accepted_before:.0%} of what was read"
            return f"{when} the static prior alone chose: it accepted {share}."
        if filters:
            return f"{when} every window read was accepted, which is plain training."
        return f"{when} windows were weighed by the static prior." if prior else f"{when} all weighed alike."


def steering_of(run: RunLog) -> list[str]:
    """The sentences of `Steering` for a run."""
    filters = int(run.setting("max_read_ratio", 1)) > 1
    return Steering.of(run.columns).sentences(filters=filters, prior=bool(run.setting("prior", False)))


def what_was_kept(run: RunLog) -> Table | None:
    """What the windows selected have that those read do not, whatever sources they came from; None where the
    log does not tell, as of the windows that only went through a buffer."""
    if run.buffered:
        return None
    found = run.selection.per_step
    rows = []
    read = run.windows_read[run.columns.rows_of(run.selection.step)]
    for name, (label, form) in KEPT.items():
        if f"offered/{name}" not in found:
            continue
        offered, selected = (found[f"{kind}/{name}"] for kind in ("offered", "selected"))
        means = [_mean(offered, read), _mean(selected, np.ones(len(read)))]
        if name == "loss" and run.accepted is not None:
            means[0] = None  # a rejected window has no loss
        if means[1] is not None:
            rows.append([label, *(fixed(mean, form) for mean in means)])
    note = ""
    if words := _words(run):
        note = f"Words that tell them apart: kept {', '.join(words[0])}; passed over {', '.join(words[1])}."
    if not rows:
        return None
    return Table("What it kept, whatever the source", ["mean over windows", "read", "selected"], rows, note)


def _mean(values: np.ndarray, weight: np.ndarray) -> float | None:
    known = ~np.isnan(values)
    total = weight[known].sum()
    return float((values[known] * weight[known]).sum() / total) if total > 0 else None


def _words(run: RunLog) -> tuple[list[str], list[str]] | None:
    """The words most distinctive of the windows that got more than their share, and of the others."""
    if run.topics is None:
        return None
    ratio = run.selection.preferred
    more, less = ratio > 1 + EVEN, ratio < 1 - EVEN  # NaN, a window that is not in the table, is neither
    if min(more.sum(), less.sum()) < FEWEST_TEXTS:
        return None
    words = run.topics.distinctive(more, less)
    return words if all(words) else None
