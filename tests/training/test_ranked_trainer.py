"""Equation 7, the batches, and a training that stops at the right time and goes on after a kill as if nothing had been."""

import json
import math
import os
import socket
from copy import deepcopy
from itertools import permutations

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from models import RESPONSES, make_single, make_tokenizer, peft_expert
from torch import Tensor
from transformers import TrainerCallback, set_seed
from trl import RewardConfig

from dmoerm_trl.data.formatting import Formatter
from dmoerm_trl.data.rows import PreferenceRow
from dmoerm_trl.training.batches import distinct_tokens
from dmoerm_trl.training.ranked_config import RankedRewardConfig
from dmoerm_trl.training.ranked_dataset import ranked_dataset
from dmoerm_trl.training.ranked_trainer import (
    RankedRewardTrainer,
    fit,
    last_checkpoint,
    ranking_loss,
    train_or_resume,
)

QUIET = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
TEXTS = [*RESPONSES, "I do not know."]


def softplus(x: float) -> float:
    """-log(sigmoid(-x))"""
    return math.log(1 + math.exp(x))


def loss_of(
    rewards: list[float], pairs: list[tuple[int, int]], groups: list[int] | None = None
) -> tuple[float, list[float]]:
    groups = groups or [0] * len(rewards)
    loss, margins, _ = ranking_loss(torch.tensor(rewards), torch.tensor(pairs), torch.tensor(groups))
    return float(loss), margins.tolist()


def dataset(*ranks: list[int], start: int = 0) -> Dataset:
    """One row for each list of ranks, every row with another prompt and its responses in another order."""
    rows = []
    for number, row_ranks in enumerate(ranks, start):
        texts = [f"{TEXTS[(number + k) % len(TEXTS)]} {number * k}" for k in range(len(row_ranks))]
        rows.append(PreferenceRow([{"role": "user", "content": f"Question {number}?"}], texts, row_ranks))
    return ranked_dataset(rows, Formatter(make_tokenizer(), 512))


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# The loss.


def test_the_loss_of_two_responses():
    loss, margins = loss_of([0.5, 2.0], [(1, 0)])
    assert loss == pytest.approx(softplus(-1.5)) and margins == [1.5]
    assert loss_of([0.5, 2.0], [(0, 1)])[0] == pytest.approx(softplus(1.5))


def test_the_loss_of_three_responses_is_the_mean_over_their_three_pairs():
    loss, margins = loss_of([1.0, 3.0, 2.0], [(0, 2), (1, 0), (1, 2)])
    assert margins == [-1.0, 2.0, 1.0]
    assert loss == pytest.approx((softplus(-2) + softplus(-1) + softplus(1)) / 3)


def test_a_partial_order_is_the_mean_over_the_pairs_that_it_has():
    loss, margins = loss_of([0.0, 1.0, 4.0, 6.0], [(0, 1), (3, 2)])
    assert margins == [-1.0, 2.0]
    assert loss == pytest.approx((softplus(1) + softplus(-2)) / 2)


def test_a_cycle_of_pairs_pulls_the_rewards_together():
    rewards = torch.tensor([3.0, 2.0, 0.0], requires_grad=True)
    loss, margins, _ = ranking_loss(rewards, torch.tensor([(0, 1), (1, 2), (2, 0)]), torch.zeros(3, dtype=torch.long))
    loss.backward()
    assert margins.tolist() == [1.0, 2.0, -3.0]
    assert float(loss) == pytest.approx((softplus(-1) + softplus(-2) + softplus(3)) / 3)
    assert rewards.grad[0] > 0 > rewards.grad[2]
    assert loss_of([1.0, 1.0, 1.0], [(0, 1), (1, 2), (2, 0)])[0] == pytest.approx(math.log(2))


def test_every_prompt_weighs_the_same_however_many_pairs_it_has():
    pairs = [(0, 1), (0, 2), (1, 2), (3, 4)]
    loss, margins = loss_of([0.0, 0.0, 0.0, 1.0, 0.0, 5.0, 7.0], pairs, [0, 0, 0, 1, 1, 2, 2])
    assert len(margins) == 4
    assert loss == pytest.approx((softplus(0) + softplus(-1)) / 2)  # a prompt without a pair has no say


