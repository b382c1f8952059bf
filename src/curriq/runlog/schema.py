"""What each number and column of a run's log is, as data; `runlog/schema.py` finds and prints them.

Imports nothing heavy: reports read the definitions without torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from curriq.config import did_you_mean


@dataclass(frozen=True)
class Metric:
    """One named number.

    Attributes:
        name: the key in a row; `<source>` stands for the name of any source, `<task>/<measure>` for any task
            and measure of the harness. A family is told by what stands before the `<`.
        unit: unit of the number, or `–` for a pure number.
        doc: what it is, exactly.
        deterministic: whether two runs with one seed and one thread count log equal values.
    """

    name: str
    unit: str
    doc: str
    deterministic: bool = True


@dataclass(frozen=True)
class Group:
    """Metrics that belong together, with a sentence about all of them."""

    title: str
    prose: str
    metrics: tuple[Metric, ...]


LOSS = "nats per token"

GROUPS = (
    Group(
        "Step and x-axes",
        "Totals since the start of the run, up to and including this step. A fair comparison states which "
        "of them is held equal.",
        (
            Metric("step", "steps", "Index k of the step, from 0."),
            Metric(
                "x/windows_read",
                "windows",
                "Windows taken out of the stream, with those that a steered stream passed over and those "
                "that went into a retrieval buffer.",
            ),
            Metric("x/windows_proposed", "windows", "Candidates proposed: N per step."),
            Metric("x/windows_trained", "windows", "Candidates forwarded and given a mixture weight."),
            Metric("x/effective_windows", "windows", "Sum over steps of `policy/effective_batch_size`."),
            Metric("x/tokens", "tokens", "Tokens of the windows in `x/windows_trained`."),
            Metric(
                "x/flops",
                "FLOPs",
                "Floating-point operations of the language models, spent on choosing and training: scoring "
                "(with a reference model's), forward and backward of training, the trunk once more under "
                "gradient checkpointing, the reward, and TD-into-θ. Not the evaluations, and not the "
                "Q-network's own (a few times d · `--q-hidden` per window, less than 0.1 % of the rest).",
            ),
            Metric(
                "x/seconds",
                "seconds",
                "Wall time of the steps, over all resumed parts; without evaluations, checkpoints and logs.",
                False,
            ),
        ),
    ),
    Group(
        "Training of θ",
        "Measured on the candidates of the step at θ_k, before the update.",
        (
            Metric("train/loss", LOSS, "Mixture loss Σ π_i ℓ_i (Eq. 7), the quantity θ descends."),
            Metric("train/mean_loss", LOSS, "Unweighted mean of ℓ_i over the forwarded candidates."),
            Metric("train/grad_norm", LOSS, "Global gradient norm of θ before clipping."),
            Metric("train/lr", "–", "Learning rate of θ in this step."),
            Metric(
                "theta_reset", "–", "1 when θ was put back after this step to where its phase began, else 0."
            ),
        ),
    ),
    Group(
        "Reward and held-out loss",
        "All without dropout. Validation is measured every `--eval-every` steps and after the last; other "
        "rows lack its names. The test set is touched once, at the end, for the summary.",
        (
            Metric(
                "reward",
                LOSS,
                "r_k (Eq. 1): mean log-probability that θ_{k+1} gives to a fresh random subset of M windows "
                "of the reward set; negative, higher is better. With `--reward paired` its gain over θ_k on "
                "the same windows. Absent in steps between rewards (`--reward-every`).",
            ),
            Metric(
                "held_out/forwards",
                "forward passes",
                "What rewards and probes cost in this step, in forward passes of one window; a backward pass "
                "counts as two. Training costs three per window.",
            ),
            Metric("validation/loss", LOSS, "Mean loss of θ_{k+1} on the whole validation set."),
            Metric("validation/perplexity", "–", "exp of `validation/loss`, per token."),
        ),
    ),
    Group(
        "Downstream tasks",
        "Of θ_{k+1} by lm-evaluation-harness, every `--eval-tasks-every` steps and after the last, with "
        "`--eval-tasks`. Other rows lack these names. `<measure>` is the harness's name, such as `acc_norm`.",
        (
            Metric("task/<task>/<measure>", "–", "The score, over the first `--eval-tasks-limit` examples."),
            Metric("task/<task>/<measure>/stderr", "–", "Its standard error, where the harness gives one."),
            Metric(
                "task/<task>/<measure>/chance_level",
                "–",
                "What guessing scores: the mean over the examples of 1 over the number of choices. Of tasks "
                "with choices and for accuracies only.",
            ),
            Metric("time/tasks", "seconds", "Evaluating the tasks.", False),
        ),
    ),
    Group(
        "Policy",
        "The mixture weights π over the forwarded candidates, whichever selector set them.",
        (
            Metric("policy/entropy", "nats", "−Σ π_i log π_i; log N for the uniform mixture."),
            Metric("policy/effective_batch_size", "windows", "1/‖π‖²: N for uniform, 1 for one window."),
            Metric("policy/effective_batch_fraction", "–", "`policy/effective_batch_size` over N."),
            Metric("policy/max_weight", "–", "Greatest π_i."),
            Metric(
                "policy/beta",
                LOSS,
                "β of this step, where a Q-network sets the policy; absent where it is ∞.",
            ),
            Metric(
                "policy/target_accept_rate",
                "–",
                "Share of the target's own windows (the reward set's) that the next draws of a steered "
                "stream would take, at least `--min-target-accept-rate`; in steps that measure effects, where Q sees "
                "the dsir_score.",
            ),
        ),
    ),
    Group(
        "Critic",
        "Present when the method has a Q-network. Q is on the scale of the reward.",
        (
            Metric("critic/q_mean", LOSS, "Mean of Q_φ over the candidates."),
            Metric("critic/q_std", LOSS, "Standard deviation of Q_φ over the candidates."),
            Metric("critic/q_min", LOSS, "Smallest Q_φ."),
            Metric("critic/q_max", LOSS, "Greatest Q_φ."),
            Metric("critic/soft_value", LOSS, "V_φ̄(s_k) of the target network (Eq. 4)."),
            Metric(
                "critic/td_loss",
                "(nats per token)²",
                "½ (q̂ − y)² of the previous transition, mean over its predictions; with `--q-standardise` in "
                "units of the squared running scale.",
            ),
            Metric(
                "critic/td_target",
                LOSS,
                "y = (1−γ) r_{k−1} + γ V_φ̄(s_k) (Eq. 3), with counterfactual credit the mean over the probed "
                "windows.",
            ),
            Metric("critic/q_pred", LOSS, "q̂: what φ predicted for the previous transition (mean)."),
            Metric("critic/grad_norm", LOSS, "Gradient norm of φ before clipping."),
            Metric("critic/replay_loss", "(nats per token)²", "Mean ½ (q̂ − y)² over the replay updates."),
        ),
    ),
    Group(
        "CalibrationGate",
        "Whether Q ranks windows as their measured effects do (`--temperature gated`), in the steps with "
        "a probe, after it. Every correlation is measured before Q has learnt from the probe.",
        (
            Metric(
                "gate/rank_correlation",
                "–",
                "Spearman's ρ between Q and the measured effects of the probed windows of this step.",
            ),
            Metric("gate/calibration", "–", "Exponentially weighted mean of ρ over the probes so far."),
            Metric("gate/calibration_error", "–", "Its standard error, from the scatter of the probes."),
            Metric(
                "gate/confidence",
                "–",
                "Lower bound of the calibration, as a share of `--corr-for-full-sharpness`, clipped to [0, 1].",
            ),
            Metric(
                "gate/target_fraction",
                "–",
                "Effective batch fraction that β is then solved for; with `--max-read-ratio` the share taken.",
            ),
        ),
    ),
    Group(
        "Sources and curricula",
        "One column per source of the stream; the two shares each sum to 1 over the sources. Offered are the "
        "N candidates of the step, and with `--max-read-ratio` also the windows that were passed over.",
        (
            Metric(
                "data/epoch",
                "epochs",
                "Passes over the training documents begun before this step, by what has been read; on a GPU "
                "the stream is read some steps ahead.",
            ),
            Metric("data/windows_read", "windows", "Windows taken out of the stream in this step."),
            Metric(
                "select/offered_share/<source>",
                "–",
                "Share of the windows offered that are from this source.",
            ),
            Metric("select/weight_share/<source>", "–", "Share of the mixture weight on this source."),
            Metric("bandit/p_<source>", "–", "EXP3's probability of the source, after this step's update."),
            Metric("bandit/gain", "–", "Change of the reward, rescaled to [−1, 1], that the drawn arm got."),
            Metric("competence/level", "–", "Share of the difficulty range that is open in this step."),
        ),
    ),
    Group(
        "Langevin-RAG: the search",
        "Present where queries are searched (`--proposer langevin` and its other samplers) and, as far as "
        "they apply, with `random-queries`. All values of Q are of *hard* tokens unless the name says soft; "
        "soft ones are compared at one temperature, τ_end. docs/langevin.md says how to read them.",
        (
            Metric("langevin/hard_q", LOSS, "Mean Q of the queries' tokens."),
            Metric("langevin/hard_q_gain", LOSS, "`langevin/hard_q` minus the mean Q of the first strings."),
            Metric("langevin/random_q", LOSS, "Mean Q of 64 fresh strings of random tokens, as long."),
            Metric("langevin/above_random", LOSS, "`langevin/hard_q` minus `langevin/random_q`."),
            Metric("langevin/above_random_sd", "–", "The same over the standard deviation of the 64."),
            Metric(
                "langevin/soft_q_gain", LOSS, "Mean Q of the soft tokens, end minus beginning, both at τ_end."
            ),
            Metric("langevin/tokens_changed", "–", "Share of the tokens that differ from the first ones."),
            Metric("langevin/distinct_tokens", "–", "Distinct tokens of a query over L, mean."),
            Metric("langevin/cosine", "–", "Mean cosine of the embeddings of two queries of the step."),
            Metric("langevin/jaccard", "–", "Mean Jaccard similarity of the token sets of two queries."),
            Metric("langevin/entropy", "nats", "Mean entropy of p at τ_end after the last step."),
            Metric("langevin/max_prob", "–", "Mean greatest p at τ_end after the last step."),
            Metric(
                "langevin/grad_norm",
                "–",
                "Mean norm of a chain's gradient of the energy before it is clipped or scaled: with respect "
                "to λ for `langevin`, to the embeddings for the others.",
            ),
            Metric("langevin/clip_fraction", "–", "Share of chains and steps above `--langevin-limit`."),
            Metric("langevin/snap_cosine", "–", "`embedding-langevin`: mean cosine to the nearest token."),
            Metric("langevin/snap_cosine_random", "–", "The same for random Gaussian vectors."),
            Metric("langevin/swap_acceptance", "–", "`swaps`: share of steps whose best swap was better."),
        ),
    ),
    Group(
        "Langevin-RAG: buffer and retrieval",
        "Present with every `--proposer` but `stream`; Q, scores and ranks where there are Q and queries.",
        (
            Metric("buffer/windows", "windows", "Windows in the ring buffer, used ones included."),
            Metric("buffer/live", "windows", "Windows in it that have not been used."),
            Metric(
                "buffer/refresh_cosine",
                "–",
                "Mean cosine of rows embedded anew (`--refresh`) with what they were before.",
            ),
            Metric("retrieval/windows", "windows", "R, windows retrieved."),
            Metric("retrieval/age", "steps", "Mean time that they had been in the buffer."),
            Metric("retrieval/score", "–", "Mean inner product of a query and its window."),
            Metric("retrieval/rank", "–", "Mean rank of the drawn window among the top k; 0 is the nearest."),
            Metric("retrieval/collisions", "–", "Share of queries whose first draw another query had taken."),
            Metric("retrieval/q", LOSS, "Mean Q of the retrieved windows (`--retrieval-probe`)."),
            Metric("retrieval/buffer_q", LOSS, "Mean Q of random windows of the buffer at the same time."),
            Metric("retrieval/q_advantage", LOSS, "The first minus the second."),
        ),
    ),
    Group(
        "Own measurements",
        "Present where the caller of `curriq.run` brings a selector or probes.",
        (Metric("own/<name>", "–", "Measured by a selector or probe that is not part of curriq."),),
    ),
    Group(
        "Time",
        "Wall time of the parts of this step. These and `x/seconds` are the only numbers of a log that "
        "differ between two runs with one seed.",
        (
            Metric("time/propose", "seconds", "Getting the candidates.", False),
            Metric("time/ingest", "seconds", "Fresh windows into the buffer, encoding included.", False),
            Metric("time/search", "seconds", "Searching the queries, or measuring Q of the pool.", False),
            Metric("time/retrieve", "seconds", "Encoding the queries, searching the buffer, drawing.", False),
            Metric("time/step", "seconds", "The whole step, with candidates and reward.", False),
            Metric("time/reward", "seconds", "Measuring the reward.", False),
            Metric(
                "time/probe", "seconds", "What is measured before the update: effects, paired reward.", False
            ),
            Metric("time/evaluate", "seconds", "Measuring the validation loss.", False),
            Metric("time/checkpoint", "seconds", "Saving, when the previous step ended with a save.", False),
            Metric("time/windows_per_second", "windows/s", "Candidates over the step's wall time.", False),
        ),
    ),
)

SUMMARY = (
    Metric("curriq", "text", "Version that wrote the run."),
    Metric("selector", "text", "Name of the method or baseline."),
    Metric("seed", "–", "Seed of the run."),
    Metric("threads", "–", "CPU threads; equal results need equal thread counts."),
    Metric("finished", "true/false", "Whether the run reached its last step."),
    Metric("steps", "steps", "Finished steps."),
    Metric("windows_read", "windows", "Last `x/windows_read`."),
    Metric("windows_proposed", "windows", "Last `x/windows_proposed`."),
    Metric("windows_trained", "windows", "Last `x/windows_trained`."),
    Metric("effective_windows", "windows", "Last `x/effective_windows`."),
    Metric("tokens", "tokens", "Last `x/tokens`."),
    Metric("flops", "FLOPs", "Last `x/flops`."),
    Metric("seconds", "seconds", "Last `x/seconds`.", False),
    Metric("epoch", "epochs", "Last `data/epoch`."),
    Metric("validation_loss", LOSS, "Last `validation/loss`."),
    Metric("validation_perplexity", "–", "Last `validation/perplexity`."),
    Metric("test_loss", LOSS, "Mean loss of the final θ on the whole test set."),
    Metric("test_perplexity", "–", "exp of `test_loss`, per token."),
    Metric("weight_share", "– per source", "Share of all mixture weight of the run, by source name."),
    Metric("offered_share", "– per source", "Share of all candidates of the run, by source name."),
    Metric(
        "data_fingerprint",
        "text",
        "Hash of what `environment.json` lists as `fingerprint`: sources, tokenizer, split and seed.",
    ),
    Metric("checkpoint", "path", "Last checkpoint, relative to the run's folder; null when none stands."),
)
"""Fields of `summary.json`."""

CANDIDATES = (
    ("step", "int32", "Index k of the step."),
    (
        "row",
        "int32",
        "Position of the window in the step's proposal, 0 … N−1; from N on the windows that a steered stream "
        "passed over.",
    ),
    ("window_id", "int64", "Stable id of the window; equal windows of one source have one id in every run."),
    ("source", "dictionary", "Name of the source."),
    ("score", "float32", "Log-weight from the selector, unnormalised; null when not forwarded."),
    ("weight", "float32", "Mixture weight π_i; 0 when not forwarded."),
    ("loss", "float32", "ℓ_i at θ_k, nats per token; null when not forwarded."),
    ("q", "float32", "Q_φ(h_i) at φ_k; null when not forwarded or when the method has no Q-network."),
    (
        "effect",
        "float32",
        "Measured first-order effect of a step on this window alone on the held-out log-probability, nats "
        "per token, positive is good; null when not probed.",
    ),
    (
        "accept_prob",
        "float32",
        "Probability with which a steered stream took it; null where the stream is not steered. In steps "
        "that probe, half of the windows are taken whatever it is.",
    ),
)
"""Columns of the candidates table: name, Arrow type, meaning."""

QUERIES = (
    ("step", "int32", "Index k of the step."),
    ("query", "int32", "Number of the query, 0 … K−1."),
    ("text", "string", "The query, decoded."),
    ("q", "float32", "Q of its tokens, nats per token; null when the method has no Q-network."),
    (
        "soft_q",
        "float32",
        "Q of the relaxed string that its tokens were taken from, at τ_end; null where nothing is relaxed.",
    ),
    ("start_q", "float32", "Q of the tokens that the search began with."),
    ("changed", "float32", "Share of its tokens that the search changed."),
    ("row", "int32", "`row` of the candidate that it drew; null when it drew none."),
    ("window_id", "int64", "Id of that window."),
    ("score", "float32", "Inner product of the query's and the window's embedding."),
    ("window_text", "string", "Beginning of the window's text."),
    (
        "shortlist",
        "list of int64",
        "Ids of its `--retrieval-top-k` nearest windows, nearest first, one of which it drew (Eq. 16).",
    ),
    ("shortlist_scores", "list of float32", "Their inner products with the query's embedding."),
)
"""Columns of the queries table: name, Arrow type, meaning."""
WINDOWS = (
    ("window_id", "int64", "As in the candidates table; each window stands here once."),
    ("step", "int32", "Step in which the window was first offered."),
    ("tokens", "list of T int32", "Its tokens; `windows/tokenizer.json` turns them into text."),
)
"""Columns of the table of windows."""


__all__ = [
    "CANDIDATES",
    "GROUPS",
    "LOSS",
    "QUERIES",
    "SUMMARY",
    "WINDOWS",
    "Group",
    "Metric",
    "find",
    "metrics",
    "page",
    "table",
    "without_times",
]


def metrics() -> list[Metric]:
    """All metrics, in the order of the page."""
    return [metric for group in GROUPS for metric in group.metrics]


@cache
def find(name: str) -> Metric:
    """The definition of a metric; a member of a family finds the family's.

    Raises:
        KeyError: nobody has defined the name; the message offers the nearest one.
    """
    for metric in metrics():
        prefix, is_family, _ = metric.name.partition("<")
        if name == metric.name or (is_family and name.startswith(prefix) and len(name) > len(prefix)):
            return metric
    hint = did_you_mean(name, (metric.name for metric in metrics()))
    raise KeyError(f"unknown metric {name!r}.{hint} Define new ones in curriq/runlog/schema.py.")


def without_times(row: dict[str, float]) -> dict[str, float]:
    """The part of a row that two runs with one seed must agree on bit by bit."""
    return {name: value for name, value in row.items() if find(name).deterministic}


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def page() -> str:
    """The text of `docs/metrics.md`."""
    parts = [PREFACE]
    for group in GROUPS:
        rows = (
            (f"`{m.name}`", m.unit, m.doc + ("" if m.deterministic else " *Differs between runs.*"))
            for m in group.metrics
        )
        parts += [f"## {group.title}", group.prose, table(("name", "unit", "meaning"), rows)]
    columns = ((f"`{name}`", kind, doc) for name, kind, doc in CANDIDATES)
    parts += [CANDIDATES_PROSE, table(("column", "type", "meaning"), columns)]
    columns = ((f"`{name}`", kind, doc) for name, kind, doc in QUERIES)
    parts += [QUERIES_PROSE, table(("column", "type", "meaning"), columns)]
    columns = ((f"`{name}`", kind, doc) for name, kind, doc in WINDOWS)
    parts += [WINDOWS_PROSE, table(("column", "type", "meaning"), columns)]
    fields = ((f"`{m.name}`", m.unit, m.doc) for m in SUMMARY)
    parts += [SUMMARY_PROSE, table(("field", "unit", "meaning"), fields)]
    return "\n\n".join(parts) + "\n"


PREFACE = """# What a run logs

