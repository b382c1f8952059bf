"""A Langevin search in the retriever's own space: the queries are vectors, and no string is sought."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from curriq.config import LangevinConfig
from curriq.langevin.dynamics import StepRule, gradient_scale
from curriq.langevin.ring_buffer import RingBuffer
from curriq.langevin.samplers import q_metrics
from curriq.langevin.search import Found
from curriq.types import Cost, Reading

CLIMBED = (Reading("query Q gain", "langevin/hard_q_gain", "{:+.1e}"),)


@dataclass(frozen=True, kw_only=True)
class VectorSearch:
    """Langevin dynamics on the unit sphere of the buffer's rows, towards vectors of high Q among those of the
    target's kind.

    The energy of a vector v is Q(v)/τ_sgld + w log p(v), where p is a mixture of von Mises–Fisher densities
    around some of the reward windows' embeddings r_m, log p(v) = log Σ_m exp(v·r_m/τ_rag) but for a constant.
    A step is Eq. 13 followed by the projection onto the sphere; the noise has the expected length σ √ε in
    any dimension. No forward pass is needed but that which embeds the reward windows. The nearest precedent
    moves a set of embeddings by the gradient of a KL divergence (Everaert and Potts 2023, "GIO").

    Attributes:
        q: Q_φ of some rows, with a gradient into them, nats per token.
        start: vectors that the chains begin with, given the buffer.
        anchors: embeddings of reward windows, drawn for this search.
        concentration: 1/τ_rag.
        noise: returns the generator of one search's noise, on the model's device.
        flops: operations of the language model that embed the reward windows.
    """

    config: LangevinConfig
    q: Callable[[Float[Tensor, "n e"]], Float[Tensor, "n"]]
    start: Callable[[RingBuffer], Float[Tensor, "K e"]]
    anchors: Callable[[], Float[Tensor, "m e"]]
    concentration: float
    noise: Callable[[], torch.Generator]
    flops: int
    readings = CLIMBED

    def search(self, buffer: RingBuffer) -> Found:
        c, began = self.config, time.perf_counter()
        rule = StepRule(c.langevin_step_size, c.langevin_limit, c.langevin_gradient, c.langevin_noise_scale)
        generator = self.noise()
        start = self.start(buffer).to(generator.device)
        anchors = self.anchors().to(start) if c.target_pull > 0 else None
        vectors, norms = start, []
        for _ in range(c.langevin_steps):
            gradient = self._gradient(vectors, anchors)[:, None]
            factor, norm = gradient_scale(gradient, rule)
            norms.append(norm.mean())
            moved = vectors + rule.step_size / 2 * (gradient * factor)[:, 0]
            if rule.noise_scale > 0:
                noise = torch.empty_like(moved).normal_(generator=generator) / moved.shape[1] ** 0.5
                moved = moved + rule.step_size**0.5 * rule.noise_scale * noise
            vectors = F.normalize(moved, dim=1)
        with torch.no_grad():
            q, start_q = self.q(vectors).float().cpu(), self.q(start).float().cpu()
        unknown = torch.full_like(q, torch.nan)
        metrics = q_metrics(start_q, q) | {
            "time/search": time.perf_counter() - began,
            "langevin/grad_norm": torch.stack(norms).mean().item(),
            "langevin/start_cosine": (vectors * start).sum(1).mean().item(),
        }
        return Found(
            vectors=vectors.float().cpu().numpy(),
            text=("",) * len(vectors),
            q=q,
            soft_q=unknown,
            start_q=start_q,
            changed=unknown,
            tokens=None,
            metrics=metrics,
            cost=Cost(extra_flops=self.flops),
        )

    def _gradient(self, vectors: Float[Tensor, "K e"], anchors: Float[Tensor, "m e"] | None) -> Tensor:
        """∂E/∂v of each chain, with the part along v taken out, which the projection would undo."""
        leaf = vectors.detach().requires_grad_()
        with torch.enable_grad():
            energy = self.q(leaf).sum() / self.config.energy_temperature
            if anchors is not None:
                near = torch.logsumexp(self.concentration * leaf @ anchors.T, dim=1).sum()
                energy = energy + self.config.target_pull * near
            (gradient,) = torch.autograd.grad(energy, leaf)
        return gradient - (gradient * vectors).sum(1, keepdim=True) * vectors
