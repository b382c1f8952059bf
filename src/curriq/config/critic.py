"""The settings of φ: what Q sees, how it learns, whom it credits, and how sharp its policy is."""

import math
from dataclasses import dataclass
from typing import Literal

from curriq.config.checks import flag, require, require_at_least, require_positive

FeatureName = Literal["last", "mean", "loss", "source", "dsir_score"]
PRE_FORWARD_FEATURES: tuple[FeatureName, ...] = ("source", "dsir_score")
"""Features of a window that need no forward pass."""


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """φ: the Q-network and its soft Bellman learning rule."""

    temperature: Literal["fixed", "fraction", "gated", "learned"] = "fixed"
    """How sharp the policy is: `fixed` at --beta (the paper); `fraction` solves β for the effective batch
    fraction --target-fraction; `gated` does so as far as Q has been seen to rank windows rightly, and is
    uniform before; `learned` moves β as soft actor-critic does, towards the entropy of --target-fraction."""
    beta: float = 1.0
    """β: Boltzmann temperature, in units of Q (nats per token); where `learned` starts."""
    beta_lr: float = 0.01
    """Learning rate of log β with --temperature learned."""
    target_fraction: float = 0.7
    """Effective batch fraction 1/(N‖π‖²) that β is solved for; with `gated` the sharpest one."""
    min_target_accept_rate: float = 0.8
    """Share of the target's own windows that a steered stream would take at its sharpest, if they were in it:
    where all is of the target's kind there is not much to choose. Needs the dsir_score among --q-features; 0
    for no such bound."""
    corr_for_full_sharpness: float = 0.2
    """Rank correlation of Q with the measured effects at which `gated` is as sharp as it may be."""
    uniform_share: float = 0.0
    """ε: share of the weight that is spread evenly over all windows."""
    weight_jitter: float = 0.0
    """If positive, weights vary at random around the policy: concentration of a Dirichlet distribution, low
    for much. For mixture credit, which needs weights that vary."""
    gamma: float = 0.9
    """γ: discount."""
    polyak_tau: float = 0.01
    """τ of Eq. 5: share of the online network in the target network per step."""
    q_lr: float = 1e-3
    """η: Adam's learning rate for φ."""
    q_grad_clip: float = 1.0
    """Greatest global gradient norm of φ."""
    q_hidden: int = 32
    """Hidden units of the Q-network (d → q_hidden → 1); 0 makes Q linear."""
    q_features: tuple[FeatureName, ...] = ("last",)
    """What Q sees of a window, one or more of: `last` (hidden state of the last token, the paper), `mean`
    (of all tokens), `loss`, `source` (which source it is from), `dsir_score` (how like the target's n-grams it
    is). The last two are known before the forward pass."""
    q_layer_norm: bool = False
    """Normalise each hidden state before Q sees it."""
    q_standardise: bool = False
    """Let Q's network learn numbers of size 1: rewards and effects are shifted and scaled by running means,
    and Q starts equal for all windows."""
    q_weight_decay: float = 0.0
    """AdamW's decoupled weight decay for φ."""
    q_weighting: bool = True
    """Weigh the mixture by the policy; off gives the uniform mixture of Eqs. 9–10 while Q still learns."""
    td_into_theta: bool = False
    """Let the TD loss shape θ: the previous action is forwarded again with gradient (Section 2.7)."""
    td_lambda: float = 1.0
    """Scale of the TD gradient that flows into θ."""
    credit: Literal["sampled", "mixture", "counterfactual"] = "sampled"
    """What the TD update holds responsible for a reward: the sampled candidate (the paper), the whole mixture
    through its value Σ π_i Q(h_i), or each probed window by its own measured effect."""
    probe_windows: int = 32
    """Windows whose effects are measured in a step that has a reward; all candidates where they are fewer."""
    probe_decay: float = 0.9
    """Share of the running average of held-out gradients that stays from probe to probe; 0 for none."""
    shuffle_effects: bool = False
    """Ablation: permute the measured effects among the windows of a step, so that they mean nothing."""
    replay_size: int = 0
    """Past (h, y) pairs kept for Q replay; 0 switches replay off."""
    replay_batch: int = 32
    """Pairs per replay update."""
    replay_updates: int = 1
    """Replay updates of φ per step."""

    def __post_init__(self) -> None:
        require(
            0 < self.beta < math.inf,
            f"--beta = {self.beta}: the temperature must be greater than 0 and finite; for a nearly greedy "
            "policy use a small value such as 1e-3, for a uniform mixture --no-q-weighting.",
        )
        require(
            0 <= self.gamma < 1,
            f"--gamma = {self.gamma}: the discount must lie in [0, 1), or the soft value has no fixed "
            "point; a long horizon is 0.99.",
        )
        require(0 < self.polyak_tau <= 1, f"--polyak-tau = {self.polyak_tau}: it must lie in (0, 1].")
        require_positive(q_lr=self.q_lr, q_grad_clip=self.q_grad_clip)
        require_at_least(1, replay_batch=self.replay_batch, replay_updates=self.replay_updates)
        require_at_least(
            0,
            q_hidden=self.q_hidden,
            replay_size=self.replay_size,
            td_lambda=self.td_lambda,
            q_weight_decay=self.q_weight_decay,
            weight_jitter=self.weight_jitter,
        )
        require_at_least(1, probe_windows=self.probe_windows)
        require_positive(beta_lr=self.beta_lr, corr_for_full_sharpness=self.corr_for_full_sharpness)
        require(
            0 < self.target_fraction <= 1,
            f"--target-fraction = {self.target_fraction}: it must be greater than 0 and at most 1, which is "
            "uniform.",
        )
        for name in ("uniform_share", "probe_decay", "min_target_accept_rate"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{flag(name)} = {value}: it must lie in [0, 1).")
        require(
            bool(self.q_features) and len(set(self.q_features)) == len(self.q_features),
            f"--q-features = {list(self.q_features)}: name at least one of last, mean, loss, source "
            "and dsir_score, each once.",
        )
        require(
            self.temperature != "gated" or self.credit == "counterfactual",
            f"--temperature gated with --credit {self.credit}: the governor judges Q by measured "
            "effects, which only --credit counterfactual measures; use it, or --temperature fraction.",
        )
        require(
            not self.shuffle_effects or self.credit == "counterfactual",
            f"--shuffle-effects with --credit {self.credit}: only --credit counterfactual measures effects.",
        )
        require(
            self.credit == "sampled" or not self.td_into_theta,
            f"--credit {self.credit} with --td-into-theta: only the sampled window is forwarded again with "
            "gradient; use --credit sampled, or drop --td-into-theta.",
        )
        require(
            self.credit != "mixture" or self.replay_size == 0,
            f"--credit mixture with --replay-size = {self.replay_size}: replay keeps windows with a target "
            "of their own, which a mixture does not give; use another --credit, or --replay-size 0.",
        )
