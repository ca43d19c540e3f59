"""`dmoerm label` as a user runs it, against a real server on loopback that is slow, faulty, killed, and never asked twice."""

import json
import os
import random
import runpy
import signal
import sqlite3
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest
import yaml
from models import make_policy, make_tokenizer
from scripted import row
from trl import TrlParser

from dmoerm_trl.cli import main
from dmoerm_trl.data.rows import load_rows, write_rows
from dmoerm_trl.labelling.answer_store import AnswerStore
from dmoerm_trl.labelling.comparisons import Plan, both_orders
from dmoerm_trl.labelling.judges import judge_from_config
from dmoerm_trl.labelling.template import Template
from dmoerm_trl.scripts.label import LabelArguments
from dmoerm_trl.tasks import TaskTable

ROOT = Path(__file__).parents[2]
PAPER = TaskTable.paper()
ROWS = [
    row(*("x" * (1 + (3 * number + place) % 11) for place in range(3)), prompt=f"Number {number}?", task=task)
    for number, task in enumerate(["chitchat", "text_creation", "others"] * 2)
]
QUESTIONS = 6 * 5 * 6  # rows, points, both orders of three pairs


@pytest.fixture
def recipe(tmp_path):
    """Writes rows and a recipe that asks the server of an address, with other settings replaced; returns its path."""

    def write(url: str, *, rows=ROWS, judge=(), **settings) -> str:
        write_rows(rows, tmp_path / "rows.jsonl")
        asked = {"kind": "server", "base_url": url, "model": "judge", "api_key_env": None, "first_wait": 0.01}
        content = {
            "rows": str(tmp_path / "rows.jsonl"),
            "output_dir": str(tmp_path / "out"),
            "judge": asked | dict(judge),
        }
        (tmp_path / "label.yaml").write_text(yaml.safe_dump(content | settings))
        return str(tmp_path / "label.yaml")

    return write


def labelled(tmp_path: Path) -> list:
    return load_rows(tmp_path / "out" / "labelled.jsonl", tasks=PAPER)[0]


def report(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out" / "report.json").read_text())


def stored(tmp_path: Path) -> int:
    with closing(sqlite3.connect(tmp_path / "out" / "answers.sqlite")) as connection:
        return connection.execute("SELECT count(*) FROM answers").fetchone()[0]


# The whole.


@pytest.mark.parametrize("settings, most", [({}, QUESTIONS), ({"order": "sort"}, QUESTIONS)])
def test_rows_are_labelled_by_a_server(serve, recipe, tmp_path, capsys, settings, most):
    server = serve("longer")
    config = recipe(server.url, **settings)
    assert main(["label", "--config", config, "--dry_run", "true"]) == 0
    assert f"{most} questions, {most} of them still to be asked" in capsys.readouterr().out
    assert not server.asked and not (tmp_path / "out").exists()
    assert main(["label", "--config", config]) == 0
    assert {*server.asked.values()} == {1}
    assert server.asked.total() == stored(tmp_path) <= most
    assert settings or server.asked.total() == most
    printed = capsys.readouterr().out
    assert "| all |" in printed and "labelled.jsonl" in printed
    for before, after in zip(ROWS, labelled(tmp_path), strict=True):
        points = PAPER.tasks.get(before.task, PAPER.overall)
        assert [*after.capability_pairs] == [*points]
        for point in points:
            for better, worse in after.pairs_of(point):
                assert len(before.responses[better]) > len(before.responses[worse])
            assert settings or len(after.pairs_of(point)) == 3  # of three different lengths
    main(["label", "--config", config])  # nothing is left to ask
    assert server.asked.total() == stored(tmp_path)


def test_a_budget_stops_says_how_to_go_on_and_leaves_the_rows_that_are_complete(serve, recipe, tmp_path):
    server = serve("longer")
    config = recipe(server.url, max_calls=70)
    for calls, more in ((70, []), (70, []), (130, ["--max_calls", "130"])):
        with pytest.raises(SystemExit, match=f"max_calls above {calls}: raise it to go on"):
            main(["label", "--config", config, *more])
        assert server.answered.total() == calls
        assert not (tmp_path / "out" / "labelled.jsonl").exists()
    partial = load_rows(tmp_path / "out" / "labelled.partial.jsonl", tasks=PAPER)[0]
    assert len(partial) == report(tmp_path)["rows"] == 6 - report(tmp_path)["incomplete"] == 130 // 30
    assert main(["label", "--config", config, "--max_calls", "10000"]) == 0
    assert len(labelled(tmp_path)) == 6 and {*server.asked.values()} == {1}
    assert not (tmp_path / "out" / "labelled.partial.jsonl").exists()


def test_cost_is_told_before_and_kept_to(serve, recipe, tmp_path, capsys):
    server = serve("longer")
    prices = {"price_per_million_prompt_tokens": 1000, "price_per_million_completion_tokens": 2000}
    config = recipe(server.url, **prices)
    main(["label", "--config", config, "--dry_run", "true"])
    assert " to pay" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="max_cost above 6"):
        main(["label", "--config", config, "--max_cost", "6"])
    spent = report(tmp_path)["spent"]
    assert spent["cost"] == pytest.approx((1000 * spent["prompt_tokens"] + 2000 * spent["completion_tokens"]) / 1e6)
    assert 0 < spent["cost"] <= 6 and spent["calls"] == server.answered.total() < QUESTIONS


