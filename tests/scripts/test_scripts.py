"""The commands as a user runs them: the recipes parse, and the demo does all that it says, with very few steps."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from safetensors.torch import load_file
from trl import TrlParser

from dmoerm_trl.cli import main
from dmoerm_trl.data.preference_row import PreferenceRow
from dmoerm_trl.modeling.modeling_dmoerm import DMoERMForSequenceClassification
from dmoerm_trl.scripts.demo import RECIPE, DemoArguments
from dmoerm_trl.tasks import TaskTable
from dmoerm_trl.training.recipe import Recipe

ROOT = Path(__file__).parents[2]
FEW_STEPS = {"max_steps": 2, "eval_steps": 1, "per_device_train_batch_size": 2}


def test_the_demo_recipe_is_read_by_the_demo():
    arguments, recipe = TrlParser((DemoArguments, Recipe)).parse_args_and_config(
        ["--config", str(ROOT / RECIPE)], fail_with_unknown_args=True
    )
    assert recipe.output_dir == "runs/demo" and arguments.rows_per_task > 0


def characters(*, response: str, **_: object) -> int:
    return len(response)


def nothing(**_: object) -> int:
    return 0


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, Path]:
    """A demo of very few steps: its folder and its recipe."""
    folder = tmp_path_factory.mktemp("demo")
    settings = yaml.safe_load((ROOT / RECIPE).read_text())
    settings |= {
        "rows_per_task": 40,
        "rows_of_others": 6,
        "validation_share": 0.4,
        "base_texts": 40,
        "ppo_prompts": 4,
        "workers": 1,
    }
    settings |= {"output_dir": str(folder / "run"), "base_model": str(folder / "base"), "ensemble_size": 2}
    settings |= {"train_data": str(folder / "world.jsonl"), "lora_rank": 2}
    settings["base"] = {"max_steps": 2, "hidden_size": 16, "num_layers": 1, "vocab_size": 400}
    settings["ppo"] |= {"per_device_train_batch_size": 4, "total_episodes": 8, "response_length": 8}
    settings |= dict.fromkeys(("router", "phase1", "phase2", "phase3", "baselines"), FEW_STEPS)
    recipe = folder / "demo.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    assert main(["demo", "--config", str(recipe)]) == 0
    return folder / "run", recipe


@pytest.mark.slow
def test_the_demo_writes_what_it_promises(demo):
    run, _ = demo
    summary = json.loads((run / "summary.json").read_text())
    columns = {*TaskTable.paper().tasks, "others", "overall"}
    methods = {"single", "mean", "WCO", "UWO", "DMoERM-w/o-Outer", "DMoERM", "length only", "ceiling"}
    assert set(summary["consistency"]) == methods
    assert all(set(cells) == columns for cells in summary["consistency"].values())
    assert all(0 <= value <= 1 for cells in summary["consistency"].values() for value in cells.values())
    assert 0 <= summary["router_accuracy"] <= 1
    assert set(summary["ppo"]) == {"before", "after"}
    assert summary["seconds"]["training"] > 0 and "training: chitchat/phase3" in summary["seconds"]
    assert (run / "consistency.md").exists() and (run / "accuracy_curves.png").stat().st_size > 10_000
    model = DMoERMForSequenceClassification.from_pretrained(run / "model")
    assert {task: tuple(points) for task, points in model.config.tasks.items()} == TaskTable.paper().tasks


@pytest.mark.slow
def test_the_demo_takes_no_other_world(demo, tmp_path):
    """Gold of seed 1 says nothing of rows and a base of seed 0."""
    _, recipe = demo
    other = ["demo", "--config", str(recipe), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match=r"world.jsonl: got rows of another seed or number, need .*`train_data`"):
        main([*other, "--seed", "1"])
    with pytest.raises(ValueError, match=r"world.jsonl: got rows of another seed"):
        main([*other, "--rows_per_task", "41"])
    rows = ["--train_data", str(tmp_path / "world.jsonl")]
    with pytest.raises(ValueError, match=r"base: got a base of another seed or size, need .*`base_model`"):
        main([*other, *rows, "--seed", "1"])
    with pytest.raises(ValueError, match=r"base: got a base of another seed or size"):
        main([*other, "--base_texts", "41"])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_eval_and_score_read_the_demos_run(demo, capsys):
    run, recipe = demo
    settings = {
        key: value for key, value in yaml.safe_load(recipe.read_text()).items() if key in Recipe.__dataclass_fields__
    }
    train_recipe = recipe.with_name("train.yaml")
    train_recipe.write_text(yaml.safe_dump(settings))
    before = json.loads((run / "consistency.json").read_text())["consistency"]
    main(["eval", "--config", str(train_recipe)])
    assert "DMoERM-w/o-Outer" in capsys.readouterr().out
    after = json.loads((run / "consistency.json").read_text())["consistency"]
    assert after == {method: cells for method, cells in before.items() if method != "ceiling"}

    judges = json.dumps({"longest": {"kind": "function", "function": "test_scripts:characters"}})
    for most in ("100000", "0"):  # the second time there is nothing left to ask
        main(["eval", "--config", str(train_recipe), "--judges", judges, "--max_calls", most])
        assert "longest: " in capsys.readouterr().out
        after = json.loads((run / "consistency.json").read_text())["consistency"]
        assert after["longest"] == after["length only"]
    with pytest.raises(ValueError, match="got the names .'single'., which are methods of the table"):
        main(["eval", "--config", str(train_recipe), "--judges", judges.replace("longest", "single")])

    main(["score", "--model", str(run / "model"), "--prompt", "Tell me of tea.", "--response", "Here is tea."])
    scores = json.loads(capsys.readouterr().out)
    assert set(scores["capability_scores"]) == set(TaskTable.paper().tasks[scores["route"]])
    main(
        [
            "score",
            "--model",
            str(run / "model"),
            "--rows",
            str(run / "data" / "test.jsonl"),
            "--output",
            str(run / "s.jsonl"),
        ]
    )
    rows = [json.loads(line) for line in (run / "data" / "test.jsonl").read_text().splitlines()]
    assert len((run / "s.jsonl").read_text().splitlines()) == sum(len(row["responses"]) for row in rows)
    with pytest.raises(SystemExit):
        main(["score", "--model", str(run / "model"), "--rows", "none", "--explain", "--output", str(run / "s.jsonl")])
    assert (run / "s.jsonl").stat().st_size > 1
    capsys.readouterr()

    tied = rows[0] | {"ranks": [1] * len(rows[0]["ranks"]), "prompt": "Only for experts?", "task": "roleplay"}
    tied["capability_ranks"] = {"logic": [*range(1, len(tied["ranks"]) + 1)]}
    (run / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, tied]))
    main(["eval", "--config", str(train_recipe), "--rows", str(run / "more.jsonl")])
    assert f"1 of {len(rows) + 1} rows left out: without an overall preference" in capsys.readouterr().out
    assert json.loads((run / "consistency.json").read_text())["consistency"]["DMoERM"] == before["DMoERM"]


@pytest.mark.slow
def test_a_finished_training_is_left_as_it_is(demo):
    run, recipe = demo
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    train_recipe = recipe.with_name("train.yaml")
    settings = {
        key: value for key, value in yaml.safe_load(recipe.read_text()).items() if key in Recipe.__dataclass_fields__
    }
    train_recipe.write_text(yaml.safe_dump(settings))
    main(["train", "--config", str(train_recipe)])
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}


@pytest.fixture
def evaluated(tmp_path, monkeypatch) -> tuple[Path, list[str]]:
    """A training that counts as finished, whose one method scores 200 pairs: its folder, and the command that evaluates it."""
    rows = [
        PreferenceRow([{"role": "user", "content": f"{number}?"}], ["longer", "short"], [1, 2], "chitchat")
        for number in range(200)
    ]
    run = SimpleNamespace(finished=True, root=tmp_path, tasks=TaskTable.paper(), rows=lambda part: rows)
    monkeypatch.setattr("dmoerm_trl.training.pipeline.Pipeline", lambda recipe: run)
    monkeypatch.setattr(
        "dmoerm_trl.commands.eval.method_scores", lambda run, rows: {"single": [[0.0, 1.0]] * len(rows)}
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(dict.fromkeys(("base_model", "train_data"), "none") | {"output_dir": str(tmp_path)})
    )
    return tmp_path, ["eval", "--config", str(recipe), "--resamples", "10"]


def table_of(run: Path) -> dict[str, float]:
    cells = json.loads((run / "consistency.json").read_text())["consistency"]
    return {method: of_method["overall"]["mean"] for method, of_method in cells.items()}


def test_a_judge_that_stops_leaves_the_table_of_all_before_it(evaluated, capsys):
    run, command = evaluated
    judges = {name: {"kind": "function", "function": f"test_scripts:{name}"} for name in ("characters", "nothing")}
    command += ["--judges", json.dumps(judges)]
    with pytest.raises(SystemExit, match="stopped: characters: .*max_calls above 0"):
        main([*command, "--max_calls", "0"])
    assert table_of(run) == {"single": 0.0}
    assert "| single " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="stopped: nothing: the judge gives both responses the same score in"):
        main(command)
    assert table_of(run) == {"single": 0.0, "characters": 1.0}
    assert "| characters " in (printed := capsys.readouterr().out)
    assert "characters: 200 pairs, 0 of them undecided; 400 answers, 0 unreadable" in printed
    assert main([*command, "--stop_early", "false"]) == 0
    assert table_of(run)["nothing"] == 0.5
    printed = capsys.readouterr().out
    assert (
        "nothing: 200 pairs, 200 of them undecided; 400 answers, 0 unreadable. Warning: the judge gives both"
        in printed
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--max_calls", "-1"], "`max_calls`: got -1"),
        (["--max_rounds", "2"], "got max_rounds=2, need 1, or more with a judge that samples"),
        (
            ["--judges", '{"\\u001b[2J": {"kind": "function", "function": "test_scripts:nothing"}}'],
            "of a judge, need printable",
        ),
        (
            ["--judges", '{"///": {"kind": "function", "function": "test_scripts:nothing"}}'],
            "of a judge, need one with letters",
        ),
        (["--judges", '{"a": "S3CRET"}'], "`judges`: got a dict, need name -> `kind`"),
        (["--judges", '{"a": {"api_key": "S3CRET"'], "`judges`: got text that is not JSON"),
    ],
)
def test_mistakes_about_judges_are_found_before_anything_is_scored(evaluated, monkeypatch, options, says):
    _, command = evaluated
    monkeypatch.setattr("dmoerm_trl.commands.eval.method_scores", None)  # whatever calls it fails
    judges = json.dumps({"nothing": {"kind": "function", "function": "test_scripts:nothing"}})
    with pytest.raises(ValueError, match=says) as error:
        main([*command, *([] if "--judges" in options else ["--judges", judges]), *options])
    assert "S3CRET" not in str(error.value)


def test_world_writes_rows(tmp_path, capsys):
    out = tmp_path / "world.jsonl"
    numbers = ["--rows_per_task", "3", "--rows_of_others", "2", "--labelled_rows_per_task", "1"]
    main(["world", "--output", str(out), *numbers])
    assert len(out.read_text().splitlines()) == 22
    assert "ceiling" in capsys.readouterr().out


@pytest.fixture
def scored(dmoerm, tokenizer, tmp_path) -> list[str]:
    """A command that scores two responses."""
    dmoerm.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    row = {"prompt": "Hi?", "responses": ["幽默", "\x1b[2J"], "ranks": [1, 2]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return ["score", "--model", str(tmp_path / "model"), "--rows", str(tmp_path / "rows.jsonl")]


def test_scores_go_to_a_new_folder_and_follow_no_link(scored, tmp_path, capsys):
    assert main(scored) == 0
    printed = capsys.readouterr().out
    output = tmp_path / "new" / "scores.jsonl"
    assert main([*scored, "--output", str(output)]) == 0
    assert output.read_text(encoding="utf-8") == printed
    assert [json.loads(line)["response"] for line in printed.splitlines()] == ["幽默", "\x1b[2J"]
    assert [path.name for path in output.parent.iterdir()] == ["scores.jsonl"]

    (tmp_path / "precious").write_text("mine")
    for name in ("scores.jsonl.partial", ".scores.jsonl.partial"):
        (output.parent / name).symlink_to(tmp_path / "precious")
    output.unlink()
    assert main([*scored, "--output", str(output)]) == 0
    assert (tmp_path / "precious").read_text() == "mine" and not output.is_symlink()


def test_a_place_that_cannot_be_written_is_said_before_the_work(scored, tmp_path, monkeypatch):
    monkeypatch.setattr("dmoerm_trl.commands.score.DMoERMForSequenceClassification", None)  # nothing is loaded
    for output, says in (
        (tmp_path, "it is a folder"),
        (tmp_path / "rows.jsonl", "that is an input too"),
        (tmp_path / "rows.jsonl" / "scores.jsonl", "cannot be written"),
    ):
        with pytest.raises(ValueError, match=says):
            main([*scored, "--output", str(output)])
    assert (tmp_path / "rows.jsonl").read_text().startswith('{"prompt"')


def test_an_explanation_cannot_steer_the_terminal(scored, capsys):
    assert main([*scored, "--explain"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "[2J" in printed


@pytest.mark.slow
def test_the_example_scores_with_the_demos_model(demo, capsys, monkeypatch):
    run, _ = demo
    monkeypatch.setattr("sys.argv", ["score.py", str(run / "model")])
    runpy.run_path(str(ROOT / "examples" / "score.py"), run_name="__main__")
    assert capsys.readouterr().out.count("reward ") == 2


@pytest.mark.slow
@pytest.mark.requires_ppo
def test_the_ppo_example_trains_a_policy_with_the_demos_model(demo, tmp_path, monkeypatch):
    run, _ = demo
    options = {"policy": run.parent / "base", "reward_model": run / "model", "prompts": run / "data" / "test.jsonl"}
    options |= {"output_dir": tmp_path / "policy", "total_episodes": 4, "per_device_train_batch_size": 4}
    options |= {"response_length": 4, "num_sample_generations": 0, "bf16": False, "report_to": "none"}
    options |= {"monitor_prompts": 2}
    monkeypatch.setattr(
        "sys.argv", ["ppo.py", *(word for key, value in options.items() for word in (f"--{key}", str(value)))]
    )
    runpy.run_path(str(ROOT / "examples" / "ppo.py"), run_name="__main__")
    policy = load_file(tmp_path / "policy" / "model.safetensors")
    before = load_file(run.parent / "base" / "model.safetensors")
    assert any(not policy[name].equal(before[name]) for name in before)
