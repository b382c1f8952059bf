"""Every number and column of a run's log: its name, unit and meaning.

`python -m curriq.runlog.schema > docs/metrics.md` prints the page.
"""

import math
import re
from dataclasses import dataclass
from functools import cache

from curriq.config import did_you_mean


@dataclass(frozen=True)
class Metric:
    """One named number of a row, field of the summary or column of a table.

    Attributes:
        name: the key; `<source>` stands for the name of any source, `<task>/<measure>` for any task and
            measure of the harness. The text before the `<` identifies such a family.
        unit: unit of a number, `–` for a pure number; type of a column.
        doc: the exact meaning.
    """

    name: str
    unit: str
    doc: str

    @property
    def deterministic(self) -> bool:
        """Whether two runs with one seed and one thread count log equal values: not wall time, not memory."""
        return self.unit not in ("seconds", "windows/s", "tokens/s", "bytes", "of peak", "of time")


@dataclass(frozen=True)
class Group:
    """Metrics that belong together, with a text about all of them."""

    title: str
    prose: str
    metrics: tuple[Metric, ...]


def _groups(text: str) -> tuple[Group, ...]:
    """The groups of a text in blocks: `# title`, prose, and rows of `name | unit | meaning`.

    An indented line continues the row above it.
    """
    groups = []
    for block in text.strip().removeprefix("# ").split("\n\n# "):
        title, *lines = re.sub(r"\n +", " ", block).split("\n")
        metrics = tuple(Metric(*line.split(" | ", 2)) for line in lines if " | " in line)
        prose = " ".join(line for line in lines if " | " not in line)
        groups.append(Group(title, prose, metrics))
    return tuple(groups)


