"""Best of n from prompts to curves: what streams through the disk equals what is computed in memory, killed or not."""

import errno
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import types
from contextlib import contextmanager
from pathlib import Path

import models
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import TrlParser

from dmoerm_trl import files
from dmoerm_trl.data.formatting import Formatter
from dmoerm_trl.evaluation import response_store
from dmoerm_trl.evaluation.best_of_n import run_best_of_n
from dmoerm_trl.evaluation.best_of_n_arguments import BestOfNArguments
from dmoerm_trl.evaluation.best_of_n_curves import best_of_n_curves, default_grid
from dmoerm_trl.evaluation.best_of_n_estimate import best_of_n
from dmoerm_trl.evaluation.response_store import Shard
from dmoerm_trl.files import locked_folder, partial_path
from dmoerm_trl.generation.prompts import read_prompts
from dmoerm_trl.generation.samplers import sampler, vllm_sampler
from dmoerm_trl.modeling.modeling_dmoerm import DMoERMForSequenceClassification
from dmoerm_trl.scoring.aggregation import uncertainty_weighted_reward, worst_case_reward
from dmoerm_trl.scoring.reward_models import ScorerSpec

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "bon_eval.py"
PROMPTS = list(models.PROMPTS.values())


def gold(*, prompt: list[dict], response: str, task: str, **_) -> float:
    """Likes the letters of the task's name."""
    return float(sum(letter in task for letter in response)) - len(response) / 10


def broken_gold(**_) -> float:
    return float("nan")


