"""`dmoerm prepare` from end to end, and the examples of its configuration."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, DatasetDict
from models import PROMPTS, TASKS
from trl import TrlParser

from dmoerm_trl.cli import main
from dmoerm_trl.data.prepare import preparation, reading
from dmoerm_trl.data.prepare.sets import SETS
from dmoerm_trl.data.rows import check_capability_labels, load_rows
from dmoerm_trl.labelling.comparisons import Plan
from dmoerm_trl.scripts.prepare import PrepareArguments
from dmoerm_trl.tasks import TaskTable

FOLDER = Path(__file__).parents[3] / "recipes" / "prepare"
ONE_TASK = FOLDER / "general.tasks.yaml"
RECIPES = sorted({*FOLDER.glob("*.yaml")} - {ONE_TASK})

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def helpsteer2(prompt: str, *helpfulness: int) -> list[dict]:
    return [
        {"prompt": prompt, "response": f"Answer {value}."} | dict.fromkeys(ATTRIBUTES, value) for value in helpfulness
    ]


def pair(prompt: str) -> dict:
    return {"prompt": prompt, "response_1": "Yes.", "response_2": "No.", "preferred": 2}


def hh(prompt: str) -> dict:
    start = f"\n\nHuman: {'Hello! ' * 40}\n\nAssistant: Hi.\n\nHuman: {prompt}\n\nAssistant: "
    return {"chosen": f"{start}The long answer.", "rejected": f"{start}No."}


def run(*arguments: object) -> None:
    assert main(["prepare", *map(str, arguments)]) == 0


def test_rows_and_task_table_are_ready_for_training(tmp_path, write, capsys):
    source = write(helpsteer2("Hi", 4, 1) + helpsteer2("Tie", 3, 3) + helpsteer2("Hm", 0, 2) + helpsteer2("Ho", 0, 4))
    output = tmp_path / "new" / "rows.jsonl"
    run("--dataset", "helpsteer2", "--source", source, "--output", output, "--max_rows", 2)
    assert f"{output}: 2 rows; 1 skipped (no two distinct ranks: 1)" in capsys.readouterr().out
    tasks = TaskTable.load(str(tmp_path / "new" / "rows.tasks.yaml"))
    assert tasks == TaskTable({"general": ATTRIBUTES}, ATTRIBUTES)
    rows, report = load_rows(output, tasks=tasks)
    assert [(row.prompt[0]["content"], row.ranks) for row in rows] == [("Hi", [1, 2]), ("Hm", [2, 1])]
    assert str(report) == f"{output}: 2 rows"
    check_capability_labels(rows, tasks)
    assert json.loads((tmp_path / "new" / "rows.report.json").read_text())["parts"]["train"]["rows"] == 2


def test_a_yaml_file_and_options_over_it(tmp_path, write):
    config = tmp_path / "prepare.yaml"
    config.write_text(
        f"dataset: pairs\nsource: {write([pair('Hi') | {'kind': 'talk'}, pair('Hm') | {'kind': 'sums'}])}\n"
        f"output: {tmp_path}/rows.jsonl\ncolumns: {{response_1: response_2, response_2: response_1}}\n"
        "task_column: kind\ntask_names: {sums: maths}\n"
    )
    run("--config", config)
    table = TaskTable({"talk": ("wit",), "maths": ("wit",)}, ("wit",))
    rows, _ = load_rows(tmp_path / "rows.jsonl", tasks=table)
    assert [(row.task, row.responses) for row in rows] == [("talk", ["No.", "Yes."]), ("maths", ["No.", "Yes."])]
    assert not (tmp_path / "rows.tasks.yaml").exists()  # the set has no capability points
    run("--config", config, "--where", '{"kind": "talk"}', "--task_names", '{"talk": "chat"}')
    assert [json.loads(line)["task"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == ["chat"]


def test_splits_and_what_they_share(tmp_path, write):
    splits = {"train": [pair("Hi"), pair("Hm")], "test": [pair(" hi"), pair("Ho")]}
    DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(tmp_path / "saved")
    output = tmp_path / "rows.jsonl"
    run("--dataset", "pairs", "--source", tmp_path / "saved", "--output", output, "--split", "train", "test")
    for name in splits:
        assert len(load_rows(tmp_path / f"rows-{name}.jsonl", tasks=TaskTable.paper())[0]) == 2
    report = json.loads((tmp_path / "rows.report.json").read_text())
    assert report["leaks"] == [{"parts": ["train", "test"], "prompts": 1, "rows": {"train": 1, "test": 1}}]

    other, test = tmp_path / "other.jsonl", str(tmp_path / "rows-test.jsonl")
    run("--dataset", "pairs", "--source", write([pair("Ho")]), "--output", other, "--against", test)
    report = json.loads((tmp_path / "other.report.json").read_text())
    assert report["leaks"] == [{"parts": ["train", test], "prompts": 1, "rows": {"train": 1, test: 1}}]
    with pytest.raises(ValueError, match="source.jsonl, line 1: got no row as `dmoerm prepare` writes it"):
        run("--dataset", "pairs", "--source", other, "--output", other, "--against", tmp_path / "source.jsonl")


@pytest.fixture
def router(tmp_path, dmoerm, tokenizer) -> Path:
    """The folder of a DMoERM whose router sends the prompts of `PROMPTS` to their tasks, and reads no more than a short turn."""
    dmoerm.save_pretrained(tmp_path / "model")
    tokenizer.model_max_length = 40
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def table(tmp_path) -> Path:
    """The task table of that DMoERM."""
    path = tmp_path / "tasks.yaml"
    path.write_text(yaml.safe_dump({"tasks": TASKS, "overall": ["logic"]}, allow_unicode=True), encoding="utf-8")
    return path


def test_from_a_plain_set_by_a_router_to_rows_that_a_judge_can_be_asked_about(
    tmp_path, write, router, table, monkeypatch
):
    monkeypatch.setattr(preparation, "ROUTED_AT_ONCE", 2)
    tasks = ["maths", "chitchat", "story writing"]
    bad = {"chosen": "no transcript", "rejected": "no transcript"}
    source = write([hh(PROMPTS["maths"]), bad, hh(PROMPTS["chitchat"]), hh(PROMPTS["story writing"]), hh("More?")])
    output = tmp_path / "rows.jsonl"
    settings = ("--router", router, "--tasks", table, "--max_rows", 3)
    run("--dataset", "hh", "--source", source, "--output", output, *settings)
    rows, _ = load_rows(output, tasks=TaskTable.load(str(table)))
    assert [row.task for row in rows] == tasks
    plan = Plan(TaskTable.load(str(table)))
    assert [plan.wanted_points(row) for row in rows] == [TASKS[task] for task in tasks]
    report = json.loads((tmp_path / "rows.report.json").read_text())["parts"]["train"]
    routed = {task: number["rows"] for task, number in report["tasks by the router"].items()}
    assert routed == {task: number["rows"] for task, number in report["tasks"].items()} == Counter(tasks)
    assert report["rows with the router's task"] == 3 and report["skipped"] == {"no transcript": 1}


def test_without_a_router_the_recipe_and_its_table_lead_to_labels_for_training(tmp_path, write):
    source, output, labels = write([hh(f"Number {n}?") for n in range(3)]), tmp_path / "hh.jsonl", tmp_path / "labels"
    recipe = ("--config", FOLDER / "hh.yaml", "--drop_personal_data", "false")
    run(*recipe, "--source", source, "--split", "train", "--output", output)
    longer = {"kind": "function", "function": "dmoerm_trl.labelling.heuristics:content_richness"}
    asked = {
        "rows": output,
        "output_dir": labels,
        "tasks": ONE_TASK,
        "judge": json.dumps(longer),
        "stop_early": "false",
    }
    assert main(["label", *(str(word) for key, value in asked.items() for word in (f"--{key}", value))]) == 0
    tasks = TaskTable.load(str(ONE_TASK))
    rows, _ = load_rows(labels / "labelled.jsonl", tasks=tasks)
    assert [row.task for row in rows] == ["general"] * 3
    check_capability_labels(rows, tasks)


def test_a_router_leaves_a_rows_own_task_and_makes_the_table_of_a_set_with_points(tmp_path, write, router):
    output = tmp_path / "rows.jsonl"
    own = {"prompt": PROMPTS["maths"], "responses": ["A", "B"], "ranks": [1, 2]}
    source = write([own | {"task": "chitchat"}, own | {"prompt": PROMPTS["chitchat"]}, own | {"task": "others"}])
    arguments = ("--dataset", "rows", "--source", source, "--output", output)
    run(*arguments, "--router", router)
    assert [json.loads(line)["task"] for line in output.read_text().splitlines()] == ["chitchat", "chitchat", "others"]
    report = json.loads((tmp_path / "rows.report.json").read_text())["parts"]["train"]
    assert report["tasks by the router"]["maths"]["rows"] == 2 and report["rows with the router's task"] == 1
    assert "| rows with the router's task, because they had none | 1 |" in (tmp_path / "rows.report.md").read_text()
    with pytest.raises(
        ValueError, match=r"`router`: got .*model, whose tasks \['story writing', 'maths'\] `tasks` does not"
    ):
        run(*arguments, "--router", router, "--tasks", "paper")

    source = write(helpsteer2(PROMPTS["maths"], 4, 1) + helpsteer2(PROMPTS["chitchat"], 0, 2))
    run("--dataset", "helpsteer2", "--source", source, "--output", output, "--router", router)
    assert TaskTable.load(str(tmp_path / "rows.tasks.yaml")).tasks == {"maths": ATTRIBUTES, "chitchat": ATTRIBUTES}


def test_tokens_and_routes(tmp_path, write, dmoerm, tokenizer):
    dmoerm.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    prompts = [PROMPTS["maths"], PROMPTS["chitchat"], PROMPTS["maths"]]
    source, model = write([pair(prompt) for prompt in prompts]), tmp_path / "model"
    settings = ("--tokenizer", model, "--router", model)
    run("--dataset", "pairs", "--source", source, "--output", tmp_path / "rows.jsonl", *settings)
    report = json.loads((tmp_path / "rows.report.json").read_text())["parts"]["train"]
    assert {task: number["rows"] for task, number in report["tasks by the router"].items()} == {
        "maths": 2,
        "chitchat": 1,
    }
    chats = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for prompt in prompts
        for answer in ("Yes.", "No.")
    ]
    lengths = [
        len(tokenizer(tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n")).input_ids) for chat in chats
    ]
    assert report["lengths"]["tokens of a prompt with a response"]["greatest"] == max(lengths)
    assert report["lengths"]["tokens of a prompt with a response"]["mean"] == pytest.approx(sum(lengths) / 6, abs=0.01)


@pytest.mark.parametrize("kind", ["jsonl.gz", "json", "parquet", "csv", "folder"])
def test_kinds_of_sources(tmp_path, kind):
    dataset = Dataset.from_list([pair("Hi"), pair("Hm")])
    path = tmp_path / ("source" if kind == "folder" else f"source.{kind}")
    if kind == "folder":
        path.mkdir()
        dataset.to_parquet(path / "train.parquet")
    elif kind == "jsonl.gz":
        dataset.to_json(path, compression="gzip")
    else:
        getattr(dataset, f"to_{kind}")(path)
    run("--dataset", "pairs", "--source", path, "--output", tmp_path / "rows.jsonl")
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2


def test_sources_that_are_not_there(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "rows.txt").write_text("Hi")
    for source, error, message in (
        (
            tmp_path / "missing.jsonl",
            FileNotFoundError,
            "missing.jsonl', which does not exist: need a file ending in .jsonl",
        ),
        (tmp_path / "rows.txt", FileNotFoundError, "a kind that is not read"),
        (tmp_path / "empty.jsonl", ValueError, "an empty file"),
    ):
        with pytest.raises(error, match=message):
            reading.open_set(str(source))
    with pytest.raises(OSError, match="some/set"):  # tests have no network
        reading.open_set("some/set")


def test_a_hub_dataset_is_streamed_as_it_is_named(monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *names, **settings: asked.append((names, settings)))
    reading.open_set("some/set", "test", name="preference", data_dir="a", revision="v1")
    settings = {"data_dir": "a", "split": "test", "revision": "v1", "streaming": True}
    assert asked == [(("some/set", "preference"), settings)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "hhh"}, "`dataset`: got 'hhh', need one of hh, shp"),
        ({"columns": "{prompt"}, "`columns`: got '{prompt', need JSON"),
        ({"task": "talk", "router": "model"}, "got `task: talk` and `router: model`, need one of them"),
        ({"max_rows": 0}, "`max_rows`: got 0, need at least 1"),
        ({"source": __file__, "split": ["train", "test"]}, r"`split`: got \['train', 'test'\] of the file"),
    ],
)
def test_arguments_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        PrepareArguments(**({"dataset": "hh", "source": "x", "output": "rows.jsonl"} | changes))


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} >= {"hh", "ultrafeedback", "helpsteer2", "helpsteer3", "shp"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_read_and_fits_its_set(recipe):
    (arguments,) = TrlParser((PrepareArguments,)).parse_args_and_config(["--config", str(recipe)])
    preference_set = SETS[arguments.dataset].with_options(arguments.options)
    assert set(arguments.points) <= set(preference_set.points)
    table = arguments.tasks and TaskTable.load(arguments.tasks)
    if table:
        known = {point for points in table.tasks.values() for point in points}
        assert set(arguments.points.values()) <= known | {None}
        assert set(arguments.task_names.values()) <= set(table.tasks)
