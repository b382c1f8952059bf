"""Topic similarity of what is selected to the held-out text, for the log."""

from collections.abc import Callable

import numpy as np
import torch

from curriq.config import RunConfig
from curriq.data import Corpus
from curriq.data.encoder import load_encoder
from curriq.types import Metrics, Step, Windows


class TopicSimilarity:
    """Cosine similarity of a step's windows to the mean embedding of the reward set, every so many steps.

    Args:
        embed: unit vectors of the texts of some windows.
        reward_set: D.
        every: steps between measurements.
    """

    def __init__(self, embed: Callable[[Windows], np.ndarray], reward_set: Windows, every: int) -> None:
        self._embed = embed
        self._every = every
        centre = embed(reward_set).astype(np.float64).mean(0)
        self._topic = centre / max(float(np.linalg.norm(centre)), 1e-12)

    def due(self, step: int) -> bool:
        """Whether a step's windows are embedded, on the model's device."""
        return step % self._every == 0

    def measure(self, step: Step) -> Metrics:
        if not self.due(step.index):
            return {}
        similarity = torch.from_numpy(self._embed(step.trained.windows).astype(np.float64) @ self._topic)
        metrics = {
            "topic/forwarded": similarity.mean().item(),
            "topic/selected": (step.policy @ similarity).item(),
        }
        if step.q is not None and step.action is not None:
            metrics["topic/best_q"] = similarity[step.q.cpu().argmax()].item()
            metrics["topic/action"] = similarity[step.action].item()
        return metrics


def build_topic_similarity(config: RunConfig, corpus: Corpus) -> list[TopicSimilarity]:
    """The probe that the configuration asks for, or none."""
    every = config.log.topic_similarity_every
    if not every:
        return []
    encoder = load_encoder(config.data.topic_encoder)

    def embed(windows: Windows) -> np.ndarray:
        return encoder.encode(corpus.tokenizer.batch_decode(windows.tokens.tolist()))

    return [TopicSimilarity(embed, corpus.held_out.reward, every)]