def test_a_judge_that_always_says_one_is_stopped_and_can_be_told_to_go_on(serve, recipe, tmp_path):
    server = serve("first")
    config = recipe(server.url)
    with pytest.raises(
        SystemExit, match="names the first response, whatever it is, in [0-9]+ of [0-9]+ answers .100%"
    ):
        main(["label", "--config", config])
    assert server.asked.total() < 120
    assert main(["label", "--config", config, "--stop_early", "false"]) == 0
    assert {*server.asked.values()} == {1} and server.asked.total() == QUESTIONS
    assert report(tmp_path)["warnings"][0].startswith("All points: the judge names the first response")
    assert labelled(tmp_path) == ROWS


def test_asking_again_goes_on_where_it_was_until_all_is_asked_again(serve, recipe, tmp_path):
    server = serve("nonsense")
    command = ["label", "--config", recipe(server.url, stop_early=False)]
    main(command)
    command += ["--ask_again_unreadable", "true", "--max_calls"]
    with pytest.raises(SystemExit, match="raise it to go on"):
        main([*command, str(QUESTIONS + 50)])
    assert main([*command, "10000"]) == 0
    assert {*server.asked.values()} == {2} and stored(tmp_path) == 2 * QUESTIONS
    assert main([*command, "10000"]) == 0
    assert {*server.asked.values()} == {3}


def test_asking_again_of_refused_questions_alone_comes_to_its_end(serve, recipe, tmp_path):
    """What earlier runs stored says that the server answers others."""
    server = serve("longer", faults=["ok", "400"])
    command = [
        "label",
        "--config",
        recipe(server.url, judge={"concurrency": 1}, answers=str(tmp_path / "new" / "a.sqlite")),
    ]
    main(command)
    assert server.asked.total() == report(tmp_path)["spent"]["calls"] == QUESTIONS
    server.faults.append("400")
    main([*command, "--ask_again_unreadable", "true"])
    assert server.asked.total() == QUESTIONS + 1
    main([*command, "--ask_again_unreadable", "true"])
    assert server.asked.total() == QUESTIONS + 2 and max(server.answered.values()) == 1


# What goes wrong.


def test_faults_of_the_server_are_weathered(serve, recipe, tmp_path):
    server = serve("longer", fault_share=0.2)
    main(["label", "--config", recipe(server.url)])
    assert stored(tmp_path) == QUESTIONS == len(server.asked) and len(labelled(tmp_path)) == 6
    assert server.asked.total() > QUESTIONS


def test_a_server_that_is_gone_stops_and_the_next_run_goes_on(serve_process, recipe, start, tmp_path):
    process, url = serve_process(latency=0.02)
    config = recipe(url, judge={"retries": 1, "concurrency": 8})
    run = start(main, ["label", "--config", config])
    while not (tmp_path / "out").exists() or _count(tmp_path) < 60:
        time.sleep(0.02)
    process.kill()
    run.join(60)
    assert run.exitcode == 1
    assert 60 <= stored(tmp_path) < QUESTIONS
    assert "go on later" in report(tmp_path)["stopped"]
    before = stored(tmp_path)
    again, _ = serve_process(port=int(url.split(":")[2].split("/")[0]))
    assert main(["label", "--config", config]) == 0
    assert stored(tmp_path) == QUESTIONS and len(labelled(tmp_path)) == 6 and before < QUESTIONS


