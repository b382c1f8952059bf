"""Q_φ, its target network, and the TD learning rule of Algorithm 1."""

import copy
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curriq.config import CriticConfig
from curriq.rng import Generators
from curriq.softq.credit import CREDIT_RULES
from curriq.softq.equations import boltzmann, polyak_, soft_value, td_target, uniform_policy
from curriq.softq.replay import Replay
from curriq.types import Features, Metrics, State, Transition

PreviousHidden = Callable[[Transition], Float[Tensor, "1 d"]]


class QNetwork(nn.Module):
    """Eq. 2, Q_φ(s, x) = W2·ReLU(W1·h_x + b1) + b2.

    Args:
        width: d, width of the hidden state h_x.
        hidden: hidden units.
        generator: CPU generator of the initial weights; the global one is left alone.
    """

    def __init__(self, width: int, hidden: int = 32, *, generator: torch.Generator) -> None:
        super().__init__()
        self.layer1 = _linear(width, hidden, generator)
        self.layer2 = _linear(hidden, 1, generator)

    def forward(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n"]:
        # Gaps in Q of 0.001 nats decide the policy and would not survive a caller's bfloat16 autocast.
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(self.layer1.weight.dtype)
            return self.layer2(torch.relu(self.layer1(hidden))).squeeze(-1)


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """nn.Linear with its standard range U(−1/√inputs, 1/√inputs), drawn from `generator`."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    bound = 1 / math.sqrt(inputs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer


def stored_hidden(previous: Transition) -> Float[Tensor, "1 d"]:
    """The sampled action's hidden state as it was at θ_{k−1}, without gradient."""
    return previous.features.hidden[previous.action : previous.action + 1]


class TDCritic:
    """Soft Q-learning with a target network (Algorithm 1).

    Args:
        config: β, γ, τ, learning rate, clipping, credit rule and replay.
        width: d, width of the hidden states.
        device: where φ lies.
        generators: gives the purposes `critic/init` and `critic/replay` a generator each.
        previous_hidden: hidden state of the previous action. The default takes the stored one. For
            TD-into-θ (Section 2.7) pass a function that forwards the action's tokens again with
            gradient, scaled by `td_lambda`: the TD loss is then backpropagated through it exactly
            once, and its gradient on θ is left there, unclipped, for the caller's optimiser.
    """

    needs_reward = True

    def __init__(
        self,
        config: CriticConfig,
        width: int,
        device: torch.device | str,
        generators: Generators,
        previous_hidden: PreviousHidden = stored_hidden,
    ) -> None:
        self.config = config
        self.online = QNetwork(width, config.q_hidden, generator=generators("critic/init")).to(device)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.online.parameters(), lr=config.q_lr)
        self.previous_hidden = previous_hidden
        self.credit = CREDIT_RULES[config.credit]
        self.replay = (
            Replay(config.replay_size, width, device, generators("critic/replay"))
            if config.replay_size
            else None
        )

    @torch.no_grad()
    def values(self, features: Features) -> Float[Tensor, "n"]:
        """q = Q_φ(h) of each window."""
        return self.online(features.hidden)

    def policy(self, q: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        """π = softmax(q/β), Eq. 6."""
        return boltzmann(q, self.config.beta)

    def learn(self, previous: Transition | None, features: Features) -> Metrics:
        """One TD update for the previous transition, bootstrapped on H_k.

        Order: V_k from φ̄ on H_k (Eq. 4) → y (Eq. 3) → TD step of φ on ½(q̂ − y)² → the pair (h, y)
        goes into replay → replay steps of φ → Polyak (Eq. 5). φ̄ moves once per call, after all updates
        of φ; without replay this is Algorithm 1 to the letter.

        Args:
            previous: the finished transition k − 1; None in the first step, which updates nothing.
            features: H_k of all N candidates, at θ_k.

        Returns:
            Metrics under `critic/`; `q_*` describe Q_φ on H_k before the update. The TD entries are
            absent in the first step.

        Raises:
            FloatingPointError: the TD loss or its gradient is not finite; φ has not been updated.
        """
        q = self.values(features)
        with torch.no_grad():
            value = soft_value(self.target(features.hidden), self.config.beta)
        measured = {
            "critic/q_mean": q.mean(),
            "critic/q_std": q.std(correction=0),
            "critic/q_min": q.min(),
            "critic/q_max": q.max(),
            "critic/soft_value": value,
        }
        if previous is None:
            return _to_metrics(measured)

        y = td_target(previous.reward, value, self.config.gamma)
        hidden = self.previous_hidden(previous)
        q_pred = self.credit.predict(previous, self.online, hidden)
        loss = 0.5 * (q_pred - y).square()
        measured |= {
            "critic/td_loss": loss,
            "critic/td_target": y,
            "critic/q_pred": q_pred,
            "critic/grad_norm": self._backward(loss),
        }
        metrics = _to_metrics(measured)  # without replay the only wait for the device
        _require_finite(metrics, previous.reward)
        self.optimizer.step()
        if self.replay is not None:
            self.replay.add(hidden, y)
            metrics["critic/replay_loss"] = self._replay_updates(self.replay)
        polyak_(self.target.parameters(), self.online.parameters(), self.config.polyak_tau)
        return metrics

    def _backward(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Fresh gradient of φ, clipped; returns its norm before clipping."""
        self.optimizer.zero_grad()
        loss.backward()
        return nn.utils.clip_grad_norm_(self.online.parameters(), self.config.q_grad_clip)

    def _replay_updates(self, replay: Replay) -> float:
        """Adam steps on past pairs; returns the mean of their losses before each step."""
        losses = []
        for _ in range(self.config.replay_updates):
            hidden, targets = replay.sample(self.config.replay_batch)
            loss = 0.5 * (self.online(hidden) - targets).square().mean()
            self._backward(loss)
            self.optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean().item()

    def state_dict(self) -> State:
        return {
            "online": self.online.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "replay": None if self.replay is None else self.replay.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        self.online.load_state_dict(state["online"])
        self.target.load_state_dict(state["target"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.replay is not None:
            self.replay.load_state_dict(state["replay"])


class NoCritic:
    """For methods without a Q-function: no values, a uniform policy, nothing to learn."""

    needs_reward = False

    def values(self, features: Features) -> None:
        return None

    def policy(self, q: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        return uniform_policy(q)

    def learn(self, previous: Transition | None, features: Features) -> Metrics:
        return {}

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None:
        assert not state, "this state belongs to a critic that learns"


def _to_metrics(measured: dict[str, Float[Tensor, ""]]) -> Metrics:
    """All scalars in one transfer from the device."""
    values = torch.stack([value.detach() for value in measured.values()]).tolist()
    return dict(zip(measured, values, strict=True))


def _require_finite(metrics: Metrics, reward: float) -> None:
    if not (math.isfinite(metrics["critic/td_loss"]) and math.isfinite(metrics["critic/grad_norm"])):
        names = ("td_loss", "grad_norm", "q_pred", "td_target", "soft_value")
        context = ", ".join(f"{name} = {metrics['critic/' + name]:.4g}" for name in names)
        raise FloatingPointError(f"the TD update of Q is not finite: {context}, reward = {reward:.4g}")