<!-- Printed from src/curriq/runlog/schema.py by: python -m curriq.runlog.writers > docs/metrics.md -->

A run's folder holds `metrics.jsonl` (one JSON object per step, the numbers below), `candidates/` (every
window that was offered, as Parquet), `windows/` (their tokens), `summary.json` (the result),
`config.toml` (the settings), `checkpoints/` and, unless switched off, `tensorboard/` with the same names.
`curriq report RUN` makes one page of it all ([report.md](report.md)). The JSON rows are the truth:
numbers are written so that reading gives back the same bits, and a number that is not finite stops the
run instead of entering the log. Two runs with one seed, one thread count and one machine have equal
rows, except for the numbers marked *Differs between runs*; a resumed run has the rows of a run that was
never interrupted. A name is absent from a row when it was not measured in that step.

Read them without torch:

```python
from curriq.runlog.read import read_candidates, read_metrics, read_summary

rows = read_metrics("runs/soft-q-0")  # list of dicts
table = read_candidates("runs/soft-q-0")  # pyarrow.Table; .to_pandas() when pandas is there
```

All losses are in nats per token. `–` is a pure number."""

CANDIDATES_PROSE = """## The candidates table

`candidates/part-<first step>.parquet`, zstd-compressed, one part per checkpoint; one line per candidate
and step, so that every choice can be audited. A selector that narrows the proposal leaves windows that
are never forwarded: they have no score and no loss, and weight 0. The weights of a step sum to 1."""

QUERIES_PROSE = """## The queries table

`queries/part-<first step>.parquet`, where candidates are retrieved by queries (Langevin-RAG): one line per
query and step, with its text and the window that it drew, so that a person can read what the model went
looking for."""

WINDOWS_PROSE = """## The windows

`windows/part-<first step>.parquet`, zstd-compressed: what the ids of the candidates table stand for. At most
`--log-windows-mb` megabytes of tokens are kept, counted uncompressed; 0 keeps none."""

SUMMARY_PROSE = """## The summary

`summary.json`, written when a run ends or is interrupted. A field that was not measured is absent."""