@pytest.mark.parametrize(
    "settings, says", [({"key": "secret"}, "api_key_env|key that it takes"), ({"model": "other"}, "model")]
)
def test_a_server_that_refuses_is_told_of_at_once(serve, recipe, tmp_path, settings, says, monkeypatch):
    monkeypatch.setenv("LABEL_TEST_KEY", "wrong-key-1234")
    server = serve("longer", **settings)
    with pytest.raises(SystemExit, match=says) as error:
        main(["label", "--config", recipe(server.url, judge={"api_key_env": "LABEL_TEST_KEY"})])
    assert server.asked.total() <= 16 and "wrong-key" not in str(error.value)
    assert not any("wrong-key" in path.read_text(errors="ignore") for path in (tmp_path / "out").iterdir())


def _count(tmp_path: Path) -> int:
    """The answers that are stored while the labeller has the file: it says so by the length of SQLite's log."""
    log = tmp_path / "out" / "answers.sqlite-wal"
    return log.stat().st_size // 4096 // 4 if log.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_that_was_stored_is_asked_again_after_kills(serve, recipe, start, tmp_path, seed):
    """Killed at moments drawn at random, with 8 questions under way: those alone may be asked twice."""
    rng = random.Random(seed)
    server = serve("longer", latency=0.01)
    config = recipe(server.url, judge={"concurrency": 8})
    asked_at, kills = {}, 0
    judge = judge_from_config(yaml.safe_load(Path(config).read_text())["judge"])
    texts = questions(judge.identity)
    while True:
        run = start(main, ["label", "--config", config])
        before = server.answered.total()
        stop_at = before + rng.randrange(1, 50)
        while run.is_alive() and server.answered.total() < stop_at:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        run.kill()
        run.join()
        time.sleep(0.05)  # the server answers what is under way
        if run.exitcode == 0:
            break
        kills += 1
        with AnswerStore(tmp_path / "out" / "answers.sqlite", judge.identity) as store:
            known = {text for key, text in texts.items() if store.get(key) is not None}
        assert known <= {*server.answered}
        assert len(known) >= len({*server.answered}) - 8 * kills
        for text in known:
            assert asked_at.setdefault(text, server.asked[text]) == server.asked[text], (
                "asked again though it was stored"
            )
    assert kills >= 3
    assert {*server.asked} == {*texts.values()} and len(texts) == QUESTIONS
    assert server.asked.total() <= QUESTIONS + 8 * kills
    assert stored(tmp_path) == QUESTIONS and len(labelled(tmp_path)) == 6


def questions(identity: dict) -> dict[bytes, str]:
    """Key of a question in the store -> what the server is asked."""
    plan, template = Plan(PAPER), Template("en")
    with AnswerStore(":memory:", identity) as store:
        return {
            store.key(question): template.messages(question)[-1]["content"]
            for row in ROWS
            for point in plan.points_of(row)
            for pair in [(0, 1), (0, 2), (1, 2)]
            for question in both_orders(row, pair, point)
        }


def test_ctrl_c_waits_for_what_is_under_way_and_keeps_it(serve, recipe, start, tmp_path):
    server = serve("longer", latency=0.05)
    config = recipe(server.url, judge={"concurrency": 8})
    run = start(main, ["label", "--config", config])
    while server.answered.total() < 40:
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGINT)
    run.join(30)
    assert run.exitcode == 1
    assert stored(tmp_path) == server.asked.total() == server.answered.total() < QUESTIONS
    assert report(tmp_path)["stopped"] == "interrupted"


