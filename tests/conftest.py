"""What all tests share: shape checks on, one thread, no network, a cache of their own."""

import importlib.util
import os
import shutil
import signal
import tempfile
from pathlib import Path

import jaxtyping
import pytest

# Set before torch, transformers or tokenizers are imported; tests that start the program pass them on.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"
# What a terminal's owner prefers decides how the program prints, so tests of its output start without it.
os.environ["TERM"] = "xterm"
for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "COLUMNS", "LINES", "TTY_COMPATIBLE"):
    os.environ.pop(name, None)
if hasattr(signal, "SIGHUP"):  # under nohup it is ignored, and children inherit that
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# While tests run, every annotated call and dataclass of the modules that state shapes is checked against its
# types and shapes; as for type checkers, an int is a float too. The other modules are left to ty, and so are
# two whose functions run once per word or document: to check them took a third of the time of a tiny run.
PER_WORD = {"curriq.data.words", "curriq.data.contamination"}
STATING_SHAPES = {
    ".".join(("curriq", *file.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
    for folder in map(Path, importlib.util.find_spec("curriq").submodule_search_locations)
    for file in folder.rglob("*.py")
    if "from jaxtyping import" in file.read_text(encoding="utf-8")
}
CHECKED = sorted(STATING_SHAPES - PER_WORD)
jaxtyping.install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# No power fails here, so nobody waits for the disk, which took a quarter of the time of a tiny run.
# `tests/cli/test_power.py` takes the power from processes of its own.
os.fsync = lambda descriptor: None

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("curriq", deadline=None)  # a busy machine is no failure
settings.load_profile("ci" if os.environ.get("CI") else "curriq")


def pytest_configure(config: pytest.Config) -> None:
    """Give the session an empty cache, so that a stale one cannot make a test pass.

    The workers of pytest-xdist inherit the folder of the session that started them. GPUs are hidden where
    their own tests are left out: equal bits are promised on the CPU alone.
    """
    tiers = config.option.markexpr
    if tiers and ("gpu" not in tiers or "not gpu" in tiers):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not hasattr(config, "workerinput"):
        config.stash[_cache] = os.environ["CURRIQ_CACHE"] = tempfile.mkdtemp(prefix="curriq-cache-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if folder := config.stash.get(_cache, None):
        shutil.rmtree(folder, ignore_errors=True)


_cache = pytest.StashKey[str]()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """One thread per test, also after a test whose run asked for more."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real text and a small pretrained model, for tests that need more than the repository has.

    It is `../shared/data` beside the repository, or $CURRIQ_SHARED_DATA.
    """
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CURRIQ_SHARED_DATA") or beside)
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set CURRIQ_SHARED_DATA to the folder that holds it")
    return folder
