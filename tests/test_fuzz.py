"""The short form of the benchmark of malformed inputs, and what it takes for what."""

import json

import fuzz
import pytest
from fuzz_case import WAY_OUT, error_of
from fuzz_values import row_meant, table_meant, turns_meant


@pytest.mark.slow
@pytest.mark.requires_ppo
def test_malformed_inputs_are_named_counted_or_harmless(start, tmp_path):
    kinds = [kind for kind in fuzz.KINDS if kind != "resume"]  # whole trainings: test_pipeline.py
    options = ["--json", str(tmp_path / "fuzz.json"), "--cases", "24", "--seed", "1"]
    process = start(fuzz.main, [*options, "--only", *kinds])
    process.join(280)
    assert process.exitcode == 0
    cases = json.loads((tmp_path / "fuzz.json").read_text())["cases"]
    assert {case["kind"] for case in cases} == {*kinds} and len(cases) >= 20
    assert not [case for case in cases if case["outcome"] not in fuzz.RIGHT]


@pytest.mark.parametrize(
    "said, message, foreign",
    [
        ('Traceback (most recent call last):\n  File "/x/lib/y.py", line 1, in f\n    f()\nKeyError: 3\n', "KeyError: 3", True),
        ('Traceback (most recent call last):\n  File "/x/lib/y.py", line 1\nValueError: got 3\nneed 4\n', "ValueError: got 3\nneed 4", False),
        ('Traceback (most recent call last):\n  File "/x/dmoerm_trl/y.py", line 1\nRuntimeError: no\n', "RuntimeError: no", False),
        ('Traceback (most recent call last):\n  File "/x/lib/y.py", line 1\nRuntimeError: no\n', "RuntimeError: no", True),
        ("reading\ndmoerm: error: x.yaml: got 3, need 4\n", "dmoerm: error: x.yaml: got 3, need 4\n", False),
        ("dmoerm: error: EOFError\nWhere?", "dmoerm: error: EOFError\nWhere?", True),
        ("dmoerm: error: TypeError: 'int' object is not iterable\n", "dmoerm: error: TypeError: 'int' object is not iterable\n", True),
    ],
)  # fmt: skip
def test_a_foreign_exception_is_told_from_an_error_of_ours(said, message, foreign):
    assert error_of(said) == (message, foreign)


def test_a_way_out_is_more_than_a_complaint():
    assert WAY_OUT.search("got 3, need 4: choose another")
    assert not WAY_OUT.search("stack expects a non-empty TensorList")


ROW = {"prompt": "One?", "responses": ["Yes", "No"], "ranks": [1, 2], "task": "maths"}


@pytest.mark.parametrize(
    "change",
    [
        {"ranks": [1, 1]}, {"ranks": [1, True]}, {"ranks": [1.0, 2]}, {"ranks": [1]}, {"responses": ["Yes", " "]}, {"task": "music"},
        {"prompt": []}, {"prompt": "\ud800"}, {"messages": "One?"}, {"capability_ranks": {"music": [1, 2]}}, {"responses": None},
    ],
)  # fmt: skip
def test_a_row_that_is_none_has_no_meaning(change):
    assert row_meant(ROW)["ranks"] == [1, 2] and row_meant(ROW | {"prompt": None, "messages": "One?"})
    assert row_meant(ROW | change) is None


def test_prompts_and_tables_that_are_none_have_no_meaning():
    assert turns_meant([{"role": "assistant", "content": "Hi"}]) is None and turns_meant(3) is None
    assert table_meant({"tasks": {"a": ["b"]}, "overall": ["c"]})
    assert (
        table_meant({"tasks": {"a": []}, "overall": ["c"]}) is None
        and table_meant({"tasks": {3: ["b"]}, "overall": ["c"]}) is None
    )
