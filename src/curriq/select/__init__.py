"""Selectors: the paper's method and every baseline, as scores in one loop."""

from curriq.select.bandit import SourceBandit
from curriq.select.competence import Competence
from curriq.select.loss import ByLoss, ExcessLoss, Uncertainty
from curriq.select.soft_q import Jittered, SoftQ
from curriq.select.uniform import RandomK, Uniform, UniformUntil

__all__ = [
    "ByLoss",
    "Competence",
    "ExcessLoss",
    "Jittered",
    "RandomK",
    "SoftQ",
    "SourceBandit",
    "Uncertainty",
    "Uniform",
    "UniformUntil",
]