def test_no_pair_gives_zero_loss_and_zero_gradient():
    rewards = torch.tensor([0.3, -2.0, 1.0], requires_grad=True)
    no_pairs = torch.zeros(0, 2, dtype=torch.long)
    loss, margins, _ = ranking_loss(rewards, no_pairs, torch.tensor([0, 0, 0]))
    loss.backward()
    assert loss == 0 and len(margins) == 0
    assert torch.equal(rewards.grad, torch.zeros(3))


def test_the_gradient_is_that_of_equation_7():
    rewards = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64, requires_grad=True)
    pairs, groups = torch.tensor([(1, 0), (1, 2)]), torch.zeros(3, dtype=torch.long)
    ranking_loss(rewards, pairs, groups)[0].backward()
    low, high = 1 / (1 + math.exp(1.5)), 1 / (1 + math.exp(1.0))  # sigmoid(-margin) of the two
    assert rewards.grad.tolist() == pytest.approx([low / 2, -(low + high) / 2, high / 2])
    assert torch.autograd.gradcheck(lambda r: ranking_loss(r, pairs, groups)[0], rewards)


def test_margins_of_a_thousand_do_not_overflow():
    rewards = torch.tensor([-1000.0, 1000.0], requires_grad=True)
    loss, _, _ = ranking_loss(rewards, torch.tensor([(0, 1)]), torch.tensor([0, 0]))
    loss.backward()
    assert loss == 2000 and rewards.grad.tolist() == [-1, 1]


@given(
    st.lists(
        st.lists(st.tuples(st.floats(-20, 20), st.integers(1, 3)), min_size=2, max_size=4), min_size=1, max_size=4
    )
)
@settings(deadline=None)
def test_the_loss_is_the_mean_over_prompts_of_trls_pairwise_loss_over_all_pairs(prompts):
    rewards = torch.tensor([reward for prompt in prompts for reward, _ in prompt])
    ranks = [rank for prompt in prompts for _, rank in prompt]
    groups = torch.tensor([index for index, prompt in enumerate(prompts) for _ in prompt])
    pairs, means = [], []
    for group in range(len(prompts)):
        responses = (groups == group).nonzero().squeeze(1).tolist()
        of_prompt = [(i, j) for i, j in permutations(responses, 2) if ranks[i] < ranks[j]]
        if of_prompt:
            chosen, rejected = rewards[[i for i, _ in of_prompt]], rewards[[j for _, j in of_prompt]]
            means.append(-torch.nn.functional.logsigmoid(chosen - rejected).mean())  # as in trl.RewardTrainer
        pairs += of_prompt
    loss, _, _ = ranking_loss(rewards, torch.tensor(pairs, dtype=torch.long).view(-1, 2), groups)
    assert float(loss) == pytest.approx(float(torch.stack(means).mean()) if means else 0.0, rel=1e-5, abs=1e-6)


# The trainer.


def test_the_defaults_are_those_of_appendix_b1():
    args = RankedRewardConfig("folder", use_cpu=True)
    assert (args.eval_strategy, args.eval_steps, args.patience) == ("steps", 100, 20)
    assert (args.save_strategy, args.save_steps) == (args.eval_strategy, args.eval_steps)
    assert args.load_best_model_at_end and args.metric_for_best_model == "eval_accuracy" and args.greater_is_better
    assert args.per_device_train_batch_size == 1
    assert not args.disable_dropout and not args.gradient_checkpointing and not args.bf16
    assert args.dataloader_pin_memory == torch.cuda.is_available()
    assert args.report_to == []


def test_a_process_trains_on_one_gpu(monkeypatch):
    """Of several without a launcher, transformers would spread the model over all, which it cannot be."""
    after_init = RewardConfig.__post_init__

    def with_two_gpus(self):
        after_init(self)
        self._n_gpu = 2

    monkeypatch.setattr(RewardConfig, "__post_init__", with_two_gpus)
    assert RewardConfig("folder", use_cpu=True).n_gpu == 2
    assert RankedRewardConfig("folder", use_cpu=True).n_gpu == 1


def test_checkpoints_are_written_whenever_there_is_an_evaluation():
    args = RankedRewardConfig("folder", use_cpu=True, eval_steps=7, save_steps=500)
    assert (args.save_strategy, args.save_steps) == ("steps", 7)
    assert RankedRewardConfig("folder", use_cpu=True, eval_strategy="epoch").save_strategy == "epoch"