def lists_as_gold(**_) -> list[float]:
    return [1.0, 2.0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A policy, a DMoERM, two single models, an ordinary reward model, and a file of prompts."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = models.make_tokenizer()
    made = {"policy": models.make_policy(tokenizer), "dmoerm": models.make_dmoerm(tokenizer)}
    made |= {f"single{seed}": models.make_dmoerm(tokenizer, {"chitchat": []}, seed) for seed in (0, 1)}
    made |= {f"plain{seed}": models.make_value_model(tokenizer, seed) for seed in (0, 1)}
    for name, model in made.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    records = [{"prompt": prompt, "task": task} for task, prompt in models.PROMPTS.items()]
    (root / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return root


@pytest.fixture(scope="module")
def settings(folder) -> dict:
    """A recipe: 3 prompts, 64 responses of at most two tokens, many of them alike."""
    return {
        "policy": str(folder / "policy"),
        "prompts": str(folder / "prompts.jsonl"),
        "n": 64,
        "max_new_tokens": 2,
        "top_p": 0.7,
        "shard_size": 20,
        "batch_size": 16,
        "show": [1, 64],
        "show_prompts": 2,
        "reward_models": {
            "DMoERM": str(folder / "dmoerm"),
            "single": str(folder / "single0"),
            "UWO": {"UWO": [str(folder / "single0"), str(folder / "single1")]},
            "length only": "length",
        },
        "gold": "test_best_of_n:gold",
    }


def bon_eval(settings: dict, output_dir: Path) -> dict:
    """Runs the example with a recipe in this process; the JSON that it writes."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    recipe = output_dir.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump({**settings, "output_dir": str(output_dir)}, sort_keys=False))
    runpy.run_path(str(EXAMPLE))["main"](["--config", str(recipe)])
    return json.loads((output_dir / "best_of_n.json").read_text())


@pytest.fixture(scope="module")
def done(settings, tmp_path_factory) -> Path:
    """The folder of an unbroken run."""
    output_dir = tmp_path_factory.mktemp("done") / "run"
    bon_eval(settings, output_dir)
    return output_dir


def responses(output_dir: Path, prompt: int, column: str = "response") -> list:
    files = sorted((output_dir / "responses").glob(f"{prompt:05d}-*.parquet"))
    return [value for file in files for value in pq.read_table(file)[column].to_pylist()]


def shards(output_dir: Path) -> dict[str, dict]:
    """What stands in every shard."""
    return {
        str(p.relative_to(output_dir)): pq.read_table(p).to_pydict() for p in sorted(output_dir.rglob("*.parquet"))
    }


# The whole


def test_the_stream_gives_what_is_computed_in_memory(folder, done):
    """Each response scored on its own, repeated or not, by the one formatter; one call of the estimator."""
    result = json.loads((done / "best_of_n.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder / "dmoerm")
    formatter = Formatter(tokenizer, 2048)
    loaded = {
        name: DMoERMForSequenceClassification.from_pretrained(folder / name)
        for name in ("dmoerm", "single0", "single1")
    }
    texts = [responses(done, prompt) for prompt in range(3)]
    assert [len(of_prompt) for of_prompt in texts] == [64, 64, 64]
    scores = {
        name: torch.tensor(
            [
                [float(models.score_one(model, formatter.encode(prompt, text)).logits) for text in of_prompt]
                for prompt, of_prompt in zip(PROMPTS, texts, strict=True)
            ]
        )
        for name, model in loaded.items()
    }
    golds = torch.tensor(
        [
            [gold(prompt=[], response=text, task=task) for text in of_prompt]
            for task, of_prompt in zip(models.PROMPTS, texts, strict=True)
        ]
    )
    lengths = torch.tensor([[float(len(text)) for text in of_prompt] for of_prompt in texts])
    members = torch.stack([scores["single0"], scores["single1"]])
    proxies = {"DMoERM": scores["dmoerm"], "single": scores["single0"], "length only": lengths}
    proxies["UWO"] = uncertainty_weighted_reward(members)
    grid = result["grid"]
    assert grid == default_grid(64) and grid[0] == 1 and grid[-1] == 64
    for name, proxy in proxies.items():
        expected_gold, expected_proxy = best_of_n(proxy, torch.stack([golds, proxy]), grid).mean(1)
        standardised = (expected_proxy - proxy.mean()) / proxy.std(correction=0)
        found = [[result[table][name][str(n)]["mean"] for n in grid] for table in ("curves", "proxy")]
        torch.testing.assert_close(torch.tensor(found[0]), expected_gold.float(), atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.tensor(found[1]), standardised.float(), atol=1e-3, rtol=0)
    distinct = sum(len(set(of_prompt)) for of_prompt in texts) / 192
    assert 0 < distinct < 0.9 and result["distinct"] == pytest.approx(distinct)
    assert set(result["fits"]) == set(proxies) and result["fits"]["single"]["a"] is not None


def test_a_text_that_is_repeated_is_scored_once(done):
    for prompt in range(3):
        files = sorted((done / "scores").glob(f"*dmoerm/{prompt:05d}-*.parquet"))
        assert sum(len(pq.read_table(file)) for file in files) == len(set(responses(done, prompt)))


def test_shards_and_prompts_draw_texts_of_their_own(done):
    parts = [tuple(responses(done, prompt)[start : start + 20]) for prompt in range(3) for start in (0, 20, 40)]
    assert len(set(parts)) == 9


def test_the_files_that_it_writes(done):
    assert (done / "best_of_n.png").stat().st_size > 20_000
    table = (done / "best_of_n.md").read_text()
    assert "| DMoERM" in table and "Distinct texts: " in table and "a d - b d²" in table
    winners = (done / "winners.md").read_text()
    assert winners.count("## ") == 2 and winners.count("| UWO | 64 |") == 2 and PROMPTS[2] not in winners
    lengths = [len(text) for text in responses(done, 0)]
    assert f"| length only | 64 | {max(lengths):+.3f} |" in winners
    assert f"| length only | 1 | {lengths[0]:+.3f} |" in winners
    scored = json.loads((done / "manifest.json").read_text())
    assert len(scored) == 6  # responses, four scorers and gold: the member that two reward models share is scored once


def test_a_finished_run_is_left_as_it_is_and_takes_new_reward_models(settings, done):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*.parquet")}
    more = {**settings["reward_models"], "WCO": {"WCO": settings["reward_models"]["UWO"]["UWO"]}}
    assert set(bon_eval({**settings, "reward_models": more}, done)["curves"]) == set(more)
    assert before == {path: path.stat().st_mtime_ns for path in done.rglob("*.parquet")}


@pytest.mark.parametrize("change", [{"seed": 1}, {"max_new_tokens": 3}, {"n": 65}, {"dtype": "bfloat16"}])
def test_changed_settings_over_an_existing_run_are_refused(settings, done, change):
    with pytest.raises(ValueError, match=f"other settings of .*{next(iter(change))}.*another `output_dir`"):
        bon_eval({**settings, **change}, done)


def test_workers_of_several_processes_are_refused(settings, tmp_path, monkeypatch):
    processes = types.SimpleNamespace(num_processes=2, is_main_process=True)
    monkeypatch.setattr("dmoerm_trl.launched_processes", lambda: processes)
    with pytest.raises(ValueError, match="got workers=2 in each of 2 processes, need 1"):
        bon_eval({**settings, "workers": 2}, tmp_path / "run")


@pytest.mark.parametrize(
    "spec", [3, None, {"UWO": "single"}, {"UWO": []}, {"UWO": [3]}, {"max": ["single"]}, ["single"]]
)
def test_a_reward_model_that_is_none_is_refused(settings, tmp_path, spec):
    with pytest.raises(ValueError, match="reward model 'odd': got .*need a folder"):
        bon_eval({**settings, "reward_models": {"odd": spec}}, tmp_path / "run")


@pytest.mark.parametrize("key", ["num_prompts", "max_length", "n", "workers", "seed"])
def test_a_count_below_one_is_refused(settings, tmp_path, key):
    with pytest.raises(ValueError, match=f"got .*{key}=-1.*need at least 1"):
        bon_eval({**settings, key: -1}, tmp_path / "run")


@pytest.mark.parametrize("change", [{"show": [0]}, {"show_prompts": -1}])
def test_winners_that_cannot_be_shown_are_refused(settings, tmp_path, change):
    with pytest.raises(ValueError, match="got show=.*need values of n from 1"):
        bon_eval({**settings, **change}, tmp_path / "run")


def test_an_unknown_key_is_refused(settings, tmp_path):
    with pytest.raises(ValueError, match="max_tokens"):
        bon_eval({**settings, "max_tokens": 3}, tmp_path / "run")


@pytest.mark.slow
def test_a_killed_run_ends_with_what_an_unbroken_one_has(settings, done, tmp_path):
    output_dir = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**settings, "output_dir": str(output_dir)}))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]),
    }
    for part, workers in (("responses", 2), ("scores", 1)):
        command = [sys.executable, str(EXAMPLE), "--config", str(recipe), "--workers", str(workers)]
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while not list(output_dir.glob(f"{part}/**/*.parquet")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.5)  # the workers see that their parent is gone
        killed = {path: path.stat().st_mtime_ns for path in output_dir.rglob("*.parquet")}
        assert 0 < len(killed) < len(shards(done))
    half = partial_path(next(output_dir / name for name in shards(done) if not (output_dir / name).exists()))
    half.parent.mkdir(parents=True, exist_ok=True)
    half.write_bytes(b"half")
    (output_dir / "responses" / "mine.tmp").write_text("mine")
    result = bon_eval(settings, output_dir)
    assert killed.items() <= {path: path.stat().st_mtime_ns for path in output_dir.rglob("*.parquet")}.items()
    assert not list(output_dir.rglob("*.partial"))
    assert (output_dir / "responses" / "mine.tmp").read_text() == "mine"
    whole = shards(done)
    now = shards(output_dir)
    assert now == {name: whole[name] for name in now} and len(now) >= 24
    assert result["curves"] == {
        name: curve
        for name, curve in json.loads((done / "best_of_n.json").read_text())["curves"].items()
        if name in result["curves"]
    }


def test_a_full_disk_is_named_and_what_was_written_stays(settings, tmp_path):
    output_dir = tmp_path / "run"

    @contextmanager
    def writing_to_a_full_disk(path, **options):
        with files.writing(path, **options) as file:
            if path.name == "00001-00002.parquet":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(response_store, "writing", writing_to_a_full_disk)
        with pytest.raises(OSError, match="00001-00002.parquet.*No space left.*run the same command again"):
            bon_eval(settings, output_dir)
    assert len(list(output_dir.rglob("*.parquet"))) == 6 and len(shards(output_dir)) == 6
    assert bon_eval(settings, output_dir)["prompts"] == 3


# The folder.


def test_a_folder_is_claimed_by_its_first_shard_and_not_by_a_failed_start(settings, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dmoerm_trl.evaluation.best_of_n.write_responses", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bon_eval({**settings, "n": 3}, tmp_path)
    assert (tmp_path / "manifest.json").exists()
    assert bon_eval(settings, tmp_path)["prompts"] == 3
    with pytest.raises(ValueError, match=r"'responses' that were started with other settings of \['n'\]"):
        bon_eval({**settings, "n": 3}, tmp_path)


def test_a_folder_that_another_run_holds_is_refused(settings, tmp_path):
    with locked_folder(tmp_path), pytest.raises(ValueError, match=f"process {os.getpid()} on .* is writing"):
        bon_eval(settings, tmp_path)


@pytest.mark.parametrize("content", ['{"recipe": {}}', "[]", "half of", '{"mine": {"a": 1}}'])
def test_another_manifest_in_the_folder_is_not_overwritten(content, settings, tmp_path):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="manifest.json: got a file that best of n did not write.*`output_dir`"):
        bon_eval(settings, tmp_path)
    assert (tmp_path / "manifest.json").read_text() == content


# Curves


def test_curves_by_hand():
    """Best of 2 of 3 by the proxy: the pairs (1, 2), (1, 3), (2, 3) are won by the second, the third, the third."""
    prompts = [({"rm": torch.tensor([1.0, 2.0, 3.0])}, torch.tensor([3.0, 1.0, 2.0]))]
    result = best_of_n_curves(prompts, [2, 3]).to_dict()
    means = [result["curves"]["rm"][n]["mean"] for n in (1, 2, 3)]
    assert means == pytest.approx([2, 5 / 3, 2]) and result["grid"] == [1, 2, 3]
    deviation = (2 / 3) ** 0.5
    proxies = [result["proxy"]["rm"][n]["mean"] for n in (1, 2, 3)]
    assert proxies == pytest.approx([0, (8 / 3 - 2) / deviation, 1 / deviation])
    assert result["win_rate"]["rm"][3]["mean"] == pytest.approx(0.5)  # beats one, is one, loses to one


def test_equal_scores_are_broken_independently_of_gold():
    scores, golds = torch.zeros(50), torch.arange(50.0)
    for order in (slice(None), torch.arange(49, -1, -1)):
        curve = best_of_n_curves([({"rm": scores}, golds[order])], [1, 10, 50]).curves["rm"]
        torch.testing.assert_close(curve.gold, torch.full((1, 3), 24.5, dtype=torch.float64))
        assert (curve.proxy == 0).all()


def test_the_band_covers_the_spread_of_the_prompts():
    generator = torch.Generator().manual_seed(0)
    prompts = [({"rm": torch.randn(8, generator=generator)}, torch.full((8,), float(gold))) for gold in range(100)]
    (one, *_) = best_of_n_curves(prompts, [1], confidence=0.95).to_dict()["curves"]["rm"].values()
    half = 1.96 * torch.arange(100.0).std().item() / 10
    assert one["mean"] == 49.5
    assert one["low"] == pytest.approx(49.5 - half, abs=0.5) and one["high"] == pytest.approx(49.5 + half, abs=0.5)


@pytest.mark.parametrize(
    ("scores", "golds", "problem"),
    [
        ([1.0, 2.0], [1.0], "prompt 0, reward model 'rm': got gold of shape .*one gold reward for each response"),
        ([1.0, float("nan")], [1.0, 2.0], "prompt 0, reward model 'rm': got scores.*nan"),
        ([1.0, 2.0], [float("inf"), 1.0], "prompt 0, reward model 'rm': .*inf"),
    ],
)
def test_bad_scores_name_the_prompt_and_the_reward_model(scores, golds, problem):
    with pytest.raises(ValueError, match=problem):
        best_of_n_curves([({"rm": torch.tensor(scores)}, torch.tensor(golds))], [1])


def test_the_grid_is_even_in_kl():
    assert default_grid(60_000) == [1, 3, 7, 20, 55, 149, 404, 1098, 2986, 8117, 22069, 60_000]
    assert default_grid(1) == [1] and default_grid(4) == [1, 2, 3, 4]


# Files of responses


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_of_responses_with_its_gold(settings, done, tmp_path, suffix):
    """The responses of the policy, written to a file in mixed order, give the curves of the policy."""
    texts, tasks = [responses(done, prompt) for prompt in range(3)], list(models.PROMPTS)
    records = [
        {
            "prompt": PROMPTS[prompt],
            "response": texts[prompt][index],
            "gold": gold(prompt=[], response=texts[prompt][index], task=tasks[prompt]),
        }
        for index in range(64)
        for prompt in range(3)
    ]
    path = tmp_path / f"responses{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {**settings, "policy": None, "prompts": None, "responses": str(path), "gold": "file"}
    result = bon_eval(settings, tmp_path / "run")
    expected = json.loads((done / "best_of_n.json").read_text())
    assert result["curves"]["DMoERM"] == expected["curves"]["DMoERM"] and result["distinct"] == expected["distinct"]


RECORDS = [{"prompt": prompt, "response": text, "gold": 1.0} for prompt in ("a", "b") for text in ("x", "yy", "zzz")]


@pytest.mark.parametrize(
    ("records", "changes", "problem"),
    [
        (RECORDS, {"n": 4}, r"got 3 responses to prompt 0 \('a'\), need n=4.*lower n to 3"),
        (RECORDS[:-1], {}, r"got 2 responses to prompt 1 \('b'\), need n=3.*lower n to 2"),
        (RECORDS, {"grid": [1, 4]}, r"grid \[1, 4\] for n=3"),
        ([*RECORDS[:-1], {**RECORDS[-1], "gold": None}], {}, "got gold None for 'zzz'"),
        ([*RECORDS[:-1], {**RECORDS[-1], "gold": float("nan")}], {}, "got gold nan for 'zzz'"),
        ([*RECORDS[:-1], {**RECORDS[-1], "response": None}], {}, "got the response None to prompt 1"),
        ([*RECORDS[:-1], {"response": "x"}], {}, "record 6: got the prompt None"),
        ([], {}, "got 0 distinct prompts"),
    ],
)
def test_bad_files_of_responses(tmp_path, records, changes, problem):
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(ValueError, match=problem):
        run_best_of_n(tmp_path / "run", read_prompts(path), path, {"l": "length"}, "file", **{"n": 3, **changes})
    assert not list((tmp_path / "run").glob("**/*.parquet"))


def test_answers_as_turns_and_numbers_as_text(tmp_path):
    """As TRL writes completions, and as CSV has numbers."""
    turns = [
        {"prompt": r["prompt"], "response": [{"role": "assistant", "content": r["response"]}], "gold": "2.5"}
        for r in RECORDS
    ]
    path = tmp_path / "responses.json"
    path.write_text(json.dumps(turns), encoding="utf-16")
    result = run_best_of_n(tmp_path / "run", read_prompts(path), path, {"l": "length"}, "file", n=3)
    assert result.curves.curves["l"].gold.unique().tolist() == [2.5]
    path.write_text(json.dumps([{**turns[0], "response": "\ud83d"}, *turns[1:]]))
    with pytest.raises(
        ValueError, match="responses.json, element 1, record 1: field `response`: got .*surrogate pair"
    ):
        run_best_of_n(tmp_path / "other", read_prompts(path), path, {"l": "length"}, "file", n=3)


def test_a_prompt_without_a_response(folder, tmp_path, capsys):
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("a", "c")]
    with pytest.raises(ValueError, match=r"got 0 responses to prompt 1 \('c'\).*leave the prompt out"):
        run_best_of_n(tmp_path / "run", rows, path, {"l": "length"}, "file", n=3)
    run_best_of_n(tmp_path / "run", rows[:1], path, {"l": "length"}, "file", n=2)
    said = capsys.readouterr().out
    assert "3 responses are not used: their prompt is not among the 1 prompts" in said
    assert "1 responses are not used: they come after the first 2" in said


# Scorers


def test_any_reward_model_is_scored_as_it_scores_itself(folder, tokenizer):
    """An ordinary sequence classification model, in batches, against one text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "plain0").eval()
    row = {"prompt": [{"role": "user", "content": PROMPTS[0]}]}
    texts = ["", "It is four.", "The sea was calm and the ship went home.", "It is four."]
    scores = ScorerSpec(str(folder / "plain0")).load()(row, texts)
    for text, score in zip(texts, scores, strict=True):
        ids = torch.tensor([Formatter(tokenizer, 100).encode(PROMPTS[0], text).input_ids])
        assert float(score) == pytest.approx(model(ids).logits.item(), abs=1e-4)


def test_a_reward_model_without_a_pad_token_is_read_at_its_last_token(folder, tokenizer, tmp_path):
    """Where padding is eos, transformers would read the token before the eos that ends the text."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "plain0").eval()
    model.config.pad_token_id = tokenizer.pad_token = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    row = {"prompt": [{"role": "user", "content": PROMPTS[0]}]}
    texts = ["It is four.", "The sea was calm and the ship went home."]
    scores = ScorerSpec(str(tmp_path)).load()(row, texts)
    tokenizer.pad_token = "<|endoftext|>"
    for text, score in zip(texts, scores, strict=True):
        ids = Formatter(tokenizer, 100).encode(PROMPTS[0], text).input_ids
        assert ids[-1] == tokenizer.eos_token_id
        assert float(score) == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-4)


def test_a_functions_code_is_among_its_settings(tmp_path, monkeypatch):
    """A gold that was corrected is another gold: scores of the one and of the other are not put together."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = []
    for number in (1, 2):
        (tmp_path / "golds.py").write_text(f"def gold(**_):\n    return {number}.0\n")
        before.append(ScorerSpec("golds:gold").settings())
    assert before[0] != before[1] and before[1] == ScorerSpec("golds:gold").settings()


def test_members_without_a_scale_of_their_own_are_standardised(folder, tmp_path):
    path = tmp_path / "responses.jsonl"
    records = [
        {"prompt": "a", "response": text, "gold": float(len(text))} for text in ("x", "yy", "zzz", "It is four.")
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    members = [str(folder / "plain0"), str(folder / "plain1")]
    spec = {"WCO": {"WCO": members}, "first": members[0], "second": members[1]}
    result = run_best_of_n(tmp_path / "run", read_prompts(path), path, spec, "file", n=4, show=[4])
    row = read_prompts(path)[0]
    rewards = torch.stack([ScorerSpec(name).load()(row, [r["response"] for r in records]) for name in members])
    standardised = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, correction=0, keepdim=True)
    expected = worst_case_reward(standardised)
    (winner,) = (winner for winner in result.winners if winner.reward_model == "WCO")
    assert winner.text == records[int(expected.argmax())]["response"]
    assert winner.proxy == pytest.approx(float(expected.max()), abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"gold": "test_best_of_n:broken_gold"}, "test_best_of_n_broken_gold: got the score nan for .* prompt 0"),
        ({"gold": "test_best_of_n:lists_as_gold"}, "need one number"),
        ({"gold": "test_best_of_n:no_such"}, "need an importable module:function"),
        ({"gold": "dmoerm_trl.tasks:slug"}, "It is called with the fields of a row, .*'task'"),
        ({"gold": "file"}, "got gold 'file' without a file of responses"),
        ({"reward_models": {}}, "got no `reward_models`"),
        ({"reward_models": {"x": {"median": ["length"]}}}, "reward model 'x': got .*'mean', 'WCO', 'UWO'"),
        ({"policy_dtype": "int8"}, "got dtype 'int8'"),
        ({"backend": "magic"}, "got backend 'magic'"),
        ({"task": "poetry"}, "got 0 distinct prompts of the task 'poetry'"),
        ({"policy": None}, "need exactly one of them"),
    ],
)
def test_bad_settings(settings, tmp_path, changes, problem):
    with pytest.raises(ValueError, match=problem):
        bon_eval({**settings, **changes}, tmp_path / "run")


