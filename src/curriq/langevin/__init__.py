"""Algorithm 2, Langevin-RAG: windows retrieved from a ring buffer by strings of high Q."""

from curriq.langevin.build import build

__all__ = ["build"]
