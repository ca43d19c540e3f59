"""The benchmark of figure 5: what it makes of measured numbers, by hand, and a whole run on tiny models."""

import json
from types import SimpleNamespace

import numpy as np
import overoptimisation
import pytest
from models import PROMPTS, make_dmoerm, make_policy, make_tokenizer
from rl_runs import QUIET, write_prompts

from dmoerm_trl.data.rows import PreferenceRow


def test_a_row_of_the_table_by_hand():
    """Two seeds, three steps, twelve prompts: gold rises by 2 and falls by 1 for every prompt; the seeds are 0.2 apart."""
    kl = np.array([[0.0, 1.0, 4.0], [0.0, 1.0, 4.0]])
    gold = np.array([[0.0, 2.0, 1.0], [0.0, 2.2, 1.2]])[:, :, None] + np.linspace(-1, 1, 12)
    before, gains = np.linspace(-1, 1, 20), np.array([[1.0], [1.4]]) * np.linspace(0.5, 1.5, 20)
    row = overoptimisation.summarise(kl, gold, [0, 5, 10], 2.25, before, before + gains)
    error = np.linspace(-1, 1, 20).std(ddof=1) / 20**0.5
    assert row["before"]["mean"] == pytest.approx(0) and row["before"]["error"] == pytest.approx(error)
    assert row["best"]["mean"] == pytest.approx(2.1) and row["best"]["step"] == 5 and row["best"]["kl"] == 1
    assert row["end"]["mean"] == pytest.approx(1.2) and row["end"]["error"] == pytest.approx(0.2)
    assert row["rise"]["mean"] == pytest.approx(1.2) and row["rise"]["seeds"] == pytest.approx([1.0, 1.4])
    assert row["rise"]["error"] == pytest.approx(1.2 * error / 2)
    assert row["fall"]["mean"] == pytest.approx(1) and row["rise"]["p"] < 0.005 > row["fall"]["p"]
    assert row["at_common_kl"]["mean"] == pytest.approx(1.6)  # halfway from 2.1 to 1.1: the roots are 1, 1.5 and 2
    assert row["fit"]["a"] == pytest.approx(2.1) and row["overoptimised"]  # a is R(1)
    rising = overoptimisation.summarise(kl, np.sort(gold, axis=1), [0, 5, 10], 1.0, before, before + gains)
    assert not rising["overoptimised"] and rising["fall"]["p"] == 1


def test_the_sign_flip_test_by_hand():
    """The sums of 1, 2 and 4 with their 8 choices of signs are 7, 5, 3, 1 and their negatives: half are as far as 5."""
    assert overoptimisation.sign_flip_test(np.array([-1.0, 2.0, 4.0])) == pytest.approx(4 / 8, abs=0.02)
    assert overoptimisation.sign_flip_test(np.zeros(5)) == 1
    noise = np.random.default_rng(0).normal(size=(200, 20))
    below = np.mean([overoptimisation.sign_flip_test(row, flips=500) < 0.1 for row in noise])
    assert 0.05 < below < 0.16


def test_gold_at_a_kl_is_read_off_the_line_over_the_root():
    kl, gold = np.array([0.0, 1.0, 4.0, 2.0]), np.array([0.0, 1.0, 3.0, 9.0])
    assert overoptimisation.gold_at(kl, gold, 0.25) == pytest.approx(0.5)
    assert overoptimisation.gold_at(kl, gold, 2.25) == pytest.approx(2)  # not on the way back
    assert overoptimisation.gold_at(kl, gold, 4.0) == pytest.approx(3)


def test_win_rates_by_hand():
    gold = {"DMoERM": np.array([[1.0, 2.0], [3.0, 4.0]]), "single": np.array([[1.0, 1.0], [2.0, 5.0]])}
    (name, rate), = overoptimisation.win_rates(gold).items()  # fmt: skip
    assert name == "single" and (rate["wins"], rate["ties"], rate["losses"]) == (2, 1, 1)
    assert rate["rate"] == 0.625 and rate["low"] == pytest.approx(0.1417, abs=1e-4)  # Wilson's for 2 prompts, not 4


