"""Runs that grow: what of a finished run a new one takes over, and what it trains again."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import make_backbone, make_tokenizer
from test_pipeline import EXPERTS, POINTS, STAGES, TABLE, make_recipe, make_rows, material, weights, write  # noqa: F401

from dmoerm_trl.data.preference_row import PreferenceRow
from dmoerm_trl.scoring.batch import score_rows
from dmoerm_trl.training.pipeline import Pipeline
from dmoerm_trl.training.recipe import Recipe


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory) -> Pipeline:  # noqa: F811
    run = Pipeline(small(material, tmp_path_factory.mktemp("runs") / "finished"))
    run.run()
    return run


def small(material: Path, output: Path, **changes) -> Recipe:  # noqa: F811
    return make_recipe(material, output, **{"ensemble_size": 1, "without_outer": False, **changes})


def extended(finished: Pipeline, output: Path, **changes) -> tuple[Pipeline, set[str]]:
    """A run that extends another, and the stages (experts one by one) whose weights it did not take over."""
    before = states(finished.root)
    run = Pipeline(replace(finished.recipe, output_dir=str(output), extend=str(finished.root), **changes))
    run.run()
    assert states(finished.root) == before  # it is not changed
    old, new = weights(finished.root), weights(run.root)
    return run, {str(Path(name).parent) for name in new if new[name] != old.get(name)}


def states(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in root.rglob("*")}


def more_points(tmp_path: Path) -> dict[str, str]:
    """The same rows with labels of one more point of chitchat."""
    (tmp_path / "tasks.yaml").write_text(
        TABLE.replace("[empathy ability", "[humour, empathy ability"), encoding="utf-8"
    )
    rows = make_rows()
    for row in rows:
        if row["task"] == "chitchat":
            row["capability_ranks"]["humour"] = list(range(len(row["responses"]), 0, -1))
    write(rows, tmp_path / "rows.jsonl")
    return {"tasks": str(tmp_path / "tasks.yaml"), "train_data": str(tmp_path / "rows.jsonl")}


def test_a_further_point_costs_an_expert_and_an_aggregator(finished, tmp_path, capsys):
    run, trained = extended(finished, tmp_path / "run", **more_points(tmp_path))
    assert trained == {"chitchat/experts/humour", "chitchat/phase3", "model"}
    assert run.load("model").config.tasks["chitchat"] == ["humour", *POINTS["chitchat"]]
    said = capsys.readouterr().out
    assert "stay: router, maths/phase1, " in said and "are new: chitchat/experts/humour" in said
    assert "are trained again: chitchat/phase3 (tasks), model (what it builds on)" in said
    assert run.manifest["extends"] == str(finished.root)


def test_an_expert_that_is_added_is_the_one_that_its_task_would_have_had(material, finished, tmp_path):  # noqa: F811
    changes = more_points(tmp_path) | {"lora_dropout": 0.0, "phase2": {**finished.recipe.phase2, "max_steps": 4}}
    anew = Pipeline(small(material, tmp_path / "anew", **changes))
    for stage in ("data", "chitchat/phase1", "chitchat/experts"):
        anew.run_stage(stage)
    run, _ = extended(finished, tmp_path / "run", **more_points(tmp_path))
    assert weights(anew.root / "chitchat/phase1") == weights(run.root / "chitchat/phase1")
    steps = [[entry["step"] for entry in one.history("chitchat/experts/humour")] for one in (anew, run)]
    assert steps[0] == steps[1]


def test_more_rows_leave_the_others_in_their_parts_and_other_tasks_as_they_are(finished, tmp_path):
    rows = make_rows()
    write([*rows, *({**row, "prompt": row["prompt"] + "!"} for row in rows[:24:2])], tmp_path / "rows.jsonl")
    run, trained = extended(finished, tmp_path / "run", train_data=str(tmp_path / "rows.jsonl"))
    for part in ("phase1_train", "phase1_validation", "phase3_train", "phase3_validation", "test"):
        before, now = ({row.prompt_id for row in one.rows(part)} for one in (finished, run))
        assert before <= now, part
    assert {name for name in trained if name.startswith("chitchat")} == set()
    assert {"router", "maths/phase1", "maths/experts/logic", "maths/phase3", "ensemble/0", "model"} <= trained


def test_a_new_task_leaves_the_others_as_they_are(finished, tmp_path):
    table = TABLE.replace("tasks:\n", "tasks:\n  cooking: [taste]\n")
    (tmp_path / "tasks.yaml").write_text(table, encoding="utf-8")
    more = [
        {"prompt": f"Cook {i}", "responses": ["Rice", "Soup"], "ranks": [1, 2], "task": "cooking"}
        | {"capability_ranks": {"taste": [2, 1], "logic": [1, 2], "readability": [1, 2]}}
        for i in range(12)
    ]
    write([*make_rows(), *more], tmp_path / "rows.jsonl")
    changes = {"tasks": str(tmp_path / "tasks.yaml"), "train_data": str(tmp_path / "rows.jsonl")}
    run, trained = extended(finished, tmp_path / "run", **changes)
    cooking = {"cooking/phase1", "cooking/experts/taste", "cooking/phase3"}
    assert trained == cooking | {"router", "ensemble/0", "model"}
    assert list(run.load("model").config.tasks) == ["cooking", *POINTS]


def test_another_base_for_a_task(finished, material, tmp_path):  # noqa: F811
    shutil.copytree(material / "base", tmp_path / "base")
    make_backbone(make_tokenizer(), seed=1).save_pretrained(tmp_path / "base")
    run, trained = extended(finished, tmp_path / "run", task_base_models={"maths": str(tmp_path / "base")})
    assert trained == {"maths/phase1", "maths/experts/correctness", "maths/experts/logic", "maths/phase3", "model"}
    backbones = run.load("model").model.backbones
    layer = {task: backbones[task].state_dict()["embed_tokens.weight"] for task in POINTS}
    assert not torch.allclose(layer["maths"], layer["chitchat"], atol=0.1)


def test_the_same_recipe_trains_nothing(finished, tmp_path):
    run, trained = extended(finished, tmp_path / "run")
    assert trained == set()
    assert {path.name for path in run.root.iterdir()} == {path.name for path in finished.root.iterdir()}


def test_an_extension_that_was_killed_goes_on_though_it_is_not_asked_for_again(finished, tmp_path, monkeypatch):
    recipe = replace(finished.recipe, output_dir=str(tmp_path / "run"), **more_points(tmp_path))
    stopped = Pipeline(replace(recipe, extend=str(finished.root)))
    stopped.stages["chitchat/experts"] = stopped.stages["chitchat/experts"]._replace(run=lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stopped.run()
    assert not (stopped.root / "chitchat/experts").exists()
    run = Pipeline(recipe)
    run.run()
    for point in ("empathy_ability", "情感"):
        name = f"chitchat/experts/{point}"
        assert weights(run.root / name) == weights(finished.root / name)


def test_in_the_same_folder_it_is_said_what_stays_and_how_to_keep_it(finished, tmp_path):
    before = states(finished.root)
    with pytest.raises(ValueError) as error:
        Pipeline(replace(finished.recipe, **more_points(tmp_path))).run()
    message = str(error.value)
    assert "differs in ['tasks']" in message and f"`--extend {finished.root}`" in message
    assert "stay: router, maths/phase1, " in message and "are new: chitchat/experts/humour" in message
    assert states(finished.root) == before


def test_what_is_not_yet_done_may_change(finished, tmp_path):
    shutil.copytree(finished.root, tmp_path / "run")
    for name in ("maths/phase3", "chitchat/phase3", "model"):
        shutil.rmtree(tmp_path / "run" / name)
    settings = {**finished.recipe.phase3, "max_steps": 2}
    run = Pipeline(
        replace(finished.recipe, output_dir=str(tmp_path / "run"), phase3=settings, aggregator_hidden_size=8)
    )
    run.run()
    assert run.load("model").config.aggregator_hidden_size == 8
    assert weights(run.root / "maths/phase1") == weights(finished.root / "maths/phase1")


def test_phase_3_may_use_the_rows_of_phase_1_too(finished, tmp_path):
    """Only phase 3 and what is built on it is trained again, and its rewards have zero mean on all these rows."""
    run, changed = extended(
        finished, tmp_path / "all", phase3_rows="all", aggregator_input="scores", aggregator_members=2
    )
    assert changed == {"maths/phase3", "chitchat/phase3", "model"}
    of_both = ("phase1_train", "phase1_validation", "phase3_train", "phase3_validation")
    for parts, zero in ((of_both, True), (of_both[2:], False)):
        scores = score_rows(run.load("maths/phase3"), run.rows(*parts, task="maths"), run.formatter)
        mean = torch.tensor([reward for row in scores for reward in row], dtype=torch.float64).mean()
        assert (abs(float(mean)) < 1e-6) == zero


def test_settings_of_experts_are_not_those_of_their_base(finished, tmp_path):
    shutil.copytree(finished.root, tmp_path / "run")
    for name in ("maths/experts", "chitchat/experts", "maths/phase3", "chitchat/phase3", "model"):
        shutil.rmtree(tmp_path / "run" / name)
    run = Pipeline(replace(finished.recipe, output_dir=str(tmp_path / "run"), lora_rank=2, ensemble_size=2))
    run.run()
    assert run.load("model").config.lora_rank == 2
    assert weights(run.root / "ensemble/0") == weights(finished.root / "ensemble/0")


def test_settings_that_change_no_result_may_change(finished, tmp_path):
    shutil.copytree(finished.root, tmp_path / "run")
    few = {**finished.recipe.phase1, "logging_steps": 1, "disable_tqdm": True, "save_total_limit": 5}
    Pipeline(replace(finished.recipe, output_dir=str(tmp_path / "run"), phase1=few, on_error="skip")).run()
    assert weights(tmp_path / "run") == weights(finished.root)


def test_checkpoints_of_other_settings_are_not_gone_on_from(finished, tmp_path):
    recipe = replace(finished.recipe, output_dir=str(tmp_path / "run"))
    run = Pipeline(recipe)
    run.run_stage("data")
    folders = {Pipeline(one)._work_folder("router") for one in (recipe, replace(recipe, router_balance=0.5))}
    assert len(folders) == 2


@pytest.mark.parametrize("what", ["nothing", "itself"])
def test_what_cannot_be_extended_is_refused(what, finished, tmp_path):
    (tmp_path / "nothing").mkdir()
    folder = tmp_path / "nothing" if what == "nothing" else finished.root
    recipe = replace(finished.recipe, output_dir=str(finished.root if what == "itself" else tmp_path / "run"))
    with pytest.raises(ValueError, match="`extend` of the recipe: got .*need the folder of another run"):
        Pipeline(replace(recipe, extend=str(folder), seed=1)).run()


def test_a_stage_of_the_other_run_that_is_not_whole_is_refused(finished, tmp_path):
    shutil.copytree(finished.root, tmp_path / "broken")
    os.truncate(tmp_path / "broken/maths/phase1/model.safetensors", 100)
    recipe = replace(finished.recipe, output_dir=str(tmp_path / "run"), extend=str(tmp_path / "broken"))
    with pytest.raises(ValueError, match=r"broken/maths/phase1/model.safetensors: got 100 bytes, need the \d+"):
        Pipeline(recipe).run()


def test_all_stages_are_known(finished):
    left_out = {"overall/phase1", "overall/experts", "overall/phase3", "ensemble/1"}
    assert set(finished.stages) == STAGES - left_out
    assert set(finished.manifest["stages"]) == set(finished.stages)
    assert {name for name in EXPERTS if not name.startswith("overall")} <= set(finished.trainings)


def test_rows_that_no_finished_training_reads_may_change_in_the_same_folder(finished, tmp_path):
    shutil.copytree(finished.root, tmp_path / "run")
    for name in ("router", "maths/phase3", "ensemble/0", "model"):
        shutil.rmtree(tmp_path / "run" / name)
    phase3 = {row.prompt_id for row in finished.rows("phase3_train", task="maths")}
    rows = make_rows()
    for row in rows:
        if PreferenceRow([{"role": "user", "content": row["prompt"]}], [], []).prompt_id in phase3:
            row["ranks"] = row["ranks"][::-1]
    write(rows, tmp_path / "rows.jsonl")
    changes = {"output_dir": str(tmp_path / "run"), "train_data": str(tmp_path / "rows.jsonl")}
    mine = tmp_path / "run" / "data" / "mine.txt"
    mine.write_text("mine")
    with pytest.raises(ValueError, match="run/data: got something that no stage has written"):
        Pipeline(replace(finished.recipe, **changes)).run()
    assert mine.read_text() == "mine"
    mine.unlink()
    run = Pipeline(replace(finished.recipe, **changes))
    run.run()
    same = ("maths/phase1", "maths/experts", "chitchat/")
    before, now = weights(finished.root), weights(run.root)
    assert all(before[name] == now[name] for name in before if name.startswith(same))
    assert before["maths/phase3/model.safetensors"] != now["maths/phase3/model.safetensors"]