@pytest.mark.parametrize("gap", [0.0, 0.05])
@pytest.mark.parametrize("judge", ["server", "function"])
def test_a_second_ctrl_c_ends_at_once_whatever_is_under_way(serve, recipe, start, tmp_path, monkeypatch, judge, gap):
    server = serve("longer", latency=30)
    settings = {}
    if judge == "function":
        text = "import pathlib, time\ndef slow(**_):\n    pathlib.Path(__file__).with_name('asked').touch()\n    time.sleep(30)"
        (tmp_path / "slow_function.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        settings = {"kind": "function", "function": "slow_function:slow"}
    config = recipe(server.url)
    if settings:
        Path(config).write_text(yaml.safe_dump(yaml.safe_load(Path(config).read_text()) | {"judge": settings}))
    run = start(main, ["label", "--config", config])
    while not (server.asked or (tmp_path / "asked").exists()):
        time.sleep(0.01)
    for wait in (gap, 0):
        os.kill(run.pid, signal.SIGINT)
        time.sleep(wait)
    if not gap:  # the two may have come as one
        time.sleep(0.5)
        with suppress(ProcessLookupError):
            os.kill(run.pid, signal.SIGINT)
    run.join(5)
    assert run.exitcode == -signal.SIGINT


def test_what_the_judge_said_is_shown_and_the_same_command_goes_on_when_the_server_is_mended(serve, recipe, tmp_path):
    server = serve("Sure!\x1b[2J I take <b>both</b>.")
    command = ["label", "--config", recipe(server.url, judge={"concurrency": 4})]
    for asked_before in (0, 50):
        with pytest.raises(SystemExit, match=r"stopped: the judge has an answer that cannot be read") as error:
            main(command)
        said = str(error.value)
        assert "It said 'Sure!" in said and "I take ‹b›both‹/b›." in said and " times)" in said
        assert "wanted: 1 or 2 alone, or on the last line after `Answer:`, within max_tokens=16" in said
        assert "the same command asks again what could not be read" in said
        assert said.replace("\n", "").isprintable()
        assert server.asked.total() >= asked_before + 50
    assert server.asked.total() < 180
    server.answer = "longer"
    assert main(command) == 0
    assert len(labelled(tmp_path)) == 6 and {*server.asked.values()} <= {1, 2, 3}
    assert report(tmp_path)["all"]["unreadable"] == 0
    asked = server.asked.total()
    assert main(command) == 0 and server.asked.total() == asked


def test_answers_that_are_cut_off_are_told_so(serve, recipe):
    server = serve("Let me think", faults=["cut"] * 200)
    with pytest.raises(SystemExit, match=r"within max_tokens=16; [0-9]+ answers were cut off there"):
        main(["label", "--config", recipe(server.url)])


def test_what_a_server_refused_before_it_was_mended_is_asked_again(serve, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("dmoerm_trl.labelling.server_judge._MOST_REFUSED", 20)
    server = serve("longer", faults=["ok", *["400"] * 40])
    command = ["label", "--config", recipe(server.url, judge={"concurrency": 1}, stop_early=True)]
    with pytest.raises(SystemExit, match="stopped: .*status 400"):
        main(command)
    server.faults.clear()
    assert main(command) == 0
    assert report(tmp_path)["all"]["unreadable"] == 0


def test_requests_that_failed_are_counted(serve, recipe, tmp_path, capsys):
    server = serve("longer", faults=["500", "broken", "broken"])
    main(["label", "--config", recipe(server.url)])
    assert report(tmp_path)["failed_requests"] == {"broken reply": 2, "status 500": 1}
    assert "failed and were made again: broken reply 2, status 500 1." in capsys.readouterr().out


def test_equal_scores_are_ties(recipe, tmp_path, capsys):
    config = recipe("http://localhost/v1", stop_early=False)
    settings = {"kind": "function", "function": "dmoerm_trl.labelling.heuristics:weak"}
    rows = [row("Same words.", "Same words!", prompt=f"{number}?", task="chitchat") for number in range(3)]
    write_rows(rows, tmp_path / "rows.jsonl")
    content = yaml.safe_load(Path(config).read_text()) | {"judge": settings, "points": ["content richness"]}
    Path(config).write_text(yaml.safe_dump(content))
    assert main(["label", "--config", config]) == 0
    assert (report(tmp_path)["all"]["ties"], report(tmp_path)["all"]["unreadable"]) == (3, 0)
    assert "| ties |" in capsys.readouterr().out


@pytest.mark.parametrize("shared", ["output_dir", "answers"])
def test_a_second_run_of_a_folder_says_who_has_it(serve, recipe, start, tmp_path, shared):
    server = serve("longer", latency=0.3)
    config = recipe(server.url, answers=str(tmp_path / "a.sqlite"))
    run = start(main, ["label", "--config", config])
    while not server.asked:
        time.sleep(0.01)
    other = {"output_dir": "answers", "answers": "output_dir"}[shared]
    with pytest.raises(ValueError, match=rf"process {run.pid} on .*wait for"):
        main(["label", "--config", config, f"--{other}", str(tmp_path / "other")])


def test_what_it_writes_is_for_its_owner_alone(serve, recipe, tmp_path):
    main(["label", "--config", recipe(serve("longer").url)])
    private = {path.name for path in (tmp_path / "out").iterdir() if path.stat().st_mode & 0o077 == 0}
    assert private == {"answers.sqlite", "settings.json", "report.md", "report.json"}


def test_no_secret_is_on_disk_or_told(serve, recipe, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("LABEL_TEST_KEY", "sk-0123456789abcdef")
    server = serve("the key is sk-0123456789abcdef and the other S3cretS3cret", key="sk-0123456789abcdef")
    judge = {"api_key_env": "LABEL_TEST_KEY", "extra_body": {"user": "S3cretS3cret"}, "concurrency": 1}
    with pytest.raises(SystemExit) as error:
        main(["label", "--config", recipe(server.url, judge=judge)])
    assert server.requests[0]["user"] == "S3cretS3cret"
    assert "[key]" in str(error.value)
    told = str(error.value) + "".join(capfd.readouterr())
    told += "".join(path.read_text(errors="ignore") for path in (tmp_path / "out").iterdir())
    assert "sk-01234" not in told and "S3cretS3" not in told


# A folder is that of one labelling from its first answer on.


@pytest.mark.parametrize("failed", ["dry run", "count", "refused", "gone"])
def test_a_failed_start_claims_nothing(serve, recipe, tmp_path, failed):
    server = serve("longer", **({"model": "other"} if failed == "refused" else {}))
    url = "http://127.0.0.1:9/v1" if failed == "gone" else server.url
    more = {"dry run": ["--dry_run", "true"], "count": ["--max_calls", "0"]}.get(failed, [])
    command = ["label", "--config", recipe(url, judge={"retries": 0, "max_tokens": 5}), *more]
    if failed == "dry run":
        main(command)
    else:
        with pytest.raises(SystemExit):
            main(command)
    server.model = "judge"
    assert main(["label", "--config", recipe(server.url, max_pairs=1, judge={"max_tokens": 9}, rows=ROWS[:3])]) == 0
    with pytest.raises(ValueError, match="other settings"):
        main(["label", "--config", recipe(server.url, max_pairs=1, judge={"max_tokens": 5}, rows=ROWS[:3])])


def test_the_first_answer_claims_the_folder(serve, recipe, start, tmp_path):
    server = serve("longer", latency=0.05)
    run = start(main, ["label", "--config", recipe(server.url, judge={"concurrency": 1})])
    while not (tmp_path / "out" / "settings.json").exists():
        assert server.answered.total() < 20
        time.sleep(0.01)
    run.kill()
    run.join()
    with pytest.raises(ValueError, match=r"other settings of \['max_pairs'\]"):
        main(["label", "--config", recipe(server.url, max_pairs=1, judge={"concurrency": 1})])


def test_settings_that_cannot_be_read_are_an_error(serve, recipe, tmp_path):
    config = recipe(serve("longer").url)
    (tmp_path / "out").mkdir()
    for content in ("{", "[]"):
        (tmp_path / "out" / "settings.json").write_text(content)
        with pytest.raises(ValueError, match="settings.json: got no settings of a labelling .*remove the file"):
            main(["label", "--config", config])


def test_an_output_that_cannot_be_written_is_an_error_before_anything_is_asked(serve, recipe, tmp_path):
    server = serve("longer")
    (tmp_path / "out" / "labelled.jsonl").mkdir(parents=True)
    with pytest.raises(ValueError, match="labelled.jsonl: got a file that cannot be written"):
        main(["label", "--config", recipe(server.url)])
    assert not server.asked


def test_rows_are_not_overwritten(serve, recipe, tmp_path):
    server = serve("longer")
    (tmp_path / "out").mkdir()
    write_rows(ROWS, tmp_path / "out" / "labelled.jsonl")
    with pytest.raises(ValueError, match="labelled.jsonl: got an output file that is an input too"):
        main(["label", "--config", recipe(server.url), "--rows", str(tmp_path / "out" / "labelled.jsonl")])
    assert not server.asked and len(labelled(tmp_path)) == 6


def test_a_disk_that_does_not_take_the_labels_says_so(serve, recipe, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    server = serve("longer")
    config = recipe(server.url)
    with monkeypatch.context() as patch:
        patch.setattr("dmoerm_trl.labelling.labeller.write_rows", full)
        with pytest.raises(
            ValueError, match="labels that cannot be written .No space left.*free some space.*All answers are kept"
        ):
            main(["label", "--config", config])
    assert main(["label", "--config", config, "--max_calls", str(QUESTIONS)]) == 0
    assert server.asked.total() == QUESTIONS


# Mistakes.


@pytest.mark.parametrize(
    "rows, settings, says",
    [
        ([row("a", "b", task=None)], {}, "a row without a task"),
        (ROWS, {"points": ["logik"]}, r"`points`: got \['logik'\]"),
        (ROWS, {"tasks": "paper-zh"}, "line 1: field `task`: got 'chitchat'"),
        (
            [row("a", "b", task="chitchat", capability_ranks={"expressiveness": [1, 2]})],
            {},
            "line 1.*'expressiveness'",
        ),
        (ROWS, {"order": "best"}, "`order`: got 'best'"),
        (ROWS, {"max_cost": 1.0}, "`max_cost`: got 1.0 without prices"),
        (ROWS, {"price_per_million_prompt_tokens": 1.0}, "need both"),
        (ROWS, {"pairs": 3}, "--pairs"),
        (ROWS, {"judge": {"kind": "oracle"}}, "got kind='oracle'"),
        (ROWS, {"judge": None}, "`judge`: got None"),
        (ROWS, {"judge": {"kind": "function", "function": "nowhere:f"}}, "nowhere:f"),
    ],
)
def test_mistakes_are_found_before_anything_is_asked(serve, recipe, tmp_path, rows, settings, says):
    server = serve("longer")
    with pytest.raises(ValueError, match=says):
        config = recipe(server.url, rows=rows)
        Path(config).write_text(yaml.safe_dump(yaml.safe_load(Path(config).read_text()) | settings))
        main(["label", "--config", config])
    assert not server.asked


def test_the_folder_of_another_labelling_is_an_error_but_its_answers_can_be_used(serve, recipe, tmp_path):
    server = serve("longer")
    main(["label", "--config", recipe(server.url, max_pairs=1)])
    few = server.asked.total()
    with pytest.raises(ValueError, match=r"other settings of \['max_pairs'\].*choose another `output_dir`"):
        main(["label", "--config", recipe(server.url, max_pairs=2)])
    with pytest.raises(ValueError, match=r"other settings of \['answers'\]"):  # all would be asked anew
        main(["label", "--config", recipe(server.url, max_pairs=1, answers=str(tmp_path / "other.sqlite"))])
    with pytest.raises(ValueError, match=r"other settings of \['judge.temperature'\]"):
        main(["label", "--config", recipe(server.url, max_pairs=1, judge={"temperature": 0.5})])
    answers = str(tmp_path / "out" / "answers.sqlite")
    assert server.asked.total() == few
    main(["label", "--config", recipe(server.url, max_pairs=2, output_dir=str(tmp_path / "more"), answers=answers)])
    assert server.asked.total() == 2 * few and {*server.asked.values()} == {1}
    with pytest.raises(ValueError, match=r"other settings of \['sha256 of rows'\]"):
        main(["label", "--config", recipe(server.url, max_pairs=1, rows=ROWS[1:])])


# The recipes.


@pytest.mark.parametrize("name", ["server", "model", "function"])
def test_a_recipe_runs(name, serve, recipe, tmp_path):
    path = ROOT / "recipes" / "label" / f"{name}.yaml"
    (arguments,) = TrlParser((LabelArguments,)).parse_args_and_config(
        ["--config", str(path)], fail_with_unknown_args=True
    )
    assert arguments.rows.startswith("runs/") and arguments.output_dir.startswith("runs/")
    own = yaml.safe_load(path.read_text())
    if name == "server":
        own["judge"] |= {"base_url": serve("longer").url, "model": "judge"}
    if name == "model":
        tokenizer = make_tokenizer()
        make_policy(tokenizer).save_pretrained(tmp_path / "policy")
        tokenizer.save_pretrained(tmp_path / "policy")
        own["judge"] |= {"model": str(tmp_path / "policy"), "dtype": "float32"}
    own |= {"stop_early": False, "rows": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / "out")}
    write_rows(ROWS[:3], tmp_path / "rows.jsonl")
    (tmp_path / "label.yaml").write_text(yaml.safe_dump(own))
    assert main(["label", "--config", str(tmp_path / "label.yaml")]) == 0
    assert len(labelled(tmp_path)) == 3
    assert report(tmp_path)["all"]["pairs"] > 0


def test_there_is_a_recipe_for_every_example():
    assert {path.stem for path in (ROOT / "recipes" / "label").glob("*.yaml")} == {"server", "model", "function"}


def test_the_benchmark_measures(tmp_path, monkeypatch):
    options = {"json": tmp_path / "b.json", "questions": 40, "latency": 0.05, "concurrency": 4, "pairs": 100}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["labelling.py", *words])
    runpy.run_path(str(ROOT / "tests" / "benchmarks" / "labelling.py"), run_name="__main__")
    measured = json.loads((tmp_path / "b.json").read_text())
    assert 0 < measured["answers_per_second_share"] <= 1
    assert measured["rss_late"] > 10 and measured["rss_early"] > 10