@pytest.fixture
def run(tmp_path) -> SimpleNamespace:
    """What the benchmark reads of a finished training."""
    tokenizer, root = make_tokenizer(), tmp_path / "run"
    parts = {"base": make_policy(tokenizer), "model": make_dmoerm(tokenizer)}
    parts |= {f"ensemble/{seed}": make_dmoerm(tokenizer, {"overall": []}, seed=seed) for seed in range(2)}
    for name, model in parts.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    prompts = [f"{PROMPTS['chitchat']} {number}" for number in range(12)]
    (root / "data").mkdir()
    write_prompts(root / "data" / "phase1_train.jsonl", prompts[:8])
    write_prompts(root / "data" / "test.jsonl", prompts[8:])
    rows = [PreferenceRow([{"role": "user", "content": text}], [], [], task="chitchat") for text in prompts[8:]]
    return SimpleNamespace(
        root=root,
        recipe=SimpleNamespace(base_model=str(root / "base"), ensemble_size=2, max_length=100),
        tasks=SimpleNamespace(tasks={"chitchat": []}),
        rows=lambda part, task: rows,
    )


@pytest.mark.slow
@pytest.mark.requires_ppo
def test_the_command_measures_both_halves_once(run, tmp_path, monkeypatch):
    changes = {
        **QUIET, "gold": "rl_runs:letters_of", "per_device_train_batch_size": 4, "local_rollout_forward_batch_size": 4,
        "total_episodes": 8, "response_length": 6, "monitor_every": 1, "monitor_prompts": 3, "max_prompt_length": 60,
        "learning_rate": 1e-2, "warmup_steps": 0, "save_steps": 1,
    }  # fmt: skip
    file = tmp_path / "out" / "figure5.json"

    models = overoptimisation.reward_models(run)
    assert list(models) == ["DMoERM", "single", "mean", "WCO", "UWO"]
    monkeypatch.setattr(
        overoptimisation, "reward_models", lambda run: {name: models[name] for name in ("DMoERM", "UWO")}
    )

    def compare(**more):
        sizes = {"seeds": 2, "samples": 3, "n": 8, "prompts": 2, "workers": 1}
        return overoptimisation.compare(run, tmp_path / "work", file, changes=changes | more, **sizes)

    text = compare()
    result = json.loads(file.read_text())
    names = ["DMoERM", "UWO"]
    assert list(result["ppo"]) == list(result["best_of_n"]["curves"]) == names
    assert all(name in text for name in names) and file.with_suffix(".png").stat().st_size > 20_000
    assert file.with_suffix(".md").read_text() == text
    for row in result["ppo"].values():
        assert row["curve"]["step"] == [0, 1, 2] and row["curve"]["k3"][0] == 0 < row["curve"]["k3"][2]
        assert row["rise"]["mean"] == pytest.approx(row["end"]["mean"] - row["before"]["mean"])
    assert list(result["win_rates"]["ppo"]) == ["1", "2"] and list(result["win_rates"]["best_of_n"]) == ["1", "2", "8"]
    seeds = result["ppo"]["DMoERM"]["end"]["seeds"]
    assert seeds[0] != seeds[1] and len({row["before"]["mean"] for row in result["ppo"].values()}) == 1

    def refuse(folder, *_, **__):
        raise AssertionError(f"{folder} was done already")

    monkeypatch.setattr(overoptimisation, "train_policy", refuse)
    monkeypatch.setattr(overoptimisation, "measure_policy", refuse)
    assert compare() == text
    with pytest.raises(ValueError, match="DMoERM/0: got a run that was begun with another recipe or other weights"):
        compare(learning_rate=1e-3)
    with pytest.raises(
        ValueError, match="got 8 episodes in steps of 4 and monitor_every=3, need the last step measured"
    ):
        compare(monitor_every=3)
