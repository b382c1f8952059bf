"""A control for what is learned from rewards: soft-q whose critic learns from the rewards of other steps.

    curriq train --selector experiments/shuffled_rewards.py:build

Every setting acts as in soft-q. A gain that stays under this control is not the reward's: a policy that
follows whatever spread its Q happens to have gains or loses by chance.
"""

from collections import deque
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from curriq.config import RunConfig
from curriq.select.base import Context, Method
from curriq.select.soft_q import build as build_soft_q
from curriq.state import Saved
from curriq.types import Cost, Critic, Features, Metrics, Step

MEMORY = 40
"""Rewards that one is drawn from."""


@dataclass(eq=False)
class ShuffledRewards(Saved):
    """The critic, which learns from one of the last rewards, less their mean, in place of the step's own.

    The mean would tell how good the policy of the last steps was, and so which windows it drew most.
    """

    SAVED = ("critic", "generator", "recent")

    critic: Critic
    generator: torch.Generator
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=MEMORY))
    needs_reward: bool = True

    def values(self, features: Features) -> Tensor | None:
        return self.critic.values(features)

    def policy(self, q: Tensor, features: Features) -> Tensor:
        return self.critic.policy(q, features)

    def learn(self, previous: Step | None, features: Features) -> tuple[Metrics, Cost]:
        if previous is not None and previous.reward is not None:
            self.recent.append(previous.reward)
            drawn = int(torch.randint(len(self.recent), (), generator=self.generator))
            mean = sum(self.recent) / len(self.recent)
            previous = replace(previous, reward=self.recent[drawn] - mean)
        return self.critic.learn(previous, features)


def build(config: RunConfig, context: Context) -> Method:
    """The method of soft-q around this critic."""
    method = build_soft_q(config, context)
    return replace(method, critic=ShuffledRewards(method.critic, context.generators("shuffled rewards")))
