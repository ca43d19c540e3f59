"""Find and check the checkpoints of a killed training."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import Trainer

from ..distributed.processes import is_main, wait_for_all
from ..files import read_json, write_json

CUT_OFF = "a file that was cut off or is of another kind"

WEIGHTS = ["model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json"]


def last_checkpoint(folder: str | Path) -> str | None:
    """Return the newest complete checkpoint in a trainer's folder, or None."""
    whole = []
    for path in Path(folder).glob("checkpoint-*/trainer_state.json"):  # the trainer writes this file last
        try:
            whole.append((int(_state(path.parent)["global_step"]), str(path.parent)))
        except (ValueError, TypeError, KeyError):  # incomplete, or another file
            continue
    return max(whole, default=(0, None))[1]


def was_the_end(checkpoint: str | Path) -> bool:
    """Return whether training ended with this checkpoint, because all steps were done or patience ran out."""
    return _state(checkpoint)["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]


def find_best(checkpoint: str | Path, trainer: Trainer) -> None:
    """
    Make the trainer find the best checkpoint so far beside the last one, even if the folder of the run was moved: otherwise it
    would continue without it.

    Raises:
        ValueError: If the best checkpoint is missing.
    """
    state = _state(checkpoint)
    if (before := state.get("best_model_checkpoint")) is None:
        return
    best = Path(trainer.args.output_dir) / Path(before).name
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        whole = best.is_dir()
    else:
        whole = any(_is_readable(best / name) for name in WEIGHTS)
    if not whole:
        raise ValueError(
            f"{best / WEIGHTS[0]}: got no weights that can be read, need those of the best model so far, because training ends with "
            f"the best one: put them back, or delete {best.parent} to begin this stage anew."
        )
    if str(best) != before and is_main():
        write_json(Path(checkpoint) / "trainer_state.json", {**state, "best_model_checkpoint": str(best)})
    wait_for_all()


@contextmanager
def reading(checkpoint: str | Path | None) -> Iterator[None]:
    """
    Context manager that refuses a file of a checkpoint with anything but tensors and numbers.

    Raises:
        ValueError: If a file of the checkpoint that is read in it holds anything else.
    """
    try:
        yield
    except UnpicklingError as error:
        raise _not_whole(
            Path(checkpoint or "."), f"a file that holds something else than tensors ({error})"
        ) from error


def check_checkpoint(checkpoint: str | Path, trainer: Trainer) -> None:
    """
    Check that training can resume from a checkpoint.

    Without DeepSpeed it can with any number of processes. With ZeRO the number must be the same: DeepSpeed's universal
    checkpoint would not help, because ZeRO-3 reads from it the step and settings of the first parameter group for all groups,
    and each expert has its own.

    Raises:
        ValueError: If the checkpoint is from another engine, ZeRO stage or number of processes, so that its shards do not fit;
            or if it lacks a file or has an incomplete one.
    """
    now = "FSDP" if trainer.is_fsdp_enabled else "plain"
    if trainer.is_deepspeed_enabled:
        now = _layout(trainer.accelerator.state.deepspeed_plugin.zero_stage, trainer.accelerator.num_processes)
    before = "FSDP" if list(Path(checkpoint).glob("pytorch_model_fsdp*")) else "plain"
    for folder in Path(checkpoint).glob("global_step*"):
        states = len(list(folder.glob("*zero_pp_rank_*_optim_states.pt")))
        stage = 3 if list(folder.glob("zero_pp_rank_*_model_states.pt")) else 2 if states else 0
        before = _layout(stage, states)
    if before != now:
        raise ValueError(
            f"{checkpoint}: got a checkpoint of {before} training and {now} training now, need the same, because the "
            f"optimizer states are sharded accordingly: start as before, or delete {Path(checkpoint).parent} to begin this stage anew."
        )
    if before != "plain":
        return
    for names in (WEIGHTS, ["optimizer.pt"], ["scheduler.pt"], ["rng_state.pth", "rng_state_0.pth"]):
        if not (found := [name for name in names if (Path(checkpoint) / name).is_file()]):
            raise _not_whole(Path(checkpoint) / names[0], "nothing")
        if not _is_readable(Path(checkpoint) / found[0]):
            raise _not_whole(Path(checkpoint) / found[0], CUT_OFF)
    for path in Path(checkpoint).glob("*.json"):
        if not _is_readable(path):
            raise _not_whole(path, CUT_OFF)


def _layout(stage: int, shards: int) -> str:
    name = {0: "DeepSpeed", 1: "ZeRO-1 or 2", 2: "ZeRO-1 or 2", 3: "ZeRO-3"}[stage]
    return f"{name} ({shards} processes)" if stage else name


def _not_whole(path: Path, got: str) -> ValueError:
    folder = path if path.is_dir() else path.parent
    return ValueError(
        f"{path}: got {got}, need all files of the checkpoint as they were written, because training would not go on as it was: put "
        f"the file back, delete {folder} to go on from the checkpoint before it, or {folder.parent} to begin this stage anew."
    )


def _state(checkpoint: str | Path) -> dict[str, Any]:
    return read_json(Path(checkpoint) / "trainer_state.json")


def _is_readable(path: Path) -> bool:
    """Return whether a file is complete according to its own index."""
    if path.suffix == ".safetensors":
        return is_complete(path)
    if path.suffix == ".json":
        return path.is_file() and _is_json(path)
    return path.is_file() and zipfile.is_zipfile(path)


def _is_json(path: Path) -> bool:
    try:
        read_json(path)
        return True
    except ValueError:
        return False


def is_complete(path: Path) -> bool:
    """Return whether a safetensors file is complete."""
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False