@pytest.mark.trl_contract
def test_each_response_goes_through_the_model_once_a_step(single, tokenizer, tmp_path):
    rows = []
    single.register_forward_hook(
        lambda module, args, kwargs, output: rows.append((module.training, kwargs["input_ids"].shape[0])),
        with_kwargs=True,
    )
    args = RankedRewardConfig(
        str(tmp_path), max_steps=3, eval_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, **QUIET
    )
    before = weights_of(single)
    data = dataset([1, 2, 3], [2, 1, 3], [1, 3, 2], [3, 2, 1])
    model, history = fit(single, args, data, dataset([1, 2], [2, 1, 1, 4], start=10), tokenizer)
    assert rows == [(True, 6)] * 3 + [(False, 6)]
    assert not same(before, weights_of(model))
    assert all(math.isfinite(entry["loss"]) for entry in history if "loss" in entry)


def test_with_a_budget_of_tokens_every_prompt_is_trained_on_once_an_epoch(single, tokenizer, tmp_path, caplog):
    data = dataset(*[[1, 2], [2, 1, 3], [1, 2]] * 4)
    budget = sorted(distinct_tokens(row["input_ids"], row["prompt_lengths"]) for row in data)[-2] * 2
    whole = {"input_ids": [[3] * budget, [3] * 5], "prompt_lengths": [1, 1], "pairs": [[0, 0, 1]]}
    data = data.add_item(whole)
    args = RankedRewardConfig(
        str(tmp_path), num_train_epochs=3, eval_steps=100, train_tokens_per_batch=budget, save_total_limit=2, **QUIET
    )
    trainer = RankedRewardTrainer(
        single, args, train_dataset=data, eval_dataset=dataset([1, 2], start=20), processing_class=tokenizer
    )
    batches = []

    def keep(module, args, kwargs, output):
        if module.training:
            batches.append(kwargs)

    single.register_forward_hook(keep, with_kwargs=True)
    train_or_resume(trainer)
    texts = [
        [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)]
        for b in batches
    ]
    epoch = len(texts) // 3
    expected = sorted(tuple(ids) for row in data for ids in row["input_ids"])
    epochs = [texts[start : start + epoch] for start in range(0, len(texts), epoch)]
    assert len(epochs) == 3 and epochs[0] != epochs[1]
    for batches in epochs:
        assert sorted(text for batch in batches for text in batch) == expected
        assert sorted(map(len, batches))[0] == 2 and max(map(len, batches)) > 3
    warnings = [record.message for record in caplog.records if "budget" in record.message]
    assert len(warnings) == 1
    assert f"1 of 13 prompts have more tokens with their responses (up to {budget + 5 - 1})" in warnings[0]


@pytest.mark.parametrize("name", ["train_tokens_per_batch", "eval_tokens_per_batch"])
def test_a_budget_of_no_tokens_is_an_error(name):
    with pytest.raises(ValueError, match=f"{name}=0, need a number of tokens"):
        RankedRewardConfig("folder", use_cpu=True, **{name: 0})


class Fixed(torch.nn.Module):
    """Rewards that are read off a table by a text's first token: what the metrics are computed from is known."""

    def __init__(self, model, table: list[float]):
        super().__init__()
        self.table = torch.tensor(table)
        self.forward_of = model.forward

    def __call__(self, input_ids: Tensor, **kwargs):
        output = self.forward_of(input_ids, **kwargs)
        output.logits = output.logits * 0 + self.table[input_ids[:, 0]].unsqueeze(1)
        return output


def rows_of(*prompts: list[tuple[int, int]]) -> Dataset:
    """(reward, rank) of each response of each prompt; a text is three tokens, whose first is the reward."""
    return Dataset.from_dict(
        {
            "input_ids": [[[token, 1, 2] for token, _ in prompt] for prompt in prompts],
            "prompt_lengths": [[1] * len(prompt) for prompt in prompts],
            "pairs": [
                [[0, i, j] for i, j in permutations(range(len(prompt)), 2) if prompt[i][1] < prompt[j][1]]
                for prompt in prompts
            ],
        }
    )


