"""The benchmark on real text: its splits, its pairs and its numbers, on made-up texts."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from real_text import (
    METHODS,
    RECIPE,
    Setting,
    averaged,
    best_of_n,
    by_labels,
    by_seed,
    consistency,
    counted,
    logistic_weights,
    run_rewards,
    with_labels,
)
from real_text_data import (
    GENERAL,
    SOURCE,
    SOURCE_AT_LENGTH,
    ArenaPrompt,
    Cutter,
    Sizes,
    TestSet,
    arena_split,
    harmless_pairs,
    human_pairs,
    prompt_row,
)
from safetensors.torch import save_file

from dmoerm_trl.data.preference_row import PreferenceRow
from dmoerm_trl.labelling.heuristics import weak_ranks
from dmoerm_trl.labelling.system_strength import length_controlled_strength, system_ranks, system_strength
from dmoerm_trl.tasks import TaskTable

FEW = ("mean", "WCO", "UWO", "DMoERM")


def test_set(gold: dict[str, list[float]], lengths: list[int] | None = None) -> TestSet:
    """A row for each key; responses of the given lengths."""
    test = TestSet()
    for key, values in gold.items():
        texts = ["x" * length for length in lengths or [10] * len(values)]
        test.add(prompt_row(key), values, texts, key)
    return test


test_set.__test__ = False


# The numbers.


def test_pairs_are_matched_within_a_share_of_the_longer():
    test = test_set({"a": [1.0, 2.0, 3.0, 4.0]}, lengths=[10, 9, 8, 100])
    assert test.matched(0, 0.1) == [(0, 1)]
    assert test.matched(0, 0.2) == [(0, 1), (0, 2), (1, 2)]


def test_consistency_counts_pairs_over_prompts_and_seeds():
    """Of "a" three pairs, of "b" one; a tie of rewards is half a pair, a tie of gold is none."""
    first = test_set({"a": [3.0, 2.0, 1.0], "b": [1.0, 2.0], "c": [1.0, 1.0]})
    right = {"a": [3.0, 2.0, 1.0], "b": [1.0, 2.0], "c": [0.0, 5.0]}
    wrong = {"a": [3.0, 1.0, 2.0], "b": [4.0, 4.0], "c": [0.0, 5.0]}  # two of three, and half of one
    scores = {"mean": wrong, "WCO": {**wrong, "b": [2.0, 1.0]}, "UWO": {**wrong, "b": [2.0, 1.0]}, "DMoERM": right}
    seeds = [(first, {method: list(rows.values()) for method, rows in scores.items()})]
    found = consistency(counted(seeds))
    assert {method: found["methods"][method]["mean"] for method in FEW} == {
        "mean": 2.5 / 4,
        "WCO": 2 / 4,
        "UWO": 2 / 4,
        "DMoERM": 1.0,
    }
    assert found["gain"]["over"] == "mean" and found["gain"]["mean"] == pytest.approx(1.5 / 4)
    assert (found["pairs"], found["prompts"]) == (4, 2)  # "c" has no pair
    interval = found["methods"]["mean"]
    assert 0.5 <= interval["low"] < interval["mean"] < interval["high"] <= 2 / 3  # of "b" alone and of "a" alone

    second = test_set({"a": [3.0, 2.0, 1.0]})
    other = (second, {method: [[1.0, 2.0, 3.0]] for method in FEW})
    both = by_seed([*seeds, other])
    assert both["methods"]["DMoERM"]["mean"] == 4 / 7 and both["methods"]["DMoERM"]["seeds"] == [1.0, 0.0]
    assert (both["pairs"], both["prompts"]) == (7, 2)  # "a" is one prompt in both seeds
    assert both["gain"]["seeds"] == [1.5 / 4, 0.0]


def test_differences_are_of_the_same_pairs():
    """Of six pairs "mean" is wrong on one and "single" on all."""
    test = test_set({"a": [3.0, 2.0, 1.0], "b": [3.0, 2.0, 1.0]})
    wrong = [[1.0, 2.0, 3.0]] * 2
    scores = dict.fromkeys(FEW, [[3.0, 2.0, 1.0], [3.0, 1.0, 2.0]]) | {"single": wrong}
    found = consistency(counted([(test, scores)]))["differences"]
    assert set(found) == {"mean - single"}  # the others are not there
    assert found["mean - single"]["mean"] == pytest.approx(5 / 6)
    assert found["mean - single"]["low"] == pytest.approx(2 / 3) and found["mean - single"]["high"] == pytest.approx(1)


def test_labels_stand_in_for_gold():
    """Rewards as gold has it are wrong on one of three pairs by the first label, and right on the two that the second decides."""
    test = test_set({"a": [3.0, 2.0, 1.0]})
    test.labels = [{SOURCE: [2, 1, 3], SOURCE_AT_LENGTH: [1, 2, 2]}]
    found = by_labels([(test, dict.fromkeys(FEW, [[3.0, 2.0, 1.0]]))])
    assert {point: (table["methods"]["mean"]["mean"], table["pairs"]) for point, table in found.items()} == {
        SOURCE: (pytest.approx(2 / 3), 3),
        SOURCE_AT_LENGTH: (1.0, 2),
    }


def test_length_matched_consistency_counts_no_other_pair():
    """Rewards that are lengths are right in each pair but that of the two which are nearly as long."""
    test = test_set({"a": [1.0, 3.0, 2.0]}, lengths=[10, 19, 20])
    seeds = [(test, dict.fromkeys(FEW, [[10.0, 19.0, 20.0]]))]
    assert consistency(counted(seeds))["methods"]["mean"]["mean"] == pytest.approx(2 / 3)
    matched = consistency(counted(seeds, share=0.1))
    assert matched["methods"]["mean"]["mean"] == 0 and matched["pairs"] == 1


def test_best_of_n_chooses_by_rewards_among_prompts_with_enough_responses(capsys):
    gold = [float(i) for i in range(48)]
    test = test_set({"a": gold, "b": [1.0, 2.0]})
    best = best_of_n([(test, {"DMoERM": [gold, [0.0, 0.0]], "mean": [[-g for g in gold], [0.0, 0.0]]})])
    assert "1 of 2 prompts have 48 responses" in capsys.readouterr().out
    assert best["prompts"] == 1
    found = {method: [best["curves"][method][n]["mean"] for n in (1, 48)] for method in ("DMoERM", "mean")}
    assert found == {"DMoERM": [23.5, 47.0], "mean": [23.5, 0.0]}


def test_the_weights_of_labels_are_those_of_least_loss():
    """Of one input the least of log(1 + e^-w) + r w^2 is where (1 + e^w)^-1 = 2 r w: at w = 1 with r = 1 / (2 + 2 e)."""
    assert logistic_weights(np.ones((5, 1)), ridge=1 / (2 + 2 * np.e)) == pytest.approx([1.0])


def test_weights_are_averaged():
    models = [{"weight": torch.tensor([1.0, 2.0]), "bias": torch.tensor(value)} for value in (0.0, 3.0, 6.0)]
    models[1]["weight"] = torch.tensor([4.0, -1.0])
    found = averaged(models)
    assert found["weight"].tolist() == [2.0, 1.0] and found["bias"] == 3.0


def test_labels_are_added_with_weights_of_other_prompts():
    """Rewards that say nothing, labels that say all: every pair of held-out prompts is right."""
    gold = {str(n): [float((k * (n % 4 + 1)) % 5) for k in range(5)] for n in range(12)}
    test = test_set(gold)
    test.labels = [{"structure": [5 - int(g) for g in values]} for values in gold.values()]
    noise = np.random.default_rng(0).normal(size=(12, 5)).tolist()
    stacked = with_labels(test, noise, folds=3)
    assert [np.argsort(row).tolist() for row in stacked] == [np.argsort(values).tolist() for values in gold.values()]

    test.labels[0] = {"structure": [1, 2, 3, 4, 5]}  # that of one prompt
    changed = with_labels(test, noise, folds=3)
    assert np.argsort(changed[0]).tolist() == [4, 3, 2, 1, 0]


# The data.


@pytest.fixture
def prompts() -> list[ArenaPrompt]:
    """Forty prompts of six responses, all different in length, of which the longest is cut."""
    return [
        ArenaPrompt(
            f"arena {number}",
            f"question {number}",
            [" ".join(f"word{number}{k}{j}" for j in range(3 + 4 * k)) + "." for k in range(6)],
            [float((k * 5 + number) % 6) for k in range(6)],
            [f"system {(k + number) % 7}" for k in range(6)],
        )
        for number in range(40)
    ]


TABLE = TaskTable(
    {
        "maths": ("content richness", SOURCE, SOURCE_AT_LENGTH),
        "chitchat": (SOURCE,),
        GENERAL: ("content richness", SOURCE, SOURCE_AT_LENGTH, "proactivity"),
    },
    ("content richness", SOURCE, SOURCE_AT_LENGTH),
)


@pytest.mark.parametrize("seed", range(3))
def test_the_arena_is_split_by_prompt(prompts, tokenizer, seed):
    tasks = ["maths" if number % 2 else "chitchat" if number < 6 else "others" for number in range(40)]
    sizes = Sizes(responses=4, test_share=0.25, task_prompts=10, response_tokens=20)
    table, rows, test = arena_split(prompts, tasks, TABLE, sizes, Cutter(tokenizer), seed)
    assert not {row.prompt_id for row in rows} & {row.prompt_id for row in test.rows}
    ranked, others = [row for row in rows if row.pairs_of()], [row for row in rows if not row.pairs_of()]
    assert len(ranked) == 30 and all(len(row.responses) == 4 for row in ranked)
    assert others and all(len(row.responses) == 2 and row.ranks == [1, 1] for row in others)  # what is left of six
    assert len(test.rows) == 10 and all(len(row.responses) == 6 for row in test.rows)
    assert {row.task for row in [*rows, *test.rows]} == {"maths", GENERAL}
    points = ("content richness", SOURCE, SOURCE_AT_LENGTH)  # nobody asks back
    assert table.tasks == dict.fromkeys(("maths", GENERAL), points)

    by_name = {prompt.prompt: prompt for prompt in prompts}

    def whole(row: PreferenceRow) -> tuple[list[str], list[float], list[str]]:
        """Its responses as they were before they were cut, with gold and sources."""
        prompt = by_name[row.prompt[0]["content"]]
        places = [
            next(i for i, text in enumerate(prompt.responses) if text.startswith(response[:8]))
            for response in row.responses
        ]
        return tuple([values[i] for i in places] for values in (prompt.responses, prompt.gold, prompt.sources))

    strengths = {
        SOURCE: system_strength((row.ranks, whole(row)[2]) for row in ranked),
        SOURCE_AT_LENGTH: length_controlled_strength(
            (row.ranks, whole(row)[2], [len(text) for text in whole(row)[0]]) for row in ranked
        ),
    }
    for row in rows:
        texts, gold, sources = whole(row)
        assert row in others or row.ranks == [1 + sum(other > value for other in gold) for value in gold]
        of_whole_texts = {"content richness": weak_ranks(row.prompt[0]["content"], texts, "content richness")}
        of_sources = {point: system_ranks(strength, sources) for point, strength in strengths.items()}
        assert row.capability_ranks == (of_sources if row in others else of_whole_texts | of_sources)
    seen = [{text[:8] for row in rows if row.prompt == other.prompt for text in row.responses} for other in ranked]
    assert all(len(texts) in (4, 6) for texts in seen)  # no response twice
    for row, gold, lengths, labels in zip(test.rows, test.gold, test.lengths, test.labels, strict=True):
        prompt = by_name[row.prompt[0]["content"]]
        assert labels["content richness"] == weak_ranks(prompt.prompt, prompt.responses, "content richness")
        assert all(labels[point] == system_ranks(strength, prompt.sources) for point, strength in strengths.items())
        assert gold == prompt.gold and lengths == [len(text) for text in prompt.responses]
        assert not row.capability_ranks


def test_pairs_whose_prompts_are_trained_on_are_left_out(tokenizer, tmp_path, capsys):
    rows = [
        {"prompt": f"Question {n}", "response_1": "one", "response_2": "two", "preferred": n % 3} for n in range(9)
    ]
    (tmp_path / "human.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = {prompt_row(text).prompt_id for text in ("question  1", "Question 3")}  # of these the second is a tie
    test = human_pairs(tmp_path / "human.jsonl", Sizes(), Cutter(tokenizer), trained)
    assert "1 of 6 left out" in capsys.readouterr().out
    found = {row.prompt[0]["content"]: gold for row, gold in zip(test.rows, test.gold, strict=True)}
    first, second = [1.0, 0.0], [0.0, 1.0]
    assert found == {f"Question {n}": {1: first, 2: second}[n % 3] for n in (2, 4, 5, 7, 8)}


def test_harmless_pairs_are_last_turns(tokenizer, tmp_path):
    turns = [{"role": "user", "content": "Hello"}]
    row = {
        "prompt": turns,
        "chosen": [{"role": "assistant", "content": "Good"}],
        "rejected": [{"role": "assistant", "content": "Bad"}],
    }
    empty = {**row, "rejected": [{"role": "assistant", "content": " "}]}
    (tmp_path / "harmless.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (row, empty)))
    test = harmless_pairs(tmp_path / "harmless.jsonl", Sizes(), Cutter(tokenizer))
    assert test.rows == [PreferenceRow(turns, ["Good", "Bad"], [1, 2])] and test.gold == [[1.0, 0.0]]


# A seed that was run elsewhere.


@pytest.fixture
def setting(prompts, tokenizer, tmp_path) -> SimpleNamespace:
    """The prompts and two small sets of pairs, in files as the benchmark reads them."""
    responses = [
        {"prompt_id": number, "instruction": prompt.prompt, "generator": source, "response": text, "gold": gold}
        for number, prompt in enumerate(prompts)
        for text, gold, source in zip(prompt.responses, prompt.gold, prompt.sources, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(responses), tmp_path / "arena.parquet")
    turn = {"role": "user", "content": "Hello"}
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ("Good", "Bad"))
    files = {
        "router_train": [{"prompt": "What?", "task": "maths", "scenario": "sums"}],
        "human_pairs": [{"prompt": "Why?", "response_1": "one", "response_2": "two", "preferred": 2}],
        "harmless_pairs": [{"prompt": [turn], "chosen": chosen, "rejected": rejected}] * 2,
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = Sizes(responses=4, test_share=0.25, task_prompts=10, response_tokens=20)
    return SimpleNamespace(data=tmp_path, sizes=sizes, tokenizer=tokenizer, table=TABLE)


def test_of_a_seed_its_rewards_are_enough(setting, tmp_path):
    """Nothing is trained where they are: ten test prompts with six responses, one human pair, two harmless ones."""
    counts = {"arena": 60, "human_pairs": 2, "harmless_pairs": 4}
    rewards = {
        f"{name}/{method}": torch.arange(count) + 100.0 * place
        for name, count in counts.items()
        for place, method in enumerate(METHODS)
    }
    save_file(rewards, tmp_path / "rewards.safetensors")
    router = {"arena_tasks": ["maths" if number % 2 else "others" for number in range(40)]}
    scored = run_rewards(setting, 0, router, tmp_path)
    for name, count in counts.items():
        test, scores = scored[name]
        assert list(scores) == [*METHODS, "length only"]
        assert [len(row) for row in scores["DMoERM"]] == [len(gold) for gold in test.gold]
        for place, method in enumerate(METHODS):
            assert sum(scores[method], []) == [100.0 * place + i for i in range(count)]
        assert scores["length only"] == test.lengths


def test_a_folder_of_runs_is_of_one_setting(setting, backbone, tmp_path):
    """Else what another encoder or another cut gave would be read as the result of this one."""
    backbone.save_pretrained(tmp_path / "model")
    setting.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "router_test.jsonl").write_text('{"prompt": "What?", "task": "maths"}\n')
    given = {
        "data": tmp_path,
        "runs": tmp_path / "runs",
        "recipe": RECIPE,
        "workers": 1,
        "quick": False,
        "model": str(tmp_path / "model"),
    }

    def claim(**other) -> None:
        Setting(SimpleNamespace(**{"sizes": "{}"} | given | other)).claim()

    claim()
    claim()
    with pytest.raises(SystemExit, match=r"got runs of another sizes .*need the same .*name another folder by --runs"):
        claim(sizes='{"response_tokens": 224}')
    claim(sizes='{"response_tokens": 224}', runs=tmp_path / "longer")
    (tmp_path / "router_test.jsonl").write_text('{"prompt": "Why?", "task": "maths"}\n')
    with pytest.raises(SystemExit, match="got runs of another sha256 of the data"):
        claim()