GROUPS = _groups("""
# Step and x-axes
Totals up to and including this step. A fair comparison states which of them is held equal.
step | steps | Index k of the step, from 0.
x/windows_read | windows | Windows read from the stream, with those that a filter rejected or a buffer took.
x/windows_proposed | windows | Candidates proposed: N per step.
x/windows_trained | windows | Candidates forwarded and given a mixture weight.
x/effective_windows | windows | Sum over steps of `policy/effective_batch_size`.
x/tokens | tokens | Tokens of the windows in `x/windows_trained`.
x/flops | FLOPs | Operations of the language models for choosing and training: scoring (a reference model's
    too), forward and backward of training, the trunk once more under gradient checkpointing, the reward, and
    TD-into-θ. Excludes the evaluations and the Q-network's own (less than 0.1 % of the rest).
x/seconds | seconds | Wall time of the steps over all resumed parts; no evaluations, checkpoints or logs.

# Training of θ
Measured on the candidates of the step at θ_k, before the update.
train/loss | nats per token | Mixture loss Σ π_i ℓ_i (Eq. 7), the quantity θ descends.
train/mean_loss | nats per token | Unweighted mean of ℓ_i over the forwarded candidates.
train/grad_norm | nats per token | Global gradient norm of θ before clipping.
train/lr | – | Learning rate of θ in this step.
theta_reset | – | 1 when θ was reset after this step to its value at the start of the phase, else 0.

# Reward and held-out loss
All without dropout. Validation is measured every `--eval-every` steps and after the last; other rows lack
its names. The test set is used once, at the end, for the summary.
reward | nats per token | r_k (Eq. 1): mean log-probability under θ_{k+1} of a fresh random subset of M
    windows of the reward set; negative, higher is better. With `--reward paired` its gain over θ_k on the
    same windows. Absent in steps between rewards (`--reward-every`).
held_out/forwards | forward passes | Cost of rewards and probes in this step, in forward passes of one
    window; a backward pass counts as two. Training costs three per window.
validation/initial_loss | nats per token | Mean loss of θ_0 on the validation set, before any step; in the row
    of step 0 alone.
validation/loss | nats per token | Mean loss of θ_{k+1} on the whole validation set.
validation/perplexity | – | exp of `validation/loss`, per token.

# Downstream tasks
Of θ_{k+1} by lm-evaluation-harness, every `--eval-tasks-every` steps and after the last, with
`--eval-tasks`. Other rows lack these names. `<measure>` is the harness's name, such as `acc_norm`.
task/<task>/<measure> | – | The score, over the first `--eval-tasks-limit` examples.
task/<task>/<measure>/stderr | – | Its standard error, where the harness gives one.
task/<task>/<measure>/chance_level | – | Score of guessing: the mean over the examples of 1 over the number
    of choices. For accuracies of tasks with choices only.
time/tasks | seconds | Evaluating the tasks.

# Policy
The mixture weights π over the forwarded candidates, whichever selector set them.
policy/entropy | nats | −Σ π_i log π_i; log N for the uniform mixture.
policy/effective_batch_size | windows | 1/‖π‖²: N for uniform, 1 for one window.
policy/effective_batch_fraction | – | `policy/effective_batch_size` over N.
policy/max_weight | – | Largest π_i.
policy/kl_from_uniform | nats | KL of the policy softmax(score) over the forwarded candidates from uniform;
    where a step trains on windows drawn from the policy, of the policy and not of the draw.
policy/action | – | `row` of a_k in the candidates table: the window that the paper's rule credits.
policy/beta | nats per token | β of this step, where a Q-network sets the policy; absent where it is ∞.
policy/target_accept_rate | – | Share of the reward set's windows that Q would accept next, whatever the prior
    says, at least `--min-target-accept-rate`; in steps that measure effects, where Q sees the static score.

# Critic
Present when the method has a Q-network. Q is on the scale of the reward; without the Bellman target
(`--no-bellman`, `recommended`) on that of measured effects, around 0.
critic/q_mean | nats per token | Mean of Q_φ over the candidates.
critic/q_std | nats per token | Standard deviation of Q_φ over the candidates.
critic/q_min | nats per token | Smallest Q_φ.
critic/q_max | nats per token | Largest Q_φ.
critic/soft_value | nats per token | V_φ̄(s_k) of the target network (Eq. 4).
critic/td_loss | (nats per token)² | ½ (q̂ − y)² of the previous transition, mean over its predictions; with
    `--q-standardise` in units of the squared running scale.
critic/td_target | nats per token | y = (1−γ) r_{k−1} + γ V_φ̄(s_k) (Eq. 3), or 0 with `--no-bellman`; with
    counterfactual credit the mean over the probed windows of y and what their effects add.
critic/q_pred | nats per token | q̂: prediction of φ for the previous transition (mean).
critic/grad_norm | nats per token | Gradient norm of φ before clipping.
critic/theta_grad_norm | nats per token | Norm of the gradient of the TD loss on θ, before it is scaled by
    `--td-lambda` and clipped; with `--td-into-theta`.
critic/effect_correlation | – | Spearman's ρ of Q and the measured effects of this step's probed windows, of
    those that were trained on, before Q has learnt from them; with measured effects, as the next two.
critic/recovered_scale | – | Slope of Q on the effects, each less its step's mean, over about the last 20
    probes: 1 where Q tells two windows as far apart as their effects do, 1/N by the paper's rule.
critic/recovered_scale_error | – | Its standard error.
critic/replay_loss | (nats per token)² | Mean ½ (q̂ − y)² over the replay updates.

# Calibration gate
Whether Q ranks windows as their measured effects do (`--temperature gated`), in the steps with a probe,
after it. Every correlation is measured before Q has learnt from the probe.
gate/rank_correlation | – | Spearman's ρ of Q and the measured effects of this step's probed windows.
gate/calibration | – | Exponentially weighted mean of ρ over the probes so far.
gate/calibration_error | – | Its standard error, from the scatter of the probes.
gate/confidence | – | Lower bound of the calibration over `--corr-for-full-sharpness`, clipped to [0, 1].
gate/target_fraction | – | Effective batch fraction that β is then solved for; with `--max-read-ratio` the
    share that Q accepts of what the prior accepts.

# Prior
Whether measured effects speak against the prior π₀ of a stream filter, in the steps with a probe, after it.
prior/rank_correlation | – | Spearman's ρ of the prior and the measured effects of this step's probed windows.
prior/trust | – | Exponent t of π₀^t: 1 unless the upper confidence bound of the mean ρ is negative.

# Sources and curricula
One column per source of the stream; the two shares each sum to 1 over the sources. *Offered* is what was
read from the stream: behind a stream filter the windows accepted and those rejected, with a retrieval buffer
those that it took in (most of them before the first step), whenever they are retrieved.
data/epoch | epochs | Passes over the training documents begun before this step, by the windows read; on a
    GPU the stream is read some steps ahead.
data/windows_read | windows | Windows read from the stream in this step.
select/offered_share/<source> | – | Share of this step's `data/windows_read` that are from this source;
    absent in a step that read none.
select/weight_share/<source> | – | Share of the mixture weight on this source.
bandit/p_<source> | – | EXP3's probability of the source, after this step's update.
bandit/gain | – | Change of the reward, rescaled to [−1, 1], credited to the drawn arm.
competence/level | – | Share of the difficulty range that is open in this step.

# Topic
Cosine similarity of windows to the mean embedding of the reward set, every `--topic-similarity-every` steps.
topic/forwarded | – | Mean over the forwarded candidates.
topic/selected | – | The same, weighted by the policy.
topic/best_q | – | Of the candidate of greatest Q.
topic/action | – | Of the sampled window a_k.

# Langevin-RAG: the search
Present where queries are searched (`--proposer langevin`, `vector-langevin` and the other samplers) and, as
far as they apply, with `random-queries` and `reward-queries`; only in steps that search, with
`--search-every`. All values of Q are of *hard* tokens unless the name says soft; soft ones are
compared at one temperature, τ_end. docs/langevin.md says how to read them.
langevin/hard_q | nats per token | Mean Q of the queries' tokens.
langevin/hard_q_gain | nats per token | `langevin/hard_q` minus the mean Q of the initial sequences.
langevin/hard_q_sd | nats per token | Standard deviation of Q over the queries.
langevin/hard_q_best | nats per token | Q of the best query.
langevin/random_q | nats per token | Mean Q of 64 fresh sequences of random tokens, of the same length.
langevin/random_soft_q | nats per token | Mean Q at τ_end of as many fresh random logits: one-hot sequences of
    height `--langevin-margin`, as the search begins with.
langevin/above_random | nats per token | `langevin/hard_q` minus `langevin/random_q`.
langevin/above_random_sd | – | The same over the standard deviation of the 64.
langevin/soft_q_gain | nats per token | Mean Q of the soft tokens, end minus beginning, both at τ_end.
langevin/annealed_q_gain | nats per token | The same with the beginning at τ_start, the paper's Q gain: the
    change of temperature moves it even where no token changes.
langevin/tokens_changed | – | Share of the tokens that differ from the initial ones.
langevin/distinct_tokens | – | Distinct tokens of a query over L, mean.
langevin/cosine | – | Mean cosine of the retriever's embeddings of two queries of the step.
langevin/soft_cosine | – | Mean cosine of the soft embeddings ẽ of two chains at τ_end, each flattened (the
    paper's diversity).
langevin/jaccard | – | Mean Jaccard similarity of the token sets of two queries.
langevin/entropy | nats | Mean entropy of p at τ_end after the last step.
langevin/max_prob | – | Mean largest p at τ_end after the last step.
langevin/grad_norm | – | Mean norm of a chain's gradient of the energy before it is clipped or scaled: with
    respect to λ for `langevin`, to the embeddings for the others.
langevin/start_cosine | – | Mean cosine of a vector query with what its chain began with (`vector-langevin`).
langevin/clip_fraction | – | Share of chains and steps above `--langevin-limit`.

# Langevin-RAG: buffer and retrieval
Present with every `--proposer` but `stream`; Q, scores and ranks where there are Q and queries.
buffer/windows | windows | Windows in the ring buffer, including those marked used.
buffer/live | windows | Windows in it that are not marked used.
buffer/refresh_cosine | – | Mean cosine of rows embedded again (`--refresh`) with their previous values.
buffer/refreshed | windows | Rows embedded again in this step.
retrieval/windows | windows | R, windows retrieved.
retrieval/age | steps | Mean time that they had been in the buffer.
retrieval/score | – | Mean inner product of a query and its window.
retrieval/rank | – | Mean rank of the drawn window among the top k; 0 is the nearest.
retrieval/collisions | – | Share of queries whose first draw another query had drawn already.
retrieval/q | nats per token | Mean Q of the retrieved windows (`--retrieval-probe`).
retrieval/buffer_q | nats per token | Mean Q of random windows of the buffer at the same time.
retrieval/q_advantage | nats per token | The first minus the second.

# Custom components
Logged by selectors, samplers and probes that users add.
own/<name> | – | Measured by a selector, sampler or probe that is not part of curriq.

# Time and memory
Wall time of the parts of this step, and memory. These, `time/tasks` and `x/seconds` are the only numbers of a
log that differ between two runs with one seed.
memory/peak | bytes | Most memory so far: allocated by torch on a GPU, otherwise resident in the process.
time/propose | seconds | Getting the candidates; on a GPU what it waits for them beyond its passes.
time/train | seconds | Forward and backward passes over the candidates, and the optimizer's step.
time/propose_share | of time | `time/propose` over `time/step`.
time/ingest | seconds | Fresh windows into the buffer, encoding included.
time/search | seconds | Searching the queries, or measuring Q of the pool.
time/retrieve | seconds | Encoding the queries, searching the buffer, drawing.
time/step | seconds | The whole step, including candidates and reward.
time/reward | seconds | Measuring the reward.
time/probe | seconds | Measurements before the update: effects, paired reward.
time/evaluate | seconds | Measuring the validation loss.
time/checkpoint | seconds | What training waited for saving, when the previous step ended with a save.
time/checkpoint_written | seconds | Until a checkpoint that was written meanwhile was durable; once it is.
checkpoint/bytes | bytes | Size of a checkpoint, of all processes together; once it is saved.
time/windows_per_second | windows/s | Candidates over the step's wall time.
perf/tokens_per_second | tokens/s | Tokens of the windows that were trained on, over the step's wall time.
perf/mfu | of peak | Operations of the step, as in `x/flops`, over its wall time and the peak of all devices
    of the run: of their data sheets, or `--peak-tflops`. Absent where neither says one.
perf/predicted_seconds | seconds | What this step was predicted to take, from the run's first steps, with the
    share of a probe where it has one. Absent until they are measured.
""")
"""The metrics of a step, one row of `metrics.jsonl`."""

