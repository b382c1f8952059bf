"""`curriq push`: the model of a run on the Hugging Face hub, with a card that says where it comes from."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from curriq.config import load_run_config, require
from curriq.errors import CurriqError
from curriq.parser import Parser
from curriq.runlog.checkpoints import checkpoint_folders
from curriq.runlog.read import read_summary
from curriq.train.export import model_folder

_LATER = "The run stays as it is; push it later."


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status."""
    parser = Parser(
        prog="curriq push",
        description="Upload the model of a run to the Hugging Face hub: weights, tokenizer, and a model card "
        "with its base model, its data sets, its license and its losses.",
        epilog="The token comes from `hf auth login` or from the environment variable HF_TOKEN.",
    )
    parser.add_argument("RUN", type=Path, help="folder of a run")
    parser.add_argument(
        "REPO", metavar="OWNER/NAME", help="the model on the hub; it is made if it is missing"
    )
    parser.add_argument("--private", action="store_true", help="make it visible to its owner alone")
    license_help = "license of the model, such as apache-2.0 (default: that of its base model)"
    parser.add_argument("--license", default="", metavar="ID", help=license_help)
    options = parser.parse_args(list(arguments))
    url = push(options.RUN, options.REPO, private=options.private, license=options.license)
    print(f"model       {url}")
    return 0


def push(run: Path, repo: str, *, private: bool = False, license: str = "", api: Any = None) -> str:
    """Upload the model of a run's newest checkpoint in one commit; returns the address of that commit.

    Args:
        repo: `OWNER/NAME`, made where it is missing.
        private: make it visible to its owner alone; a model that is there already stays as it is.
        license: identifier for the card, such as `apache-2.0`; that of the base model when empty.
        api: a `huggingface_hub.HfApi` of one's own.

    Raises:
        CurriqError: the run holds no whole model, the name is none, nobody is logged in, or the hub cannot be
            reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd

    from curriq.train.model_card import base_model  # with torch, which `--help` need not wait for

    _require_name(repo)
    lm = model_folder(run)
    require(
        lm.parent == checkpoint_folders(run / "checkpoints")[0],
        f"{run}: its newest checkpoint is damaged, and an older model is not pushed instead. `curriq resume "
        f"{run}` trains the steps since then again.",
    )
    api = api or _own_api()
    with _explained(repo):
        card = hub_card(
            run, lm, repo, license or _inherited_license(api, base_model(load_run_config(run).lm.model))
        )
        api.create_repo(repo, private=private, exist_ok=True)
        files = [path for path in sorted(lm.rglob("*")) if path.is_file() and path.name != "README.md"]
        operations = [CommitOperationAdd(path.relative_to(lm).as_posix(), path) for path in files]
        operations.append(CommitOperationAdd("README.md", card.encode()))
        message = f"{lm.parent.name.removeprefix('step-').lstrip('0') or 0} steps of curriq"
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)


def hub_card(run: Path, lm: Path, repo: str, license: str = "") -> str:
    """The model card of a checkpoint as the hub should have it: under its name, with its license and with the
    losses on the test set, which are known after the checkpoint was written."""
    from huggingface_hub import EvalResult, ModelCard

    card = ModelCard((lm / "README.md").read_text(encoding="utf-8"))
    data: Any = card.data  # its fields are those of the YAML
    card.text = card.text.replace('"FOLDER"', f'"{repo}"')
    if license:
        data.license = license
    summary = read_summary(run) if (run / "summary.json").exists() else {}
    if "test_loss" in summary and summary["checkpoint"] == lm.parent.relative_to(run).as_posix():
        target = load_run_config(run).data.target
        measured = {"loss": summary["test_loss"], "perplexity": summary["test_perplexity"]}
        data.model_name = repo.rpartition("/")[2]
        data.eval_results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=target,
                dataset_name=f"{target} (held-out documents)",
                dataset_split="test",
                metric_type=name,
                metric_value=value,
            )
            for name, value in measured.items()
        ]
    return str(card)


def _require_name(repo: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    rule = "it must be OWNER/NAME, of letters, digits, '-', '_' and '.'"
    require(repo.count("/") == 1, f"OWNER/NAME = {repo!r}: {rule}.")
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise CurriqError(f"OWNER/NAME = {repo!r}: {rule}.") from None


def _own_api() -> Any:
    """The hub's own client, when it can work: with a token and a network."""
    from huggingface_hub import HfApi, get_token

    from curriq.data import why_unreachable

    require(
        get_token() is not None,
        "nobody is logged in to the Hugging Face hub: call `hf auth login`, or set HF_TOKEN to a token with "
        "write access.",
    )
    if reason := why_unreachable():
        raise CurriqError(f"the Hugging Face hub cannot be reached: {reason}. {_LATER}")
    return HfApi()


def _inherited_license(api: Any, base: str) -> str:
    """The license of a model on the hub; empty where it has none, or is not there."""
    from huggingface_hub.errors import RepositoryNotFoundError

    if not base:
        return ""
    try:
        card = api.model_info(base).card_data
    except RepositoryNotFoundError:
        return ""
    return str((card.license if card is not None else None) or "")


@contextmanager
def _explained(repo: str) -> Generator[None]:
    """Turn what the hub's client raises into a CurriqError."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        fix = "try again later"
        if status in (401, 403):
            fix = "use a token with write access to this owner (`hf auth login`, or HF_TOKEN)"
        elif status == 404:
            fix = "check the name of the owner"
        raise CurriqError(f"the hub refused {repo}: {_first_line(error)}: {fix}.") from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise CurriqError(f"the hub cannot be reached for {repo}: {_first_line(error)}. {_LATER}") from error


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].rstrip(" .")
