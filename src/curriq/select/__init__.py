"""Selectors: the paper's method and every baseline, as scores in one loop."""

from curriq.select.bandit import SourceBandit
from curriq.select.base import RandomK, Uniform, UniformUntil
from curriq.select.competence import Competence
from curriq.select.loss import ByLoss, ExcessLoss, Uncertainty
from curriq.select.soft_q import DirichletNoise, SoftQ

__all__ = [
    "ByLoss",
    "Competence",
    "DirichletNoise",
    "ExcessLoss",
    "RandomK",
    "SoftQ",
    "SourceBandit",
    "Uncertainty",
    "Uniform",
    "UniformUntil",
]