TABLES = _groups("""
# The candidates table
`candidates/part-<first step>.parquet`, zstd-compressed, one part per checkpoint; one line per candidate and
step, so that every choice can be audited. A selector that narrows the proposal leaves windows that are
never forwarded: they have no score and no loss, and weight 0. The weights of a step sum to 1.
step | int32 | Index k of the step.
row | int32 | Position in the step's proposal, 0 … N−1; from N on, the windows that the filter rejected.
window_id | int64 | Stable id of the window; equal windows of one source have one id in every run.
source | dictionary | Name of the source.
score | float32 | Log-weight from the selector, unnormalised; null when not forwarded.
weight | float32 | Mixture weight π_i; 0 when not forwarded.
loss | float32 | ℓ_i at θ_k, nats per token; null when not forwarded.
q | float32 | Q_φ(h_i) at φ_k; null when not forwarded or when the method has no Q-network.
effect | float32 | Measured first-order effect of a step on this window alone on the held-out
    log-probability, nats per token, positive is good; null when not probed.
accept_prob | float32 | Acceptance probability of the stream filter; null without one.
static_score | float32 | How target-like the window is by `--static-score`, in standard deviations of the
    stream's latest scores; null where nothing reads it.

# The queries table
`queries/part-<first step>.parquet`, where candidates are retrieved by queries (Langevin-RAG): one line per
query and step, with its text and the window that it drew.
step | int32 | Index k of the step.
query | int32 | Number of the query, 0 … K−1.
text | string | The query, decoded.
q | float32 | Q of its tokens, nats per token; null when the method has no Q-network.
soft_q | float32 | Q at τ_end of the relaxed sequence behind its tokens; null where nothing is relaxed.
start_q | float32 | Q of the tokens that the search began with.
changed | float32 | Share of its tokens that the search changed.
row | int32 | `row` of the candidate that it drew; null when it drew none.
window_id | int64 | Id of that window.
score | float32 | Inner product of the query's and the window's embedding.
window_text | string | Beginning of the window's text.
shortlist | list of int64 | Ids of its `--retrieval-top-k` nearest windows in order; it drew one (Eq. 16).
shortlist_scores | list of float32 | Their inner products with the query's embedding.

# The windows
`windows/part-<first step>.parquet`, zstd-compressed: the tokens behind the ids of the candidates table. At
most `--log-windows-mb` megabytes of tokens are kept, counted uncompressed; 0 keeps none.
window_id | int64 | As in the candidates table; each window is listed here once.
step | int32 | Step in which the window was first proposed or rejected.
tokens | list of T int32 | Its tokens, −1 − id where one is not learnt; `windows/tokenizer.json` decodes them.

# The test losses
`test_losses.parquet`, written when a run is finished: one line per window of the test set, in its order,
which is equal for equal splits. `curriq compare` takes from it the tail and intervals over seeds and text.
window_id | int64 | Id of the window.
loss | float64 | Mean loss of the final θ over its learnt tokens, nats per token; 0 where none is learnt.
tokens | int64 | Its learnt tokens; `test_loss` is the mean with these weights.

# The summary
`summary.json`, written when a run ends or is interrupted. A field that was not measured is absent.
curriq | text | Version that wrote the run.
selector | text | Name of the method or baseline.
seed | – | Seed of the run.
threads | – | CPU threads; equal results need equal thread counts.
finished | true/false | Whether the run reached its last step.
steps | steps | Finished steps.
windows_read | windows | Last `x/windows_read`.
windows_proposed | windows | Last `x/windows_proposed`.
windows_trained | windows | Last `x/windows_trained`.
effective_windows | windows | Last `x/effective_windows`.
tokens | tokens | Last `x/tokens`.
flops | FLOPs | Last `x/flops`.
seconds | seconds | Last `x/seconds`.
epoch | epochs | Last `data/epoch`.
initial_validation_loss | nats per token | `validation/initial_loss`, before any step.
validation_loss | nats per token | Last `validation/loss`.
validation_perplexity | – | Last `validation/perplexity`.
test_loss | nats per token | Mean loss of the final θ on the whole test set.
test_perplexity | – | exp of `test_loss`, per token.
kl_from_uniform | nats | Mean of `policy/kl_from_uniform` over the steps.
probes | – | Steps in which effects of windows were measured beside their Q.
effect_correlation | – | Mean of `critic/effect_correlation` over about the last 20 probes.
effect_correlation_error | – | Its standard error.
recovered_scale | – | Last `critic/recovered_scale`.
recovered_scale_error | – | Last `critic/recovered_scale_error`.
weight_share | – per source | Share of all mixture weight of the run, by source name.
offered_share | – per source | Share of `windows_read` by source name: of all windows read in the run, not the
    mean of the steps' shares.
skipped_rows | – per source | Rows left out by `on_bad_row=skip`, all epochs together, by the name of each
    source that left out any.
data_fingerprint | text | Hash of `fingerprint` in `environment.json`: sources, tokenizer, split and seed.
checkpoint | path | Last checkpoint, relative to the run's folder; null when there is none.
""")
"""The columns of the tables and, last, the fields of `summary.json`."""