EVALUATED = [
    [(1, 4), (2, 3), (3, 2), (4, 1)],  # 6 pairs, all right
    [(1, 1), (1, 2)],  # a tie
    [(2, 1), (1, 2)],  # right
    [(1, 1), (3, 2)],  # wrong
    [(3, 1), (4, 1)],  # no pair
    [(5, 1), (5, 2), (3, 2), (9, 1)],  # (0, 1) tie, (0, 2) right, (3, 1) right, (3, 2) right
]
MEANS = {
    "eval_accuracy": (6 + 0.5 + 1 + 0 + 3.5) / (6 + 1 + 1 + 1 + 4),
    "eval_margin": (10 + 0 + 1 - 2 + (0 + 2 + 4 + 6)) / (6 + 1 + 1 + 1 + 4),
    "eval_loss": sum(
        [
            (3 * softplus(-1) + 2 * softplus(-2) + softplus(-3)) / 6,
            softplus(0),
            softplus(-1),
            softplus(2),
            (softplus(0) + softplus(-2) + softplus(-4) + softplus(-6)) / 4,
        ]
    )
    / 5,
}
"""Over all pairs, and the loss over all prompts that have one: no mean of batches' means. A tie of two rewards is half."""


def evaluated(folder, tokens_per_batch: int) -> dict[str, float]:
    tokenizer = make_tokenizer()
    model, data = make_single(tokenizer), rows_of(*EVALUATED)
    args = RankedRewardConfig(str(folder), eval_tokens_per_batch=tokens_per_batch, **QUIET)
    trainer = RankedRewardTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    model.forward = Fixed(model, [float(i) for i in range(10)]).__call__
    metrics = trainer.evaluate()
    return {name: metrics[name] for name in MEANS}


@pytest.mark.trl_contract
@pytest.mark.parametrize("tokens_per_batch", [1, 20, 1000])  # 6, 3 batches and 1
def test_metrics_are_exact_means_over_the_whole_evaluation_set_whatever_the_batches(tokens_per_batch, tmp_path):
    assert evaluated(tmp_path, tokens_per_batch) == pytest.approx(MEANS, rel=1e-6)


