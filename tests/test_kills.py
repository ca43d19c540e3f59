"""The short form of the benchmark of kills; test_pipeline.py, test_zero.py and test_best_of_n.py kill workers and launched processes."""

import json

import kills
import pytest


@pytest.mark.slow
@pytest.mark.requires_ppo
def test_runs_that_are_killed_end_with_the_files_of_unbroken_ones(start, tmp_path):
    names = ["train", "labelling", "ppo"]
    process = start(
        kills.main, ["--json", str(tmp_path / "kills.json"), "--kills", "6", "--seed", "1", "--only", *names]
    )
    process.join(280)
    assert process.exitcode == 0
    results = json.loads((tmp_path / "kills.json").read_text())
    assert results["kills"] == 6
    for name in names:
        assert not results[name]["faults"] and not results[name]["differing"], (name, results[name])
        assert results[name]["identical"] == results[name]["runs"] >= 1 and results[name]["ways"], (
            name,
            results[name],
        )


def test_a_file_that_differs_shows(tmp_path):
    for name, weight, seconds in (("one", 1.0, 3), ("other", 1.0, 4), ("wrong", 2.0, 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text(
            json.dumps({"weight": weight, "eval_runtime": seconds, "loss": float("nan")})
        )
    one, other, wrong = (kills.contents(tmp_path / name) for name in ("one", "other", "wrong"))
    assert one == other != wrong
