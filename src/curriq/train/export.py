"""The Hugging Face folder of a run whose checkpoints hold the model in parts."""

import shutil
from pathlib import Path

from curriq.errors import CurriqError
from curriq.runlog.checkpoints import BadCheckpoint, lacks_weights, latest_model, seal, sha256, verify
from curriq.runlog.storage import exclusive, fsync, make_folder


def model_folder(run: Path) -> Path:
    """The Hugging Face folder of a run's newest whole checkpoint; its weights are written there first where
    only its parts have them.

    Raises:
        CurriqError: the run holds no model; or its weights would have to be written, and it is being trained,
            or the disk refuses them.
    """
    return latest_model(run, export)


def with_weights(lm: Path) -> Path:
    """The Hugging Face folder of a checkpoint, its weights written there first where only its parts have
    them; any other folder as it is. It raises as `model_folder` does."""
    if lacks_weights(lm):
        export(lm.parent)
    return lm


def export(checkpoint: Path) -> None:
    """Write the weights that a checkpoint has in parts into its `lm/`, and add them to its manifest; after a
    kill at any moment it is as it was, or whole."""
    from curriq.lm.stored import export_weights  # with torch, which those who have weights need not wait for
    from curriq.train.parts import LM, PARTS

    run = checkpoint.parents[1]
    refusal = f"{run} is being trained, and its newest checkpoint has its weights in parts: wait for the end."
    aside = checkpoint / ".tmp-lm"
    with exclusive(run, refusal):
        try:
            manifest = verify(checkpoint)
        except BadCheckpoint as defect:
            raise CurriqError(
                f"{checkpoint}: {defect}. `curriq export {run} --model` takes another."
            ) from None
        shutil.rmtree(aside, ignore_errors=True)
        try:
            make_folder(aside)
            export_weights(checkpoint / PARTS, LM, aside)
            written = sorted(aside.iterdir())  # the index last: without it the pieces are no weights
            for path in written:
                fsync(path)
                named = f"lm/{path.name}"
                manifest["files"][named] = {"size": path.stat().st_size, "sha256": sha256(path)}
                path.rename(checkpoint / named)
            fsync(checkpoint / "lm")
            seal(checkpoint, manifest)
        except OSError as error:
            raise CurriqError(
                f"the weights of {checkpoint} could not be written to {checkpoint / 'lm'}: "
                f"{error.strerror or error}. The checkpoint is as it was."
            ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
