"""An ensemble as one reward model: its rewards, PPO's way of reading them, and a run of PPO against it."""

import pytest
import torch
from models import PROMPTS, RESPONSES, make_dmoerm, make_policy, make_tokenizer, padded
from rl_runs import QUIET, example, write_recipe, write_run

from dmoerm_trl.data.formatting import Formatter
from dmoerm_trl.rl.monitor import read_monitor
from dmoerm_trl.scoring.aggregation import AGGREGATIONS
from dmoerm_trl.scoring.ensemble import RewardEnsemble, load_reward_model
from dmoerm_trl.scoring.reward_functions import TextRewards

TEXTS = [(prompt, response) for prompt in PROMPTS.values() for response in RESPONSES]


def make_members(tokenizer, count: int = 3) -> list:
    """Single reward models that differ in their weights and in the scale they hold."""
    return [make_dmoerm(tokenizer, {"overall": []}, seed=seed) for seed in range(count)]


@pytest.fixture
def members(tokenizer):
    return make_members(tokenizer)


@pytest.fixture
def folders(tmp_path, members, tokenizer) -> list[str]:
    for number, member in enumerate(members):
        member.save_pretrained(tmp_path / str(number))
        tokenizer.save_pretrained(tmp_path / str(number))
    return [str(tmp_path / str(number)) for number in range(len(members))]


def own_rewards(members, tokenizer) -> torch.Tensor:
    """The members' rewards of the texts, each text by itself, shape (k, texts)."""
    ids = [torch.tensor([Formatter(tokenizer, 100).encode(*texts).input_ids]) for texts in TEXTS]
    with torch.no_grad():
        return torch.stack([torch.cat([member(row).logits[:, 0] for row in ids]) for member in members])


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_the_rewards_are_the_equations_on_the_members_rewards(name, members, tokenizer):
    expected = AGGREGATIONS[name](own_rewards(members, tokenizer))
    rewards = TextRewards(RewardEnsemble(members, AGGREGATIONS[name]), Formatter(tokenizer, 100))
    found = rewards([[{"role": "user", "content": prompt}] for prompt, _ in TEXTS], [text for _, text in TEXTS])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.01  # or the equality would prove little


@pytest.mark.requires_ppo
@pytest.mark.parametrize("name", AGGREGATIONS)
def test_ppo_reads_the_same_rewards_from_prompts_padded_on_the_left(name, members, tokenizer):
    from trl.experimental.utils import get_reward

    encodings = [Formatter(tokenizer, 100).encode(*texts) for texts in TEXTS]
    pad = tokenizer.pad_token_id
    queries, _ = padded([e.input_ids[: e.prompt_length] for e in encodings], pad, "left")
    answers, _ = padded([e.input_ids[e.prompt_length :] for e in encodings], pad)
    rows = torch.cat([queries, answers], 1)
    ensemble = RewardEnsemble(members, AGGREGATIONS[name])
    everywhere, rewards, _ = get_reward(ensemble, rows, pad, queries.shape[1])
    assert everywhere.shape == (*rows.shape, 1)
    torch.testing.assert_close(rewards, AGGREGATIONS[name](own_rewards(members, tokenizer)), atol=1e-5, rtol=0)


def test_the_members_are_frozen_and_stay_in_evaluation_mode(members):
    ensemble = RewardEnsemble(members, AGGREGATIONS["mean"]).train()
    assert not any(module.training for module in ensemble.modules())
    assert not any(parameter.requires_grad for parameter in ensemble.parameters())


def test_members_without_a_scale_of_their_own_are_an_error(tokenizer, members):
    with pytest.raises(
        ValueError, match="got the members .'DMoERMForSequenceClassification', 'Qwen2ForCausalLM'., need"
    ):
        RewardEnsemble([members[0], make_policy(tokenizer)], AGGREGATIONS["mean"])
    with pytest.raises(ValueError, match=r"got the members \[\], need one or more"):
        RewardEnsemble([], AGGREGATIONS["mean"])


def test_an_ensemble_is_loaded_as_it_was_saved(folders, members, tokenizer):
    ensemble, loaded = load_reward_model({"WCO": folders}, max_length=100)
    ids = torch.tensor([Formatter(tokenizer, 100).encode(*TEXTS[0]).input_ids])
    expected = torch.stack([member(ids).logits for member in members]).amin(0)
    torch.testing.assert_close(ensemble(ids).logits, expected.detach(), atol=1e-6, rtol=0)
    assert loaded.tokenizer.get_vocab() == tokenizer.get_vocab()
    single, _ = load_reward_model(folders[0], max_length=100)
    torch.testing.assert_close(single(ids).logits, members[0](ids).logits, atol=1e-6, rtol=0)


def test_a_spec_that_names_no_ensemble_is_an_error(folders):
    for spec in ({"median": folders}, {"mean": []}, {"mean": folders, "WCO": folders}):
        with pytest.raises(ValueError, match="got the reward model .* need a folder, a hub name, or one of"):
            load_reward_model(spec, max_length=100)


def test_members_with_different_tokenizers_are_an_error(folders):
    other = make_tokenizer()
    other.add_tokens(["<tool>"])
    other.save_pretrained(folders[1])
    with pytest.raises(ValueError, match="/0 and .*/1 with tokenizers that differ"):
        load_reward_model({"mean": folders}, max_length=100)


@pytest.mark.requires_ppo
def test_the_example_optimises_an_ensemble(folders, tmp_path):
    settings = {
        **QUIET, **write_run(tmp_path), "reward_model": {"UWO": folders}, "output_dir": str(tmp_path / "run"),
        "max_prompt_length": 60, "response_length": 6, "per_device_train_batch_size": 4, "total_episodes": 8,
        "num_sample_generations": 0, "gradient_checkpointing": False, "save_strategy": "no", "learning_rate": 1e-2,
        "monitor_every": 1, "monitor_prompts": 2,
    }  # fmt: skip
    example("ppo").main(write_recipe(tmp_path / "ppo.yaml", settings))
    lines = read_monitor(tmp_path / "run" / "monitor.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2] and lines[2]["k3"] > 0
