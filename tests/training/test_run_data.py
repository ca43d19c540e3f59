"""A run's rows: which fit, what is said of those that do not, and what tells whether a stage reads others than before."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from models import make_tokenizer
from test_pipeline import make_recipe, make_rows, material, write  # noqa: F401

from dmoerm_trl.data.formatting import Formatter
from dmoerm_trl.training.recipe import Recipe
from dmoerm_trl.training.run_data import RunData, read_run_data

LONG = "and so on " * 40


def with_long_rows(tmp_path: Path) -> list[dict]:
    """Rows of which the third and the eighth have a response that does not fit into 100 tokens, and the fifth a prompt."""
    rows = make_rows()
    for number, times in ((2, 1), (7, 2)):
        rows[number]["responses"][1] = LONG * times
    rows[4]["prompt"] = f"{LONG} {rows[4]['prompt']}"
    write(rows, tmp_path / "rows.jsonl")
    return rows


def read(recipe: Recipe) -> RunData:
    formatter = Formatter(make_tokenizer(), recipe.max_length)
    return read_run_data(recipe, recipe.task_table, formatter, {})


@pytest.fixture
def long(material, tmp_path) -> Recipe:  # noqa: F811
    with_long_rows(tmp_path)
    return make_recipe(material, tmp_path / "run", train_data=str(tmp_path / "rows.jsonl"), max_length=100)


def test_all_rows_that_do_not_fit_are_counted_and_found_and_it_is_said_what_would_keep_them(long):
    with pytest.raises(ValueError) as error:
        read(long)
    message = str(error.value)
    assert "got 2 of 26 rows that cannot be read" in message
    assert "rows.jsonl, line 3" in message and "rows.jsonl, line 8" in message and "line 5" not in message
    assert "never cut" in message and "`on_error: skip`" in message
    whole = Formatter(make_tokenizer(), 10**6)
    rows = [json.loads(line) for line in Path(long.train_data).read_text(encoding="utf-8").splitlines()]
    most = max(len(whole.encode(rows[7]["prompt"], text).input_ids) for text in rows[7]["responses"])
    assert f"all of them fit into {most} tokens" in message
    assert not set(read(replace(long, max_length=most)).report) & {message}


def test_they_are_left_out_on_request_and_counted(long):
    data = read(replace(long, on_error="skip"))
    assert sum(map(len, data.parts.values())) == 24
    assert "24 rows; 2 skipped (responses that exceed max_length: 2)" in data.report[0]
    prompts = {row.prompt[0]["content"] for part in data.parts.values() for row in part}
    assert len(prompts) == 24 and not prompts & {make_rows()[2]["prompt"], make_rows()[7]["prompt"]}


def test_the_report_has_the_lengths_and_what_a_larger_limit_keeps_whole(long):
    report = read(replace(long, on_error="skip")).report
    (line,) = [line for line in report if "tokens of a row's longest text" in line]
    assert "median " in line and "99% " in line and "max_length=100 keeps 23 of 26 rows whole, 200 " in line
    assert "3 rows exceed max_length=100" in line
    assert sum("1 of " in line and "lost the oldest part" in line for line in report) == 1  # the long prompt


def test_a_row_that_the_chat_template_refuses_is_found_too(material, tmp_path):  # noqa: F811
    rows = make_rows()
    write(rows, tmp_path / "rows.jsonl")
    recipe = make_recipe(material, tmp_path / "run", train_data=str(tmp_path / "rows.jsonl"))
    tokenizer = make_tokenizer()
    refuse = (
        "{% for m in messages %}{% if 'two 4' in m.content %}{{ raise_exception('no fours') }}{% endif %}{% endfor %}"
    )
    tokenizer.chat_template = refuse + tokenizer.chat_template
    rows[4]["prompt"] = "What is two and two 4"
    write(rows, tmp_path / "rows.jsonl")
    formatter = Formatter(tokenizer, 256)
    with pytest.raises(ValueError, match="got 1 of 26 rows that cannot be read .*rows.jsonl, line 5.*no fours"):
        read_run_data(recipe, recipe.task_table, formatter, {})
    data = read_run_data(replace(recipe, on_error="skip"), recipe.task_table, formatter, {})
    assert "1 skipped (refused by the chat template: 1)" in data.report[0]


def test_test_rows_of_their_own_are_measured_too(long, material, tmp_path):  # noqa: F811
    recipe = replace(long, train_data=str(material / "rows.jsonl"), test_data=long.train_data)
    with pytest.raises(ValueError, match="rows.jsonl: got 2 of 26 rows that cannot be read"):
        read(recipe)


def test_nothing_fits(long):
    with pytest.raises(ValueError, match="none of which fits into max_length=3: raise it"):
        read(replace(long, max_length=3, on_error="skip"))


# What tells rows apart.


def digests(recipe: Recipe, change) -> dict:
    data = read(recipe)
    for part in data.parts.values():
        part[:] = [change(row) for row in part]
    return data.digests(recipe.task_table)


def changed(recipe: Recipe, change) -> set[str]:
    """The stages, and the experts, that read others."""
    before, now = digests(recipe, lambda row: row), digests(recipe, change)
    found = {name for name in before if not isinstance(before[name], dict) and before[name] != now[name]}
    points = {(name, point) for name, of in before.items() if isinstance(of, dict) for point in of}
    return found | {f"{name}/{point}" for name, point in points if before[name][point] != now[name][point]}


@pytest.fixture
def recipe(material, tmp_path) -> Recipe:  # noqa: F811
    return make_recipe(material, tmp_path / "run")


def test_labels_of_a_point_are_read_by_its_experts_alone(recipe):
    def turned(row):
        ranks = {**row.capability_ranks}
        if "correctness" in ranks:
            ranks["correctness"] = [-rank for rank in ranks["correctness"]]
        return replace(row, capability_ranks=ranks)

    assert changed(recipe, turned) == {"maths/experts/correctness"}


def test_a_task_s_texts_are_read_by_its_stages_and_those_of_all_tasks(recipe):
    def louder(row):
        return replace(row, responses=[text + "!" for text in row.responses]) if row.task == "maths" else row

    every = {"ensemble", "overall/phase1", "overall/phase3", "overall/experts/logic", "overall/experts/readability"}
    own = {"maths/phase1", "maths/phase3", "maths/experts/correctness", "maths/experts/logic"}
    assert changed(recipe, louder) == every | own  # the router reads prompts


def test_prompts_are_read_by_the_router_too(recipe):
    def asked(row):
        return replace(row, prompt=[{**turn, "content": turn["content"] + "?"} for turn in row.prompt])

    assert "router" in changed(recipe, asked)
    assert changed(recipe, lambda row: type(row)(**json.loads(json.dumps(asdict(row))))) == set()