@pytest.mark.parametrize("which", ["policy", "reward model"])
def test_a_missing_chat_template_is_named(settings, folder, tokenizer, tmp_path, which):
    tokenizer.chat_template = None
    model = models.make_policy(tokenizer) if which == "policy" else models.make_value_model(tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    name = str(tmp_path / "model")
    changes = {"policy": name} if which == "policy" else {"reward_models": {"rm": name}}
    with pytest.raises(ValueError, match="without a chat template.*save the tokenizer"):
        bon_eval({**settings, **changes}, tmp_path / "run")


# The policy


def test_samples_follow_the_policys_distribution(tokenizer):
    """One token: the texts' frequencies are the probabilities of the tokens that are so written."""
    policy, formatter = models.make_policy(tokenizer).eval(), Formatter(tokenizer, 100)
    prompt = [{"role": "user", "content": PROMPTS[0]}]
    count = 4000
    for temperature, top_p in ((1.0, 1.0), (0.7, 0.6)):
        draw = sampler(policy, formatter, max_new_tokens=1, temperature=temperature, top_p=top_p, batch_size=1500)
        texts = draw(prompt, count, 0)
        encoding = formatter.encode(prompt, "")
        logits = policy(torch.tensor([encoding.input_ids[: encoding.prompt_length]])).logits[0, -1]
        probabilities, order = (logits / temperature).softmax(-1).sort(descending=True)
        kept = probabilities * (probabilities.cumsum(0) - probabilities < top_p)
        expected: dict[str, float] = {}
        for token, p in zip(order.tolist(), (kept / kept.sum()).tolist(), strict=True):
            text = tokenizer.decode([token], skip_special_tokens=True)
            expected[text] = expected.get(text, 0) + p
        assert len(texts) == count and all(expected[text] > 0 for text in texts)
        for text, p in expected.items():
            assert abs(texts.count(text) / count - p) < 4.5 * (p * (1 - p) / count) ** 0.5 + 1e-9


def test_a_seed_gives_the_same_texts_and_leaves_the_global_state_alone(tokenizer):
    draw = sampler(models.make_policy(tokenizer), Formatter(tokenizer, 100), max_new_tokens=5)
    prompt = [{"role": "user", "content": PROMPTS[0]}]
    before = torch.get_rng_state()
    first = draw(prompt, 6, 1)
    assert first == draw(prompt, 6, 1) != draw(prompt, 6, 2)
    assert torch.get_rng_state().equal(before)


def test_vllm_is_asked_for_the_same_and_named_where_it_is_missing(tokenizer, monkeypatch):
    formatter = Formatter(tokenizer, 100)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="pip install vllm"):
        vllm_sampler("policy", formatter, max_new_tokens=5)

    class LLM:
        def __init__(self, model, **engine):
            assert model == "policy" and engine == {"dtype": "bfloat16"}

        def generate(self, prompt, parameters, use_tqdm):
            ids = formatter.encode(PROMPTS[0], "").input_ids[:-1]
            assert prompt == {"prompt_token_ids": ids}
            assert parameters["seed"] == 7 and parameters["max_tokens"] == 5 and parameters["top_p"] == 0.8
            texts = [types.SimpleNamespace(text=f"text {i}") for i in range(parameters["n"])]
            return [types.SimpleNamespace(outputs=texts)]

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=LLM, SamplingParams=dict))
    draw = vllm_sampler("policy", formatter, max_new_tokens=5, top_p=0.8, dtype="bfloat16")
    assert draw([{"role": "user", "content": PROMPTS[0]}], 2, 7) == ["text 0", "text 1"]


# Recipes


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("recipes/**/bon.yaml")), ids=lambda path: path.parent.name)
def test_the_recipes_are_read_by_the_example(recipe):
    arguments_class = BestOfNArguments
    (arguments,) = TrlParser((arguments_class,)).parse_args_and_config(
        ["--config", str(recipe)], fail_with_unknown_args=True
    )
    assert arguments.n > 0 and {"DMoERM", "single", "mean", "WCO", "UWO"} <= set(arguments.reward_models)


def test_prompts_are_taken_once_and_by_task(folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": p, "task": t, "responses": ["x", "y"], "ranks": [1, 2]} for t, p in models.PROMPTS.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    assert [row["task"] for row in read_prompts(path)] == list(models.PROMPTS)
    (row,) = read_prompts(path, task="chitchat")
    assert row == {"prompt": [{"role": "user", "content": PROMPTS[1]}], "task": "chitchat", "ranks": [1, 2]}
    assert len(read_prompts(path, 2)) == 2 and Shard(3, 12).file == "00003-00012.parquet"
