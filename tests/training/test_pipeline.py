"""A whole training of tiny models: what it leaves behind, that it goes on after a kill, and what it refuses to start."""

import json
import multiprocessing
import os
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from models import PROMPTS, bert_config, make_backbone, make_tokenizer, qwen2_config
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from dmoerm_trl.data.rows import PreferenceRow, load_rows
from dmoerm_trl.files import locked_folder
from dmoerm_trl.modeling.assembly import with_task
from dmoerm_trl.modeling.router import Router
from dmoerm_trl.scoring.batch import score_rows
from dmoerm_trl.training.pipeline import Pipeline
from dmoerm_trl.training.recipe import Recipe

POINTS = {"maths": ["correctness", "logic"], "chitchat": ["empathy ability", "情感"]}
OVERALL_POINTS = ["logic", "readability"]
TABLE = "tasks:\n  maths: [correctness, logic]\n  chitchat: [empathy ability, 情感]\noverall: [logic, readability]\n"
ANSWERS = ["It is four", "Well", "I do not know, to be honest", "All is well, thank you"]
STAGES = {
    "data",
    "router",
    "maths/phase1",
    "maths/experts",
    "maths/phase3",
    "chitchat/phase1",
    "chitchat/experts",
    "chitchat/phase3",
    "overall/phase1",
    "overall/experts",
    "overall/phase3",
    "ensemble/0",
    "ensemble/1",
    "model",
}
EXPERTS = {
    "maths/experts/correctness",
    "maths/experts/logic",
    "chitchat/experts/empathy_ability",
    "chitchat/experts/情感",
    "overall/experts/logic",
    "overall/experts/readability",
}
TRAININGS = STAGES - {"data", "model"} - {stage for stage in STAGES if stage.endswith("/experts")} | EXPERTS


def make_rows() -> list[dict]:
    """12 prompts of each task, 2 of others, with 2 to 4 responses each."""
    draw = random.Random(0)
    rows = []
    for number in range(26):
        task = ["maths", "chitchat"][number % 2] if number < 24 else "others"
        texts = [f"{answer} {number}." for answer in ANSWERS[: 2 + number % 3]]

        def ranks(count: int = len(texts)) -> list[int]:
            return draw.sample(range(1, count + 1), count)

        labels = {point: ranks() for point in {*POINTS.get(task, []), *OVERALL_POINTS}}
        prompt = f"{PROMPTS.get(task, 'Translate this.')} {number}"
        row = {"prompt": prompt, "responses": texts, "ranks": ranks(), "task": task, "capability_ranks": labels}
        if labels.pop("empathy ability", None):  # a judge decided one pair or two
            row["capability_pairs"] = {"empathy ability": [[0, 1], [2, 1]][: len(texts) - 1]}
        rows.append(row)
    return rows


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """A folder with the base, the tasks and the rows."""
    folder = tmp_path_factory.mktemp("material")
    tokenizer = make_tokenizer()
    make_backbone(tokenizer).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "tasks.yaml").write_text(TABLE, encoding="utf-8")
    write(make_rows(), folder / "rows.jsonl")
    return folder


