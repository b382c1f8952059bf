"""The settings of φ: what Q reads, how it learns, which window it credits, and how sharp its policy is."""

from dataclasses import dataclass
from typing import Annotated, Literal

from curriq.config.checks import (
    Count,
    CountOrZero,
    Fraction,
    NonNegative,
    Pairs,
    Positive,
    Section,
    Share,
    Within,
    require,
)

FeatureName = Literal["last", "mean", "loss", "source", "dsir_score"]
PRE_FORWARD_FEATURES: tuple[FeatureName, ...] = ("source", "dsir_score")
"""Features of a window that need no forward pass."""

_BETA = "; for a nearly greedy policy use a small value such as 1e-3, for a uniform mixture --no-q-weighting"
_GAMMA = ", or the soft value has no fixed point; for a long horizon use 0.99"
_Selected = Annotated[float, Within("(0, 1]", "; 1 selects nothing")]


@dataclass(frozen=True, kw_only=True)
class CriticConfig(Section):
    """φ: the Q-network, its soft Bellman learning rule and the policy over its values."""

    temperature: Literal["fixed", "fraction", "gated", "learned"] = "fixed"
    """How β is set. `fixed`: to --beta (the paper). `fraction`: solved for --effective-batch-fraction, or
    with a stream filter for --accept-fraction. `gated`: as `fraction`, but only as sharp as the rank
    correlation of Q with measured effects warrants. `learned`: by gradient, as in soft actor-critic."""
    beta: Annotated[float, Within("(0, inf)", _BETA)] = 1.0
    """β: Boltzmann temperature, in units of Q (nats per token); the initial one with --temperature
    learned."""
    beta_lr: Positive = 0.01
    """Learning rate of log β with --temperature learned."""
    effective_batch_fraction: _Selected = 0.7
    """Effective batch fraction 1/(N‖π‖²) that β is solved for; with --temperature gated the lowest one."""
    accept_fraction: _Selected = 0.25
    """Fraction of the windows read that the stream filter (--max-read-ratio) accepts; with --temperature
    gated the lowest one."""
    min_target_accept_rate: Share = 0.8
    """Lower bound on the stream filter's mean acceptance probability for the target's own windows, so that it
    does not select among windows that are all on target. Needs dsir_score in --q-features; 0 for no bound."""
    corr_for_full_sharpness: Positive = 0.2
    """Rank correlation of Q with measured effects at which --temperature gated reaches full sharpness."""
    uniform_share: Share = 0.0
    """ε: share of the weight that is spread uniformly over all windows."""
    dirichlet_concentration: NonNegative = 0.0
    """Concentration of Dirichlet noise on the weights, which mixture credit needs: the lower, the more noise;
    0 for no noise."""
    gamma: Annotated[float, Within("[0, 1)", _GAMMA)] = 0.9
    """γ: discount."""
    polyak_tau: Fraction = 0.01
    """τ of Eq. 5: share of the online network that is averaged into the target network per step."""
    q_lr: Positive = 1e-3
    """η: Adam's learning rate for φ."""
    q_grad_clip: Positive = 1.0
    """Maximum global gradient norm of φ."""
    q_hidden: CountOrZero = 32
    """Hidden units of the Q-network (d → q_hidden → 1); 0 makes Q linear."""
    q_features: tuple[FeatureName, ...] = ("last",)
    """Inputs of the Q-network, one or more of: `last` (hidden state of the last token, the paper), `mean`
    (mean hidden state), `loss`, and, known before the forward pass, `source` (which source the window is
    from) and `dsir_score` (n-gram similarity to the target)."""
    q_layer_norm: bool = False
    """Apply layer normalisation to each hidden state before the Q-network."""
    q_standardise: bool = False
    """Standardise rewards and effects by running statistics, and initialise Q to the same value for all
    windows."""
    q_weight_decay: NonNegative = 0.0
    """AdamW's decoupled weight decay for φ."""
    q_weighting: bool = True
    """Weigh the mixture by the policy; off gives the uniform mixture of Eqs. 9–10 while Q still learns."""
    td_into_theta: bool = False
    """Add the gradient of the TD loss to θ's: the previous action is forwarded again (Section 2.7)."""
    td_lambda: NonNegative = 1.0
    """λ of Section 2.7: scale of the TD gradient with respect to θ (not the λ of eligibility traces)."""
    credit: Literal["sampled", "mixture", "counterfactual"] = "sampled"
    """What the TD update credits with a reward: `sampled`, the sampled window (the paper); `mixture`, all
    windows through Σ π_i Q(h_i); `counterfactual`, each probed window with its own measured effect."""
    probe_windows: Count = 32
    """Windows whose effects are measured in each step that has a reward, at most all candidates."""
    probe_decay: Share = 0.9
    """Decay of the running average of held-out gradients from probe to probe; 0 uses each alone."""
    shuffle_effects: bool = False
    """Ablation: permute the measured effects among the windows of a step, so that they say nothing."""
    q_replay_size: CountOrZero = 0
    """Past (h, y) pairs kept to train Q on again; 0 switches this experience replay off."""
    q_replay_batch: Count = 32
    """Pairs per replay update."""
    q_replay_updates: Count = 1
    """Replay updates of φ per step."""

    def check(self) -> None:
        require(
            bool(self.q_features) and len(set(self.q_features)) == len(self.q_features),
            f"--q-features = {list(self.q_features)}: name at least one of last, mean, loss, source "
            "and dsir_score, each once.",
        )

    def illegal_pairs(self) -> Pairs:
        if self.credit != "counterfactual":
            effects = "measured effects need --credit counterfactual; use it, or"
            if self.temperature == "gated":
                yield (
                    "temperature",
                    "credit",
                    f"the gate correlates Q with effects, and {effects} --temperature fraction",
                )
            if self.shuffle_effects:
                yield "shuffle_effects", "credit", f"{effects} drop --shuffle-effects"
        if self.td_into_theta and self.credit != "sampled":
            why = "only the sampled window is forwarded again with gradient"
            yield "td_into_theta", "credit", f"{why}; use --credit sampled, or drop --td-into-theta"
        if self.q_replay_size and self.credit == "mixture":
            why = "replay keeps single windows with targets, and a mixture has one target for all"
            yield "q_replay_size", "credit", f"{why}; use another --credit, or --q-replay-size 0"
