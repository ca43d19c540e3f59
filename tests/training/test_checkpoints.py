"""Checkpoints with a file that is missing, cut off, or something else: an error that says what to delete, or the same end."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_experts_trainer import POINTS, expert_of, trained
from test_ranked_trainer import same, scripted, weights_of

ACCURACIES = [0.5, 0.7, 0.6, 0.6]


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A training killed after its third step, whose best was its second: two checkpoints are there."""
    folder = tmp_path_factory.mktemp("checkpoints") / "killed"
    scripted(folder, ACCURACIES, kill_at=3, patience=0)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    return folder


@pytest.fixture
def copy(killed, tmp_path) -> Path:
    shutil.copytree(killed, tmp_path / "copy")
    for state in (tmp_path / "copy").glob("*/trainer_state.json"):
        state.write_text(state.read_text().replace(str(killed), str(tmp_path / "copy")))
    return tmp_path / "copy"


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {Path(__file__).parents[1] / 'a_pickle_ran'}",)


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


FAULTS = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut off": cut_off,
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Evil())),
    "tensors and a pickle": lambda path: torch.save({"state": Evil()}, path),
}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_checkpoint_that_is_not_whole_is_refused_and_it_is_said_what_to_delete(fault, name, copy):
    fault(copy / "checkpoint-3" / name)
    with pytest.raises(ValueError, match="need all files of the checkpoint") as error:
        scripted(copy, ACCURACIES, patience=0)
    assert f"delete {copy / 'checkpoint-3'} to go on from the checkpoint before it" in str(error.value)
    assert f"or {copy} to begin this stage anew" in str(error.value)
    assert not (Path(__file__).parents[1] / "a_pickle_ran").exists()


@pytest.mark.parametrize("content", [b"", b"\xb3\xa0", b'{"model_type": '])
def test_json_of_a_checkpoint_is_read_before_it_is_gone_on_from(content, copy):
    (copy / "checkpoint-3/config.json").write_bytes(content)
    with pytest.raises(
        ValueError, match="config.json: got a file that was cut off or is of another kind, need all files"
    ):
        scripted(copy, ACCURACIES, patience=0)


def test_what_is_said_helps(copy, tmp_path):
    unbroken, _ = scripted(tmp_path / "unbroken", ACCURACIES, patience=0)
    (copy / "checkpoint-3/scheduler.pt").unlink()
    shutil.rmtree(copy / "checkpoint-3")
    resumed, steps = scripted(copy, ACCURACIES, patience=0)
    assert list(steps) == [3, 4]
    assert same(weights_of(resumed.model), weights_of(unbroken.model))


@pytest.mark.parametrize("content", ["", "[]", "null", '{"global_step": 3', '{"global_step": "three"}'])
def test_of_a_broken_state_the_checkpoint_before_is_the_last(content, copy):
    (copy / "checkpoint-3/trainer_state.json").write_text(content)
    _, steps = scripted(copy, ACCURACIES, patience=0)
    assert list(steps) == [3, 4]


@pytest.mark.parametrize("fault", [shutil.rmtree, lambda path: cut_off(path / "model.safetensors")])
def test_a_best_model_that_is_not_there_is_refused(fault, copy):
    """The trainer would end with the last."""
    fault(copy / "checkpoint-2")
    with pytest.raises(ValueError, match=f"checkpoint-2/model.safetensors: got no weights.*delete {copy} to begin"):
        scripted(copy, ACCURACIES, patience=0)


def test_a_training_that_was_moved_knows_its_best_model(killed, tmp_path):
    unbroken, weights = scripted(tmp_path / "unbroken", ACCURACIES, patience=0)
    shutil.copytree(killed, tmp_path / "moved")
    resumed, _ = scripted(tmp_path / "moved", ACCURACIES, patience=0)
    assert same(weights_of(resumed.model), weights[2])
    state = json.loads((tmp_path / "moved/checkpoint-4/trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "moved/checkpoint-2")


@pytest.mark.parametrize("fault", [Path.unlink, cut_off])
def test_an_expert_s_best_weights_that_are_not_there_are_refused(fault, tmp_path):
    whole, _ = trained(tmp_path, max_steps=4)
    shutil.rmtree(tmp_path / "checkpoint-4")
    for path in (tmp_path / "best").glob("*"):
        load_file(path)
    fault(next((tmp_path / "best").glob("*")))
    with pytest.raises(ValueError, match=f"got no weights that can be read.*delete {tmp_path} to begin"):
        trained(tmp_path, max_steps=4)
    shutil.rmtree(tmp_path)
    again, _ = trained(tmp_path, max_steps=4)
    assert all(same(expert_of(whole, point), expert_of(again, point)) for point in POINTS)