CANDIDATES, QUERIES, WINDOWS, TEST_LOSSES, SUMMARY = (table.metrics for table in TABLES)


def metrics() -> list[Metric]:
    """All metrics, in the order of the page."""
    return [metric for group in GROUPS for metric in group.metrics]


def perplexity(loss: float) -> float:
    """exp(loss), kept inside the range of a float."""
    return math.exp(min(loss, 700.0))


@cache
def find(name: str) -> Metric:
    """The definition of a metric; a member of a family finds the family's.

    Raises:
        KeyError: the name is not defined; the message offers the nearest one.
    """
    for metric in metrics():
        prefix, is_family, _ = metric.name.partition("<")
        if name == metric.name or (is_family and name.startswith(prefix) and len(name) > len(prefix)):
            return metric
    hint = did_you_mean(name, (metric.name for metric in metrics()))
    raise KeyError(
        f"unknown metric {name!r}.{hint} A metric of your own has a name like 'own/{name.split('/')[-1]}'."
    )


def page() -> str:
    """The text of `docs/metrics.md`."""
    parts = [PREFACE]
    for group in GROUPS + TABLES:
        lines = ["| name | unit or type | meaning |", "| --- | --- | --- |"]
        for metric in group.metrics:
            varies = "" if metric.deterministic else " *Differs between runs.*"
            lines.append(f"| `{metric.name}` | {metric.unit} | {metric.doc}{varies} |")
        parts += [f"## {group.title}", group.prose, "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


PREFACE = """# What a run logs

<!-- Printed from src/curriq/runlog/schema.py by: python -m curriq.runlog.schema > docs/metrics.md -->

A run's folder holds `metrics.jsonl` (one JSON object per step, the numbers below), `candidates/` (every
window proposed or rejected, as Parquet), `windows/` (their tokens), `parts.jsonl` (the files of these tables
and their hashes), `summary.json` (the result), `test_losses.parquet` (the result by window), `config.toml`
(the settings), `environment.json` (command, versions, machine and hashes of the data), `checkpoints/`, with
Langevin-RAG `queries/`, and, unless switched off, `tensorboard/` with the same names.
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

if __name__ == "__main__":
    print(page(), end="")
