"""Models and runs of 0.1.0, before the modules and names of 0.2.0, are read, left as they are, and gone on with."""

import json
import shutil
from pathlib import Path

import pytest

from dmoerm_trl import DMoERMForSequenceClassification, describe, load_reward_model
from dmoerm_trl.cli import main

OLD = Path(__file__).parents[1] / "fixtures" / "0.1.0"
SCORES = [json.loads(line) for line in (OLD / "scores.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def folder(monkeypatch, tmp_path):
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def check_scores(model: str) -> None:
    """The model gives the rewards, routes and capability scores that were given then."""
    described = describe(
        *load_reward_model(model, max_length=128), [(line["prompt"], line["response"]) for line in SCORES]
    )
    for then, now in zip(SCORES, described, strict=True):
        assert now["route"] == then["route"]
        assert now["reward"] == pytest.approx(then["reward"], abs=1e-5)
        assert now["capability_scores"] == pytest.approx(then["capability_scores"], abs=1e-5)


def test_a_model_gives_the_rewards_that_it_gave(folder):
    check_scores("run/model")


@pytest.mark.parametrize("name", ["run/maths/phase1", "run/maths/phase3", "run/ensemble/0"])
def test_the_models_of_the_stages_are_read(name, folder):
    DMoERMForSequenceClassification.from_pretrained(name)


def test_a_finished_run_is_left_as_it_is(folder):
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    main(["train", "--config", "recipe.yaml"])
    after = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    assert before.items() <= after.items()
    assert {path.name for path in after.keys() - before.keys()} == {"accuracy_curves.png"}  # not kept with the fixture


def test_a_run_that_was_begun_goes_on_and_ends_with_the_model_of_the_unbroken_one(folder, capsys):
    finished = {path: path.stat().st_mtime_ns for path in (folder / "begun").glob("*/phase1/*")}
    main(["train", "--config", "recipe.yaml", "--output_dir", "begun"])
    assert finished and finished == {path: path.stat().st_mtime_ns for path in finished}  # not trained again
    check_scores("begun/model")
    assert not (folder / "begun" / "work" / "maths").exists()


def test_a_finished_run_is_evaluated_and_extended(folder):
    main(["eval", "--config", "recipe.yaml"])
    assert json.loads(Path("run/consistency.json").read_text(encoding="utf-8"))
    main(["train", "--config", "recipe.yaml", "--output_dir", "more", "--extend", "run"])
    check_scores("more/model")