def evaluate_in_process(rank: int, processes: int, port: int, folder) -> None:
    places = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": processes,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in places.items()}, ACCELERATE_USE_CPU="true")
    found = [evaluated(folder / str(rank), budget) for budget in (1, 20, 1000)]  # 6 batches, 3 and 1
    assert PartialState().num_processes == processes
    (folder / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_two_processes_find_the_metrics_of_one(tmp_path):
    """Also with one batch for both, where the second process has none of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(evaluate_in_process, (2, port, tmp_path), nprocs=2)
    for rank in range(2):
        for found in json.loads((tmp_path / f"{rank}.json").read_text()):
            assert found == pytest.approx(MEANS, rel=1e-6)


def test_a_reward_that_is_nan_is_no_right_order(single, tokenizer, tmp_path):
    data = dataset([1, 2, 3])
    trainer = RankedRewardTrainer(
        single,
        RankedRewardConfig(str(tmp_path), **QUIET),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
    )
    single.model.inner_models["chitchat"].base_head.bias.data.fill_(torch.nan)
    assert trainer.evaluate()["eval_accuracy"] == 0


def test_a_step_without_a_pair_is_no_error(single, tokenizer, tmp_path):
    args = RankedRewardConfig(str(tmp_path), max_steps=1, eval_steps=5, **QUIET)
    data = dataset([1, 2]).map(lambda row: {"pairs": []})
    model, history = fit(single, args, data, dataset([1, 2], start=5), tokenizer)
    assert history[0]["loss"] == 0 and "accuracy" not in history[0]


def test_the_dropout_of_lora_is_on_in_training_and_off_in_evaluation(single, tokenizer, tmp_path):
    single.config.lora_dropout = 0.5
    expert = peft_expert(single)
    first = {"prompt_lengths": torch.tensor([1])}  # the text is no chat
    expert(torch.tensor([[5, 6, 7]]), **first)  # a backbone's first texts are preceded by a trial, in evaluation mode
    dropouts = [module for name, module in expert.named_modules() if name.endswith("lora_dropout.default")]
    seen = []
    dropouts[0].register_forward_hook(
        lambda module, args, output: seen.append((module.training, bool((output == 0).any())))
    )
    args = RankedRewardConfig(str(tmp_path), max_steps=2, eval_steps=1, **QUIET)
    fit(expert, args, dataset([1, 2], [2, 1]), dataset([1, 2], start=5), tokenizer)
    assert len(dropouts) == 4 and {module.p for module in dropouts} == {0.5}
    assert seen == [(True, True), (False, False)] * 2


class Snapshots(TrainerCallback):
    """The weights after each step, and a stop at a step, as of a process that is killed right after its checkpoint."""

    def __init__(self, kill_at: int | None = None):
        self.weights, self.kill_at = {}, kill_at

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = weights_of(model)

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.kill_at:
            raise KeyboardInterrupt


def scripted(tmp_path, accuracies: list[float], kill_at: int | None = None, patience: int = 2, **settings):
    """A training whose evaluations, one a step, give the accuracies; returns the trainer and the weights by step."""
    model, tokenizer = deepcopy(make_single(make_tokenizer())), make_tokenizer()
    settings = {"max_steps": len(accuracies), "eval_steps": 1, "learning_rate": 1e-3, **settings}
    args = RankedRewardConfig(str(tmp_path), patience=patience, **QUIET, **settings)
    data = dataset([1, 2], [2, 1], [1, 2, 2], [3, 2, 1])
    trainer = RankedRewardTrainer(
        model, args, train_dataset=data, eval_dataset=dataset([1, 2], start=5), processing_class=tokenizer
    )
    snapshots = Snapshots(kill_at)
    trainer.add_callback(snapshots)
    evaluation_loop = trainer.evaluation_loop

    def scripted_loop(*args, **kwargs):
        output = evaluation_loop(*args, **kwargs)
        output.metrics["eval_accuracy"] = accuracies[trainer.state.global_step - 1]
        return output

    trainer.evaluation_loop = scripted_loop
    if kill_at is None:
        train_or_resume(trainer)
    else:
        with pytest.raises(KeyboardInterrupt):
            train_or_resume(trainer)
    return trainer, snapshots.weights


@pytest.mark.trl_contract
def test_training_stops_when_patience_is_at_its_end_and_keeps_the_best_model(tmp_path):
    trainer, weights = scripted(tmp_path, [0.5, 0.7, 0.6, 0.7, 0.9, 0.9])
    assert trainer.state.global_step == 4  # 0.6 and 0.7 are no better than 0.7
    assert not same(weights[2], weights[4])
    assert same(weights_of(trainer.model), weights[2])


def test_without_patience_training_goes_on_to_the_end(tmp_path):
    trainer, weights = scripted(tmp_path, [0.5, 0.4, 0.4, 0.4, 0.4], patience=0)
    assert trainer.state.global_step == 5
    assert same(weights_of(trainer.model), weights[1])


def test_a_resumed_run_goes_on_with_its_count_of_evaluations_without_a_better_one(tmp_path):
    accuracies = [0.5, 0.7, 0.6, 0.6, 0.6, 0.9]
    unbroken, _ = scripted(tmp_path / "unbroken", accuracies, patience=3)
    for kill_at in (3, 4):
        scripted(tmp_path / str(kill_at), accuracies, kill_at, patience=3)
        resumed, weights = scripted(tmp_path / str(kill_at), accuracies, patience=3)
        assert list(weights) == list(range(kill_at + 1, 6))
        assert resumed.state.global_step == unbroken.state.global_step == 5
        assert same(weights_of(resumed.model), weights_of(unbroken.model))


@pytest.mark.parametrize(
    "accuracies, end", [([0.5, 0.7, 0.6, 0.6, 0.9], 4), ([0.5, 0.7, 0.6], 3)], ids=["patience", "steps"]
)
def test_a_run_killed_after_its_last_checkpoint_trains_no_further(accuracies, end, tmp_path):
    unbroken, weights = scripted(tmp_path / "unbroken", accuracies)
    assert unbroken.state.global_step == end
    scripted(tmp_path / "killed", accuracies, end)
    resumed, more = scripted(tmp_path / "killed", [*accuracies[:end], 1.0, 1.0], max_steps=len(accuracies))
    assert not more
    assert same(weights_of(resumed.model), weights[2])
    assert [
        entry.get("eval_accuracy") for entry in resumed.state.log_history if "eval_accuracy" in entry
    ] == accuracies[:end]


def test_the_last_checkpoint_is_never_deleted_not_even_at_the_end(tmp_path):
    """Else a run that is killed while it deletes it would find half of it as its newest."""
    trainer, _ = scripted(tmp_path, [0.5, 0.7, 0.6, 0.6], save_total_limit=1)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


# Checkpoints.


def checkpoint(folder, step: int, state: str | None) -> None:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    if state is not None:
        (path / "trainer_state.json").write_text(state)


def test_the_last_checkpoint_is_the_newest_that_was_written_to_its_end(tmp_path):
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "absent") is None
    for step in (100, 20, 9):
        checkpoint(tmp_path, step, json.dumps({"global_step": step}))
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
    checkpoint(tmp_path, 101, None)  # killed before the state was written
    checkpoint(tmp_path, 102, '{"global_step": 102, "log_his')  # while
    checkpoint(tmp_path, 103, "")
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-100")


def run(folder, kind: str, kill_at: int | None = None, **settings) -> tuple[dict, dict, RankedRewardTrainer] | None:
    """
    A training with dropout over several epochs, killed at a checkpoint or not. Returns the weights after its last step,
    those of the best model, and the trainer.
    """
    tokenizer = make_tokenizer()
    set_seed(3)
    model = deepcopy(make_single(tokenizer))
    if kind == "expert":
        model.config.lora_dropout = 0.3
        model = peft_expert(model)
    settings = {"num_train_epochs": 3, "eval_steps": 2, "learning_rate": 1e-2, "seed": 3, **settings}
    args = RankedRewardConfig(str(folder), **{**QUIET, **settings})
    data = dataset([1, 2], [2, 1], [1, 2, 2], [3, 2, 1], [1, 2])
    trainer = RankedRewardTrainer(
        model, args, train_dataset=data, eval_dataset=dataset([1, 2], [3, 1, 2], start=7), processing_class=tokenizer
    )
    snapshots = Snapshots(kill_at)
    trainer.add_callback(snapshots)
    if kill_at is None:
        train_or_resume(trainer)
        return snapshots.weights[trainer.state.global_step], weights_of(trainer.model), trainer
    with pytest.raises(KeyboardInterrupt):
        train_or_resume(trainer)


@pytest.mark.parametrize(
    "kind, kills, settings",
    [
        ("base", (2, 6, 14), {}),
        pytest.param("expert", (2, 6, 14), {}, marks=pytest.mark.trl_contract),
        ("expert", (5, 10), {"eval_strategy": "epoch"}),
        ("expert", (2, 6), {"gradient_accumulation_steps": 2}),
        ("expert", (4, 6), {"max_steps": 7, "metric_for_best_model": "eval_loss"}),
        ("expert", (2, 4, 8), {"train_tokens_per_batch": 110}),  # three steps an epoch
    ],
    ids=["base", "expert", "epochs", "accumulation", "loss", "tokens"],
)
def test_a_killed_and_resumed_training_gives_the_weights_of_an_unbroken_one(kind, kills, settings, tmp_path):
    """The order of the data and the dropout included."""
    last, best, unbroken = run(tmp_path / "unbroken", kind, **settings)
    for kill_at in kills:
        run(tmp_path / "killed", kind, kill_at, **settings)
    last_of_resumed, best_of_resumed, resumed = run(tmp_path / "killed", kind, **settings)
    assert same(last, last_of_resumed)
    assert same(best, best_of_resumed)
    assert unbroken.state.best_global_step == resumed.state.best_global_step
    assert unbroken.state.global_step == resumed.state.global_step


def test_a_run_killed_while_it_wrote_a_checkpoint_gives_the_same_weights(tmp_path):
    last, best, _ = run(tmp_path / "unbroken", "expert")
    run(tmp_path / "killed", "expert", kill_at=8)
    newest = tmp_path / "killed" / "checkpoint-8"
    whole = (newest / "trainer_state.json").read_text()
    (newest / "trainer_state.json").write_text(whole[:100])
    (newest / "optimizer.pt").write_bytes(b"half")
    assert int(last_checkpoint(tmp_path / "killed").split("-")[-1]) < 8
    resumed_last, resumed_best, _ = run(tmp_path / "killed", "expert")
    assert same(resumed_last, last) and same(resumed_best, best)


def test_a_run_killed_while_it_deleted_a_checkpoint_gives_the_same_weights(tmp_path):
    last, best, _ = run(tmp_path / "unbroken", "expert")
    run(tmp_path / "killed", "expert", kill_at=8)
    checkpoint(tmp_path / "killed", 4, json.dumps({"global_step": 4}))  # all that is left of it
    resumed_last, resumed_best, _ = run(tmp_path / "killed", "expert")
    assert same(resumed_last, last) and same(resumed_best, best)
