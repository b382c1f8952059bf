"""Language-model training that learns its own curriculum.

    import curriq

    config = curriq.preset("default").override(steps=50, beta=0.1)
    result = curriq.run(config)

The names below are loaded on first use, so that `import curriq` costs nothing and reading a log
(`curriq.report`) needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curriq.config import RunConfig as RunConfig
    from curriq.config import SourceConfig as SourceConfig
    from curriq.curate.memory import score_documents as score_documents
    from curriq.curate.memory import select_documents as select_documents
    from curriq.curriculum import Curriculum as Curriculum
    from curriq.errors import CurriqError as CurriqError
    from curriq.evaluate.result import read_comparison as read_comparison
    from curriq.lm.examples import example_losses as example_losses
    from curriq.lm.examples import pad_examples as pad_examples
    from curriq.presets import PRESETS as PRESETS
    from curriq.presets import preset as preset
    from curriq.train.run import load_run as load_run
    from curriq.train.run import resume as resume
    from curriq.train.run import train as run

__version__ = "0.1.0"

# Public name → module and name there. No public name may equal a subpackage (`curriq.train` is one):
# importing the subpackage would replace it.
_EXPORTS = {
    "Curriculum": ("curriq.curriculum", "Curriculum"),
    "CurriqError": ("curriq.errors", "CurriqError"),
    "PRESETS": ("curriq.presets", "PRESETS"),
    "RunConfig": ("curriq.config", "RunConfig"),
    "SourceConfig": ("curriq.config", "SourceConfig"),
    "example_losses": ("curriq.lm.examples", "example_losses"),
    "load_run": ("curriq.train.run", "load_run"),
    "pad_examples": ("curriq.lm.examples", "pad_examples"),
    "preset": ("curriq.presets", "preset"),
    "read_comparison": ("curriq.evaluate.result", "read_comparison"),
    "resume": ("curriq.train.run", "resume"),
    "run": ("curriq.train.run", "train"),
    "score_documents": ("curriq.curate.memory", "score_documents"),
    "select_documents": ("curriq.curate.memory", "select_documents"),
}

__all__ = [
    "PRESETS",
    "Curriculum",
    "CurriqError",
    "RunConfig",
    "SourceConfig",
    "example_losses",
    "load_run",
    "pad_examples",
    "preset",
    "read_comparison",
    "resume",
    "run",
    "score_documents",
    "select_documents",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'curriq' has no attribute {name!r}")
    module, attribute = _EXPORTS[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