def write(rows: list[dict], path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def make_recipe(material: Path, output: Path, **changes) -> Recipe:
    few = {"max_steps": 4, "eval_steps": 2, "learning_rate": 1e-2, "use_cpu": True, "logging_steps": 2}
    settings = {
        "output_dir": str(output),
        "base_model": str(material / "base"),
        "train_data": str(material / "rows.jsonl"),
        "tasks": str(material / "tasks.yaml"),
        **{"lora_rank": 4, "lora_alpha": 4, "ensemble_size": 2, "max_length": 256},
        **dict.fromkeys(("phase1", "phase2", "phase3", "baselines"), few),
        "router": {**few, "max_steps": 12, "eval_steps": 6},
    }
    return Recipe(**{**settings, **changes})


@pytest.fixture(scope="session")
def recipe(material, tmp_path_factory) -> Recipe:
    return make_recipe(material, tmp_path_factory.mktemp("runs") / "unbroken")


@pytest.fixture(scope="session")
def run(recipe) -> Pipeline:
    """The whole training, unbroken, in one process."""
    pipeline = Pipeline(recipe)
    pipeline.run()
    return pipeline


def weights(root: Path) -> dict[str, bytes]:
    """All weights that a run left, byte by byte."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.safetensors"))}


# What a training leaves behind.


def test_every_stage_leaves_its_folder_and_nothing_else_is_left(run):
    assert set(run.stages) == STAGES
    assert {str(path.parent.relative_to(run.root)) for path in run.root.rglob("history.json")} == STAGES | EXPERTS
    assert {path.name for path in run.root.iterdir()} == {stage.split("/")[0] for stage in STAGES} | {"manifest.json"}


def test_weights_are_safetensors_and_nothing_is_pickled(run):
    kinds = {path.suffix for path in run.root.rglob("*") if path.is_file()}
    assert kinds <= {".safetensors", ".json", ".jsonl", ".txt", ".jinja", ".md"}
    with_weights = {str(path.parent.relative_to(run.root)) for path in run.root.rglob("*.safetensors")}
    assert with_weights == TRAININGS | {"model"}


def test_the_manifest_has_the_recipe_and_the_seconds_of_every_stage(run, recipe):
    manifest = json.loads((run.root / "manifest.json").read_text())
    assert manifest == run.manifest
    assert manifest["recipe"] == json.loads(json.dumps(recipe.fingerprint()))
    assert set(manifest["seconds"]) == STAGES
    assert all(seconds > 0 for seconds in manifest["seconds"].values())


def test_every_training_has_a_history_of_accuracies(run):
    assert set(run.trainings) == TRAININGS and len(run.trainings) == len(TRAININGS)
    for training in TRAININGS:
        steps = [entry["step"] for entry in run.history(training) if "eval_accuracy" in entry]
        assert steps == ([6, 12] if training == "router" else [2, 4]), training


def test_the_parts_of_the_data_share_no_prompt(run, material):
    parts = {
        part: run.rows(part)
        for part in ("phase1_train", "phase1_validation", "phase3_train", "phase3_validation", "test")
    }
    ids = {part: {row.prompt_id for row in rows} for part, rows in parts.items()}
    assert all(ids.values())
    assert sum(map(len, ids.values())) == len(set().union(*ids.values())) == 26
    rows, _ = load_rows(material / "rows.jsonl", tasks=run.tasks)
    assert sorted(map(str, rows)) == sorted(str(row) for part in parts.values() for row in part)
    assert {row.task for row in run.rows("phase1_train", "test", task="maths")} == {"maths"}


def test_the_report_counts_the_rows_of_every_part(run):
    report = (run.root / "data" / "report.txt").read_text()
    assert "rows.jsonl: 26 rows" in report
    for part in ("phase1_train", "phase1_validation", "phase3_train", "phase3_validation", "test"):
        assert f"{part}: {len(run.rows(part))} rows; 0 of {len(run.rows(part))} rows" in report


def test_the_dmoerm_gives_the_rewards_of_the_inner_model_of_the_task_that_the_router_chose(run):
    model = AutoModelForSequenceClassification.from_pretrained(str(run.root / "model"))
    tokenizer = AutoTokenizer.from_pretrained(str(run.root / "model"))
    assert tokenizer.chat_template == run.formatter.tokenizer.chat_template
    assert model.config.tasks == POINTS
    assert model.config.response_marker == run.formatter.markers.response_marker
    rows = run.rows("test")
    texts = [encoding for row in run.formatter.encode_rows(rows)[0] for encoding in row]
    routes = [int(model(torch.tensor([text.input_ids])).route) for text in texts]
    inner = [score_rows(run.load(f"{task}/phase3"), rows, run.formatter) for task in POINTS]
    inner = [[reward for row in rewards for reward in row] for rewards in inner]
    rewards = [reward for row in score_rows(model, rows, run.formatter) for reward in row]
    assert rewards == pytest.approx([inner[route][i] for i, route in enumerate(routes)], abs=1e-6)
    assert set(routes) == {0, 1}
    assert inner[0] != pytest.approx(inner[1], abs=1e-3)


def test_the_router_knows_the_tasks(run):
    router = Router.from_pretrained(str(run.root / "router"))
    assert list(router.config.tasks) == list(POINTS)
    assert run.history("router")[-2]["eval_accuracy"] == 1.0


def test_without_outer_there_is_one_inner_model_and_no_router(run):
    model = run.load("overall/phase3")
    assert model.config.tasks == {"overall": OVERALL_POINTS}
    assert model.model.router is None


@pytest.mark.parametrize("task", ["maths", "chitchat"])
def test_every_expert_is_a_peft_adapter_of_its_tasks_base(run, task):
    rows = run.rows("test")
    inner = run.load(f"{task}/phase3")
    texts = [encoding for row in run.formatter.encode_rows(rows)[0] for encoding in row]
    for point in POINTS[task]:
        base = run.load(f"{task}/phase1")
        mean = float(base.model.inner_models[task].reward_mean)
        expert = PeftModel.from_pretrained(base, str(run.root / task / "experts" / point.replace(" ", "_")))
        rewards = [reward for row in score_rows(expert, rows, run.formatter) for reward in row]
        scores = [inner(torch.tensor([text.input_ids])).capability_scores[point].item() for text in texts]
        assert [reward + mean for reward in rewards] == pytest.approx(scores, abs=1e-6)


def test_rewards_are_normalised_on_the_rows_of_their_phase(run):
    def rewards(stage: str, *parts: str, task: str = "overall") -> torch.Tensor:
        scores = score_rows(run.load(stage), run.rows(*parts, task=task), run.formatter)
        return torch.tensor([reward for row in scores for reward in row], dtype=torch.float64)

    for task in ("maths", "overall"):
        assert rewards(f"{task}/phase3", "phase3_train", "phase3_validation", task=task).mean() == pytest.approx(
            0, abs=1e-6
        )
    member = rewards("ensemble/1", "phase1_validation", "phase3_validation")
    assert member.mean() == pytest.approx(0, abs=1e-6)
    assert member.std(correction=0) == pytest.approx(1, abs=1e-5)  # members are standardised before they are compared


def test_the_members_of_the_ensemble_differ(run):
    first, second = (weights(run.root / "ensemble" / member) for member in "01")
    assert first != second


# A training that is run again.


def test_a_run_that_is_done_does_nothing(run, recipe):
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in run.root.rglob("*")}

    before = times()
    Pipeline(recipe).run()
    assert times() == before


def test_a_changed_recipe_is_an_error_that_names_the_changed_keys(run, recipe, tmp_path):
    changed = replace(recipe, seed=3, phase1={**recipe.phase1, "max_steps": 5})
    with pytest.raises(ValueError, match=r"differs in \['phase1', 'seed'\].*choose another `output_dir`") as error:
        Pipeline(changed).run()
    assert str(run.root) in str(error.value)
    shutil.copytree(run.root, tmp_path / "copy")
    with pytest.raises(ValueError, match=r"differs in \['lora_rank'\]"):
        Pipeline(replace(recipe, output_dir=str(tmp_path / "copy"), lora_rank=8)).run()
    assert weights(tmp_path / "copy") == weights(run.root)


def test_a_changed_task_table_is_a_changed_recipe(run, recipe, tmp_path):
    (tmp_path / "tasks.yaml").write_text(TABLE.replace("correctness", "brevity"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"differs in \['tasks'\]"):
        Pipeline(replace(recipe, tasks=str(tmp_path / "tasks.yaml"))).run()


def test_a_run_can_go_on_elsewhere_and_with_other_workers(run, recipe, tmp_path):
    shutil.copytree(run.root, tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "model")
    Pipeline(replace(recipe, output_dir=str(tmp_path / "moved"), workers=1)).run()
    assert weights(tmp_path / "moved") == weights(run.root)


# A training that is killed.


def test_a_stage_that_ended_right_before_a_kill_is_noted_by_the_next_start(run, recipe, tmp_path):
    root = tmp_path / "killed"
    shutil.copytree(run.root, root)
    whole = json.loads((root / "manifest.json").read_text())
    files = {name: of_stage for name, of_stage in whole["files"].items() if name not in ("data", "maths/phase1")}
    (root / "manifest.json").write_text(json.dumps(whole | {"files": files}))
    Pipeline(replace(recipe, output_dir=str(root))).run()
    assert json.loads((root / "manifest.json").read_text())["files"] == whole["files"]


def train(recipe: Recipe) -> None:
    """What a child process of these tests does."""
    Pipeline(recipe).run()


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_same_weights(run, recipe, start, tmp_path):
    recipe = replace(recipe, output_dir=str(tmp_path / "killed"))
    root, draw, found = Path(recipe.output_dir), random.Random(1), []
    for attempt in range(40):
        done = len(list(root.rglob("history.json")))
        process = start(train, recipe)
        if attempt % 2:  # in the middle of a phase, while its first checkpoint is written or soon after
            while process.is_alive() and not list(root.glob("work/**/checkpoint-*")):
                time.sleep(0.01)
            process.join(draw.uniform(0, 0.1))
        else:  # anywhere, but when another stage is done, so that there is an end to it
            while process.is_alive() and len(list(root.rglob("history.json"))) == done:
                time.sleep(0.02)
            process.join(draw.uniform(0, 0.9))
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        found.append({path.name for path in root.glob("work/**/checkpoint-*")})
    assert process.exitcode == 0
    assert len(found) >= 5 and any(found), found  # some kills were in the middle of a phase
    assert weights(root) == weights(run.root)
    assert {path.name for path in root.iterdir()} == {path.name for path in run.root.iterdir()}


@pytest.mark.slow
def test_workers_die_with_their_parent_and_give_the_weights_of_one_process(run, recipe, start, tmp_path):
    recipe = replace(recipe, output_dir=str(tmp_path / "killed"), workers=2)
    root = Path(recipe.output_dir)
    process = start(train, recipe)
    while not list(root.glob("work/*/**/checkpoint-*")):
        assert process.is_alive()
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.join()
    assert len(children) >= 2
    assert not psutil.wait_procs(children, timeout=10)[1]

    Pipeline(recipe).run()
    assert weights(root) == weights(run.root)


@pytest.mark.slow
def test_an_error_in_a_worker_stops_the_others(recipe, tmp_path):
    endless = {**recipe.phase1, "max_steps": 10**6, "eval_steps": 10**5}
    recipe = replace(recipe, output_dir=str(tmp_path), workers=2, phase1=endless, baselines=endless)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "router").write_text("a file where the router's folder is to be")
    with pytest.raises(NotADirectoryError):
        Pipeline(recipe).run()
    assert not multiprocessing.active_children()


# Options.


def test_with_share_base_all_tasks_stand_on_one_base(material, tmp_path):
    run = Pipeline(make_recipe(material, tmp_path / "run", share_base=True, ensemble_size=0, without_outer=False))
    run.run()
    bases = {"maths/phase1", "chitchat/phase1"}
    left_out = {"ensemble/0", "ensemble/1", "overall/experts", "overall/phase3"}
    assert set(run.stages) == STAGES - bases - left_out
    model = run.load("model")
    assert list(model.model.backbones) == ["shared"]
    base = run.load("overall/phase1").model.backbones["shared"].state_dict()
    shared = {
        name.replace(".base_layer", ""): weight
        for name, weight in model.model.backbones["shared"].state_dict().items()
    }
    assert all(torch.equal(shared[name], weight) for name, weight in base.items())
    expert = PeftModel.from_pretrained(
        with_task(run.load("overall/phase1"), "chitchat"), str(run.root / "chitchat/experts/情感")
    )
    text = run.formatter.encode(PROMPTS["chitchat"], ANSWERS[0]).input_ids
    mean = float(expert.base_model.model.model.inner_models["chitchat"].reward_mean)
    output = model(torch.tensor([text]))
    assert model.config.tasks.keys() == POINTS.keys() and int(output.route) == 1
    reward = expert(torch.tensor([text])).logits.item()
    assert reward + mean == pytest.approx(output.capability_scores["情感"].item(), abs=1e-6)


def test_experts_one_by_one_have_the_same_folders(run, material, tmp_path):
    recipe = make_recipe(material, tmp_path, joint_experts=False, lora_layers=1, lora_dropout=0.0)
    one_by_one = Pipeline(recipe)
    assert set(one_by_one.stages) == STAGES - {"maths/experts", "chitchat/experts", "overall/experts"} | EXPERTS
    assert one_by_one.trainings == run.trainings
    together = Pipeline(replace(recipe, output_dir=str(tmp_path / "together"), joint_experts=True))
    for stage in ("data", "maths/phase1"):
        one_by_one.run_stage(stage)
        shutil.copytree(one_by_one.root / stage, together.root / stage)
    together.run_stage("maths/experts")
    for stage in ("maths/experts/correctness", "maths/experts/logic"):
        one_by_one.run_stage(stage)
        files = {path.name for path in (one_by_one.root / stage).iterdir()}
        assert files == {path.name for path in (together.root / stage).iterdir()}
        experts = [
            load_file(pipeline.root / stage / "adapter_model.safetensors") for pipeline in (one_by_one, together)
        ]
        for name in experts[0].keys() | experts[1].keys():  # LoRA in the last of two layers; every row has all labels
            torch.testing.assert_close(experts[0][name], experts[1][name], rtol=1e-3, atol=1e-4)
            assert "layers.1." in name or "base_head" in name
        steps = [[e["step"] for e in p.history(stage) if "eval_accuracy" in e] for p in (one_by_one, together)]
        assert steps == [[2, 4], [2, 4]]
    one_by_one.run_stage("maths/phase3")


def test_test_rows_of_their_own(material, tmp_path):
    rows = make_rows()
    test = [{**rows[0], "prompt": "Another prompt"}, rows[1]]
    write(test, tmp_path / "test.jsonl")
    run = Pipeline(make_recipe(material, tmp_path / "run", test_data=str(tmp_path / "test.jsonl")))
    run.run_stage("data")
    assert len(run.rows("test")) == 2
    assert len(run.rows("phase1_train", "phase1_validation", "phase3_train", "phase3_validation")) == 25
    assert (
        "1 training rows removed because their prompt is in the test rows"
        in (run.root / "data/report.txt").read_text()
    )


def test_bad_rows_are_skipped_on_request_and_counted(material, tmp_path):
    rows = make_rows()
    tied = {"ranks": [1] * len(rows[0]["ranks"]), "capability_ranks": {}, "prompt": "New"}
    write([*rows, rows[0] | tied], tmp_path / "rows.jsonl")
    recipe = make_recipe(material, tmp_path / "run")
    run = Pipeline(replace(recipe, train_data=str(tmp_path / "rows.jsonl"), on_error="skip"))
    run.run_stage("data")
    assert "26 rows; 1 skipped (no two distinct ranks: 1)" in (run.root / "data/report.txt").read_text()


def test_rows_with_capability_labels_alone_train_the_experts_alone(material, run, tmp_path):
    """Of every prompt there are two more responses, which nobody compared on the whole."""
    rows = make_rows()
    more = [
        {**row, "responses": ["Yes.", "No, never."], "ranks": [1, 1], "capability_pairs": {}}
        | {"capability_ranks": dict.fromkeys([*POINTS.get(row["task"], []), *OVERALL_POINTS], [1, 2])}
        for row in rows
    ]
    write([*rows, *more], tmp_path / "rows.jsonl")
    other = Pipeline(make_recipe(material, tmp_path / "run", train_data=str(tmp_path / "rows.jsonl")))
    same = ("maths/phase1", "ensemble/0", "ensemble/1")
    for stage in ("data", *same, "maths/experts", "maths/phase3"):
        other.run_stage(stage)
    before, after = (weights(pipeline.root) for pipeline in (run, other))
    assert len(other.rows("phase1_train")) == 2 * len(run.rows("phase1_train"))
    half = len(run.rows("phase1_train"))
    report = (other.root / "data" / "report.txt").read_text()
    assert f"phase1_train: {2 * half} rows, {half} of them without an overall preference;" in report
    for name in after:
        assert (before[name] == after[name]) == name.startswith(same), name


# Bad input: an error that names it and the way out, before any training.


def test_a_part_of_a_task_without_an_overall_preference_is_refused(material, tmp_path):
    rows = [row | {"ranks": [1] * len(row["ranks"])} if row["task"] == "maths" else row for row in make_rows()]
    write(rows, tmp_path / "rows.jsonl")
    recipe = make_recipe(material, tmp_path / "run", train_data=str(tmp_path / "rows.jsonl"))
    refused(
        recipe, "rows of the task 'maths' in the part phase1_train, none with two distinct `ranks`.*rank responses"
    )
    shared = make_recipe(material, tmp_path / "shared", train_data=str(tmp_path / "rows.jsonl"), share_base=True)
    refused(shared, "rows of the task 'maths' in the part phase3_train")  # the base learns from chitchat
    write(
        [row | {"ranks": [1] * len(row["ranks"]), "prompt": "New?"} for row in make_rows()[:2]],
        tmp_path / "tied.jsonl",
    )
    tested = make_recipe(material, tmp_path / "tested", test_data=str(tmp_path / "tied.jsonl"))
    refused(tested, "tied.jsonl: got 2 rows of the task 'overall' in the part test, none with two distinct `ranks`")


def test_more_aggregators_than_prompts_are_refused(material, tmp_path):
    refused(
        make_recipe(material, tmp_path / "run", aggregator_members=30, phase3_rows="all"),
        r"got aggregator_members=30 and \d+ ranked prompts of the task 'maths' for phase 3, need at least as many",
    )


def refused(recipe: Recipe, match: str) -> str:
    with pytest.raises((ValueError, FileNotFoundError), match=match) as error:
        Pipeline(recipe).run()
    root = Path(recipe.output_dir)
    assert not list(root.iterdir()) if root.exists() else True
    return str(error.value)


ROW = {"prompt": "What?", "responses": ["this", "that"], "ranks": [1, 2], "task": "maths"}
BAD_ROWS = {
    "no two distinct ranks": ({"ranks": [1, 1]}, r"`ranks`: got \[1, 1\].*drop the row"),
    "an empty response": ({"responses": ["this", " "]}, "`responses`: got ' ' as response 2.*drop it"),
    "an unknown task": ({"task": "cooking"}, r"`task`: got 'cooking', need one of \['maths', 'chitchat', 'others'\]"),
    "an unknown point": ({"capability_ranks": {"brevity": [1, 2]}}, "`capability_ranks`: got the point 'brevity'"),
    "other lengths": ({"ranks": [1, 2, 3]}, "`ranks`: got 3 ranks for 2 responses.*add or remove"),
}


@pytest.mark.parametrize("change, match", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_refused_with_its_file_and_line(change, match, material, tmp_path):
    write([*make_rows(), {**ROW, **change}], tmp_path / "bad.jsonl")
    message = refused(make_recipe(material, tmp_path / "run", train_data=str(tmp_path / "bad.jsonl")), match)
    assert f"{tmp_path / 'bad.jsonl'}, line 27: " in message and "on_error='skip'" in message
    assert f"{tmp_path / 'bad.jsonl'}, line 27: " in refused(
        make_recipe(material, tmp_path / "test", test_data=str(tmp_path / "bad.jsonl")), match
    )


def test_broken_json_is_refused_with_its_line(material, tmp_path):
    write(make_rows(), tmp_path / "bad.jsonl")
    text = (tmp_path / "bad.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    text[4] = text[4][:20] + "\n"
    (tmp_path / "bad.jsonl").write_text("".join(text), encoding="utf-8")
    refused(
        make_recipe(material, tmp_path / "run", train_data=str(tmp_path / "bad.jsonl")),
        "bad.jsonl, line 5: got broken JSON",
    )


def test_data_that_are_not_there_are_refused(material, tmp_path):
    refused(
        make_recipe(material, tmp_path / "run", train_data=str(tmp_path / "none.jsonl")), "none.jsonl.*does not exist"
    )


def test_a_capability_point_without_labels_is_refused(material, tmp_path):
    rows = make_rows()
    for row in rows:
        row["capability_ranks"].pop("情感", None)
        row["capability_ranks"].pop("readability", None)
    write(rows, tmp_path / "rows.jsonl")
    recipe = make_recipe(material, tmp_path / "run", train_data=str(tmp_path / "rows.jsonl"))
    message = refused(recipe, "task 'chitchat': '情感'; task 'overall': 'readability'.*label the rows")
    assert f"{tmp_path / 'rows.jsonl'}: in the " in message and "training rows: " in message


def test_a_capability_point_without_labels_to_validate_it_is_refused(material, run, tmp_path):
    validation = {row.prompt_id for row in run.rows("phase1_validation")}
    rows = make_rows()
    for row in rows:
        if PreferenceRow([{"role": "user", "content": row["prompt"]}], [], []).prompt_id in validation:
            row["capability_ranks"].pop("correctness", None)
    write(rows, tmp_path / "rows.jsonl")
    recipe = make_recipe(material, tmp_path / "run", train_data=str(tmp_path / "rows.jsonl"))
    refused(recipe, "rows that validate phase 2: .*task 'maths': 'correctness'")


def test_a_task_with_too_few_prompts_is_refused(material, tmp_path):
    rows = [row for row in make_rows() if row["task"] != "maths"] + make_rows()[:1]
    write(rows, tmp_path / "rows.jsonl")
    refused(
        make_recipe(material, tmp_path / "run", train_data=str(tmp_path / "rows.jsonl")), "task 'maths': got 1 prompts"
    )


def test_a_response_that_does_not_fit_is_refused(material, tmp_path):
    refused(make_recipe(material, tmp_path / "run", max_length=12), "never cut: raise max_length")


def test_a_base_without_the_lora_targets_is_refused_with_those_that_it_has(material, tmp_path):
    message = refused(make_recipe(material, tmp_path / "run", lora_target_modules=["query", "v_proj"]), "query")
    assert all(name in message for name in ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"))


def test_more_layers_with_lora_than_the_base_has_are_refused(material, tmp_path):
    refused(make_recipe(material, tmp_path / "run", lora_layers=3), "lora_layers=3 for a base with 2 layers")


def base_like(material: Path, folder: Path) -> Path:
    shutil.copytree(material / "base", folder)
    return folder


def test_a_balance_of_the_routers_loss_out_of_range_is_refused(material, tmp_path):
    with pytest.raises(ValueError, match="got router_balance=2.0, need 0 .* to 1"):
        Pipeline(make_recipe(material, tmp_path / "run", router_balance=2.0)).run()


@pytest.mark.parametrize("pad_token, expected", [(None, "<|im_end|>"), ("<|endoftext|>", "<|endoftext|>")])
def test_a_tokenizer_without_a_pad_token_pads_with_its_eos_or_what_the_recipe_names(
    pad_token, expected, material, tmp_path
):
    base = base_like(material, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(base)
    run = Pipeline(make_recipe(material, tmp_path / "run", base_model=str(base), pad_token=pad_token))
    assert run.formatter.tokenizer.pad_token == expected


def test_what_pads_makes_no_difference(material, run, tmp_path):
    base = base_like(material, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(base)
    other = Pipeline(make_recipe(material, tmp_path / "run", base_model=str(base)))
    for stage in ("data", "maths/phase1"):
        other.run_stage(stage)
    assert other.formatter.tokenizer.pad_token_id != run.formatter.tokenizer.pad_token_id
    assert weights(other.root / "maths/phase1") == weights(run.root / "maths/phase1")


def test_a_pad_token_that_the_tokenizer_does_not_have_is_refused(material, tmp_path):
    refused(
        make_recipe(material, tmp_path / "run", pad_token="<nothing>"), "`pad_token` of the recipe: got '<nothing>'"
    )


def test_without_pad_token_and_eos_the_recipe_has_to_name_one(material, tmp_path):
    base = base_like(material, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(base)
    refused(make_recipe(material, tmp_path / "run", base_model=str(base)), "no pad token and no eos.*by `pad_token`")
    assert Pipeline(make_recipe(material, tmp_path / "b", base_model=str(base), pad_token="<|endoftext|>")).formatter


def test_a_router_with_other_tokens_is_refused(material, tmp_path):
    other = base_like(material, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(other)
    refused(make_recipe(material, tmp_path / "run", router_model=str(other)), "router_model.*has other tokens than")


@pytest.mark.parametrize("which", ["base_model", "router_model"])
def test_nan_in_the_weights_is_refused(which, material, tmp_path):
    base = base_like(material, tmp_path / "base")
    backbone = make_backbone(make_tokenizer())
    backbone.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    backbone.save_pretrained(base)
    refused(make_recipe(material, tmp_path / "run", **{which: str(base)}), "'layers.1.mlp.up_proj.weight'.*not finite")


@pytest.mark.parametrize(
    "name, match",
    [("model", "got the task 'Model'"), ("work", "got the task 'Work'"), ("keys", "'keys'.*PyTorch has taken")],
)
def test_a_task_whose_name_is_taken_is_refused(name, match, material, tmp_path):
    name = name if name == "keys" else name.title()
    (tmp_path / "tasks.yaml").write_text(TABLE.replace("maths", name), encoding="utf-8")
    write([{**row, "task": row["task"].replace("maths", name)} for row in make_rows()], tmp_path / "rows.jsonl")
    recipe = make_recipe(material, tmp_path / "run")
    refused(replace(recipe, tasks=str(tmp_path / "tasks.yaml"), train_data=str(tmp_path / "rows.jsonl")), match)


def test_tasks_whose_folders_would_be_the_same_are_refused(material, tmp_path):
    (tmp_path / "tasks.yaml").write_text(TABLE.replace("chitchat", "Maths!"), encoding="utf-8")
    refused(replace(make_recipe(material, tmp_path / "run"), tasks=str(tmp_path / "tasks.yaml")), "distinct words")


@pytest.mark.parametrize("name", ["data", "router", "maths/phase1", "model"])
def test_what_stands_in_a_stage_s_place_is_named_and_left(name, material, tmp_path):
    mine = tmp_path / "run" / name / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    with pytest.raises(ValueError, match=f"run/{name}: got something that no stage has written.*move it away"):
        Pipeline(make_recipe(material, tmp_path / "run")).run()
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == [mine]
    assert mine.read_text() == "years of work"


def test_a_folder_with_other_things_keeps_them(material, run, tmp_path):
    mine = [
        "notes.txt",
        "work/thesis.txt",
        "work/router/drawings.txt",
        "work/.hidden",
        "manifest.json.tmp",
        "maths/more.txt",
    ]
    for name in mine:
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    other = Pipeline(make_recipe(material, tmp_path / "run"))
    other.run()
    assert all((tmp_path / "run" / name).read_text() == name for name in mine)
    files = {str(path.relative_to(other.root)) for path in other.root.rglob("*") if path.is_file()}
    assert files - set(mine) == {str(path.relative_to(run.root)) for path in run.root.rglob("*") if path.is_file()}


def test_a_folder_that_another_run_writes_is_refused_and_named(material, tmp_path):
    with (
        locked_folder(tmp_path / "run"),
        pytest.raises(ValueError, match=f"process {os.getpid()} on .* is writing, need one run"),
    ):
        Pipeline(make_recipe(material, tmp_path / "run")).run()


def test_a_start_that_fails_claims_nothing(material, run, recipe, tmp_path):
    wrong = replace(recipe, output_dir=str(tmp_path / "run"), phase3={**recipe.phase3, "metric_for_best_model": "zzz"})
    refused(wrong, "`phase3` of the recipe")
    refused(replace(wrong, phase3=recipe.phase3, lora_target_modules=["q"]), r"no linear module \['q'\]")
    Pipeline(replace(recipe, output_dir=str(tmp_path / "run"))).run()
    assert weights(tmp_path / "run") == weights(run.root)


DATA_FAULTS = {
    "edited": lambda path: path.write_text(path.read_text(encoding="utf-8").replace("four", "five"), encoding="utf-8"),
    "cut off": lambda path: os.truncate(path, path.stat().st_size // 2),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("fault", DATA_FAULTS.values(), ids=DATA_FAULTS)
def test_rows_that_are_not_those_of_the_run_are_refused_and_deleting_them_helps(fault, run, recipe, tmp_path):
    shutil.copytree(run.root, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    fault(tmp_path / "run" / "data" / "phase1_train.jsonl")
    recipe = replace(recipe, output_dir=str(tmp_path / "run"))
    with pytest.raises(
        ValueError, match=f"data/phase1_train.jsonl: got .* or delete {tmp_path / 'run' / 'data'}, which"
    ):
        Pipeline(recipe).run()
    shutil.rmtree(tmp_path / "run" / "data")
    Pipeline(recipe).run()
    assert weights(tmp_path / "run") == weights(run.root)


@pytest.mark.parametrize(
    "name", ["router/model.safetensors", "maths/phase1/config.json", "maths/experts/logic/history.json"]
)
def test_a_finished_stage_that_is_not_whole_is_refused(name, run, recipe, tmp_path):
    shutil.copytree(run.root, tmp_path / "run")
    os.truncate(tmp_path / "run" / name, 10)
    with pytest.raises(ValueError, match=f"{name}: got 10 bytes, need the [0-9]+ bytes that the run wrote"):
        Pipeline(replace(recipe, output_dir=str(tmp_path / "run"))).run()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"recipe": 3}', "half of"])
def test_a_broken_manifest_is_refused(content, run, recipe, tmp_path):
    shutil.copytree(run.root, tmp_path / "run")
    (tmp_path / "run" / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="manifest.json: got a file that is not the manifest of a run"):
        Pipeline(replace(recipe, output_dir=str(tmp_path / "run"))).run()
    (tmp_path / "run" / "manifest.json").unlink()
    with pytest.raises(
        ValueError, match="got a finished stage that is not in manifest.json, need it there.*put the manifest back"
    ):
        Pipeline(replace(recipe, output_dir=str(tmp_path / "run"))).run()


def test_a_base_with_fewer_positions_than_max_length_is_refused(material, tmp_path):
    tokenizer = make_tokenizer()
    config = bert_config(tokenizer)
    config.max_position_embeddings = 64
    AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    changes = {"base_model": str(tmp_path / "base"), "lora_target_modules": ["query", "value"]}
    refused(make_recipe(material, tmp_path / "run", **changes), "got max_length=256, need at most 64, .*`base_model`")
    changes |= {"base_model": str(material / "base"), "router_model": str(tmp_path / "base")}
    changes["lora_target_modules"] = ["q_proj"]
    refused(make_recipe(material, tmp_path / "run", **changes), "need at most 64, .*`router_model`")


def test_bases_of_tasks_are_those_of_the_same_shape_and_tokens(material, tmp_path):
    unknown = make_recipe(material, tmp_path / "run", task_base_models={"cooking": "base"})
    refused(unknown, r"`task_base_models` of the recipe: got the tasks \['cooking'\], need some of")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    AutoModel.from_config(qwen2_config(tokenizer, num_hidden_layers=1)).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    other = make_recipe(material, tmp_path / "run", task_base_models={"maths": str(tmp_path / "small")})
    refused(
        other,
        "`task_base_models` of maths of the recipe: got .*small, which differs from .* need a model of the same shape",
    )
    tokenizer.add_tokens(["<tool>"])
    base = base_like(material, tmp_path / "tokens")
    tokenizer.save_pretrained(base)
    other = make_recipe(material, tmp_path / "run", task_base_models={"maths": str(base)})
    refused(other, "`task_base_models` of maths of the recipe: got .* whose tokenizer has other tokens")


def test_more_layers_of_the_router_than_it_has_are_refused(material, tmp_path):
    refused(
        make_recipe(material, tmp_path / "run", router_layers=3),
        "`router_layers` of the recipe: got 3, need at most 2",
    )


def test_experts_that_no_memory_holds_are_refused(material, tmp_path):
    refused(
        make_recipe(material, tmp_path / "run", lora_rank=10**12),
        "got lora_rank=1000000000000 .* GiB of memory: lower",
    )
