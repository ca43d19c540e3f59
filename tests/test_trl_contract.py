"""What TRL's trainers ask of the model. Runs with TRL 1.12, which has PPO, and with the newest, which has not."""

import math
import sys
from copy import deepcopy

import pytest
import torch
from datasets import Dataset
from models import (
    PROMPTS,
    RESPONSES,
    chat,
    make_dmoerm,
    make_policy,
    make_single,
    make_tokenizer,
    make_value_model,
    padded,
    peft_expert,
)
from transformers import AutoModelForCausalLM, DynamicCache, pipeline
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer
from trl.data_utils import apply_chat_template

from dmoerm_trl.data.formatting import Formatter
from dmoerm_trl.rl.ppo import check_tokenizers, ppo_config

pytestmark = pytest.mark.trl_contract

QUIET = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], model) -> set[str]:
    return {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}


# PPO's way of reading a reward.


def get_reward(model, query_responses, pad_token_id: int, context_length: int):
    """The calls that the `get_reward` of TRL 1.12 makes, for a TRL that no longer has it."""
    mask = query_responses != pad_token_id
    output = getattr(model, model.base_model_prefix)(
        input_ids=torch.masked_fill(query_responses, ~mask, 0),
        attention_mask=mask,
        position_ids=mask.cumsum(1) - mask.long(),
        return_dict=True,
        output_hidden_states=True,
        use_cache=False,
    )
    rewards = model.score(output.hidden_states[-1])
    responses = [row.tolist() + [pad_token_id] for row in query_responses[:, context_length:]]
    last = torch.tensor([row.index(pad_token_id) - 1 + context_length for row in responses])
    return rewards, rewards[torch.arange(len(rewards)), last].squeeze(-1), last


try:
    from trl.experimental.utils import get_reward as trls_get_reward
except ImportError:
    trls_get_reward = get_reward


@pytest.fixture(params=["<|endoftext|>", "<|im_end|>"], ids=["pad", "pad is eos"])
def tokenizer(request):
    return make_tokenizer(request.param)


def rollout(tokenizer, responses: list[list[int]], side: str = "left") -> tuple[torch.Tensor, list[list[int]], int]:
    """PPO's rows for the prompts in turn, their texts without padding, and the width of the prompts."""
    prompts = [tokenizer(chat(tokenizer, prompt)[0]).input_ids for prompt in PROMPTS.values()]
    prompts = [prompts[i % len(prompts)] for i in range(len(responses))]
    queries, _ = padded(prompts, tokenizer.pad_token_id, side)
    answers, _ = padded(responses, tokenizer.pad_token_id, "right")
    texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    return torch.cat([queries, answers], 1), texts, queries.shape[1]


def response_ids(tokenizer) -> dict[str, list[list[int]]]:
    first, second, third = (tokenizer(response).input_ids for response in RESPONSES)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    return {
        "ended": [first + [end], second + [end], third + [end]],
        "empty": [[end]] * 3,
        "empty, in padding": [[pad] * 4] * 3,
        "no end": [first, second, third],
        "mixture": [first + [end], [end], third + third, second, [pad], second + [end]],
    }


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["ended", "empty", "empty, in padding", "no end", "mixture"])
def test_the_reward_that_ppo_reads_is_the_models_logits(tokenizer, kind, side):
    model = make_dmoerm(tokenizer)
    rows, texts, width = rollout(tokenizer, response_ids(tokenizer)[kind], side)
    everywhere, rewards, _ = trls_get_reward(model, rows, tokenizer.pad_token_id, width)
    logits = model(rows, rows != tokenizer.pad_token_id).logits
    assert everywhere.shape == (*rows.shape, 1)
    torch.testing.assert_close(rewards, logits[:, 0], atol=1e-6, rtol=0)
    older = get_reward(model, rows, tokenizer.pad_token_id, width)
    torch.testing.assert_close(older[1], rewards, atol=0, rtol=0)
    if side == "left":  # with prompts padded on the right a policy writes after a gap, see `check_tokenizers`
        for text, reward in zip(texts, rewards, strict=True):
            while text[-2:] == [tokenizer.pad_token_id] * 2:
                text = text[:-1]
            if tokenizer.pad_token_id != tokenizer.eos_token_id and text[-1] == tokenizer.pad_token_id:
                text = text[:-1]
            alone = model(torch.tensor([text]), torch.ones(1, len(text)))
            torch.testing.assert_close(alone.logits[0, 0], reward, atol=1e-5, rtol=0)


def test_different_responses_have_different_rewards(tokenizer):
    """Or the equalities here would prove little."""
    model = make_dmoerm(tokenizer)
    for prompt in PROMPTS.values():
        ids, mask = padded([tokenizer(chat(tokenizer, prompt, r)[1]).input_ids for r in ["", *RESPONSES]], 2)
        rewards = model(ids, mask).logits[:, 0].tolist()
        assert min(abs(a - b) for i, a in enumerate(rewards) for b in rewards[:i]) > 1e-4


# One text, one number.


def test_one_text_has_one_reward_wherever_it_comes_from(tokenizer):
    model, pad, rewards = make_dmoerm(tokenizer), tokenizer.pad_token_id, {}
    chats = [(prompt, response) for prompt in PROMPTS.values() for response in RESPONSES]
    encodings = [Formatter(tokenizer, max_length=100).encode(*texts) for texts in chats]

    ids, mask = padded([encoding.input_ids for encoding in encodings], pad)
    rewards["formatter"] = model(ids, mask).logits[:, 0]
    lengths = torch.tensor([encoding.prompt_length for encoding in encodings])
    rewards["formatter, prompt lengths"] = model(ids, mask, prompt_lengths=lengths).logits[:, 0]

    queries, _ = padded([encoding.input_ids[: encoding.prompt_length] for encoding in encodings], pad, "left")
    answers, _ = padded([encoding.input_ids[encoding.prompt_length :] for encoding in encodings], pad)
    _, rewards["PPO"], _ = trls_get_reward(model, torch.cat([queries, answers], 1), pad, queries.shape[1])

    messages = [[{"role": "user", "content": p}, {"role": "assistant", "content": r}] for p, r in chats]
    texts = [apply_chat_template({"messages": turns}, tokenizer)["text"] for turns in messages]
    assert all(text.endswith("<|im_end|>\n") for text in texts)
    tokenised = tokenizer(
        text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
    )
    with torch.inference_mode():
        rewards["GRPO"] = model(**tokenised).logits[:, 0]

    for batch_size in (1, 4):  # 4 does not divide 9
        pipe = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu", batch_size=batch_size)
        rewards[f"pipeline {batch_size}"] = torch.tensor([answer["score"] for answer in pipe(texts)])

    for name, found in rewards.items():
        torch.testing.assert_close(
            found, rewards["formatter"], atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_a_pipeline_batches_a_single_reward_model(tokenizer):
    model = make_single(tokenizer)
    texts = [chat(tokenizer, "What is two and two?", response)[1] for response in RESPONSES]
    found = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu", batch_size=2)(texts)
    rewards = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    assert [answer["score"] for answer in found] == pytest.approx(rewards, abs=1e-5)


# The trainers.


@pytest.fixture
def preferences() -> Dataset:
    """Two pairs of each task, as TRL takes them."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
            for chosen, rejected in zip(RESPONSES, RESPONSES[1:], strict=False)
            for prompt in PROMPTS.values()
        ]
    )


@pytest.mark.parametrize(
    "settings",
    [{"gradient_checkpointing": False, "bf16": False}, {"bf16": False}, {}],
    ids=["plain", "fp32", "defaults"],
)
def test_reward_trainer(dmoerm, preferences, settings, tmp_path):
    tokenizer = make_tokenizer()
    args = RewardConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=6, learning_rate=1e-2, eval_strategy="steps", eval_steps=1,
        **QUIET, **settings,
    )  # fmt: skip
    before = weights_of(dmoerm)
    trainer = RewardTrainer(
        model=dmoerm, args=args, train_dataset=preferences, eval_dataset=preferences, processing_class=tokenizer
    )
    trainer.train()
    evaluations = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert len(evaluations) == 2
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    moved = changed(before, dmoerm)
    assert not [name for name in moved if ".router." in name or "_head" in name or "reward_" in name]
    for part in ("embed_tokens", "lora_A", "lora_B", "aggregator.hidden.weight", "aggregator.output.bias"):
        of_part = [name for name in before if part in name and ".router." not in name]
        if part != "aggregator.output.bias":  # it is the same for both responses, so its gradient is about zero
            assert of_part and moved >= set(of_part), part


def test_reward_trainer_takes_margins(dmoerm, preferences, tmp_path):
    """They are of its loss, and reach the model as they reach those of transformers."""
    losses = []
    for margin in (0.0, 2.0):
        data = preferences.map(lambda row, margin=margin: {"margin": margin})
        args = RewardConfig(
            str(tmp_path / str(margin)), max_steps=1, per_device_train_batch_size=6, bf16=False, **QUIET
        )
        trainer = RewardTrainer(
            model=deepcopy(dmoerm), args=args, train_dataset=data, processing_class=make_tokenizer()
        )
        trainer.train()
        losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[1] > losses[0] + 0.5


@pytest.mark.parametrize("base", [False, True])
def test_columns_that_a_model_of_transformers_ignores_are_ignored(dmoerm, tokenizer, base):
    model = dmoerm.model if base else dmoerm
    ids = torch.tensor([tokenizer(chat(tokenizer, PROMPTS["maths"], RESPONSES[0])[1]).input_ids])
    others = {
        **{"margin": torch.ones(1), "num_items_in_batch": 3, "return_loss": True, "cache_position": torch.arange(3)},
        **{
            "logits_to_keep": 1,
            "output_attentions": False,
            "past_key_values": DynamicCache(),
            "labels": None,
            "name": "x",
        },
    }
    assert torch.equal(model(input_ids=ids, **others).logits, model(ids).logits)


@pytest.mark.parametrize(
    "argument",
    [
        "inputs_embeds",
        "labels",
        "past_key_values",
        "pixel_values",
        "head_mask",
        "cu_seq_lens_q",
        "encoder_hidden_states",
    ],
)
def test_an_argument_that_would_give_another_reward_is_an_error(dmoerm, argument):
    for others in ({"input_ids": torch.tensor([[5, 6, 7]])}, {}):
        with pytest.raises(ValueError, match=f"got the argument '{argument}', need `input_ids`"):
            dmoerm(**others, **{argument: torch.ones(1, 3)})
    with pytest.raises(ValueError, match="got no `input_ids`"):
        dmoerm(attention_mask=torch.ones(1, 3))


def test_checkpointing_of_the_reward_trainer_changes_nothing(dmoerm, preferences, tmp_path):
    results = []
    for checkpointing in (False, True):
        model = deepcopy(dmoerm)
        args = RewardConfig(
            str(tmp_path), max_steps=1, per_device_train_batch_size=6, learning_rate=1e-2, bf16=False,
            optim="sgd", gradient_checkpointing=checkpointing, **QUIET,
        )  # fmt: skip
        RewardTrainer(model=model, args=args, train_dataset=preferences, processing_class=make_tokenizer()).train()
        results.append(weights_of(model))
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_reward_trainer_trains_an_expert_alone(single, preferences, gradient_checkpointing, tmp_path):
    """Phase 2: an ordinary PEFT model, whose head PEFT trains and saves."""
    expert = peft_expert(single)
    before = weights_of(expert)
    args = RewardConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=6, learning_rate=1e-2, bf16=False,
        gradient_checkpointing=gradient_checkpointing, **QUIET,
    )  # fmt: skip
    RewardTrainer(model=expert, args=args, train_dataset=preferences, processing_class=make_tokenizer()).train()
    moved = changed(before, expert)
    assert moved >= {name for name in before if ".lora_" in name}
    assert any("base_head.modules_to_save" in name for name in moved)
    assert all(".lora_" in name or "base_head.modules_to_save" in name for name in moved)


@pytest.mark.parametrize("config, trainer", [(GRPOConfig, GRPOTrainer), (RLOOConfig, RLOOTrainer)])
def test_grpo_and_rloo(dmoerm, config, trainer, tmp_path):
    tokenizer = make_tokenizer()
    prompts = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS.values()] * 2
    args = config(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=2, max_completion_length=8, bf16=False,
        learning_rate=1e-2, **QUIET,
    )  # fmt: skip
    make_policy(tokenizer).save_pretrained(tmp_path / "policy")  # RLOO loads the reference model by its name
    before, policy, given = weights_of(dmoerm), AutoModelForCausalLM.from_pretrained(tmp_path / "policy"), []
    dmoerm.register_forward_hook(lambda _, args, output: given.append(output.logits[:, 0].tolist()))
    policy_before = weights_of(policy)
    training = trainer(
        model=policy,
        reward_funcs=[dmoerm],
        args=args,
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        reward_processing_classes=[make_tokenizer()],
    )
    training.train()
    logged = [entry["reward"] for entry in training.state.log_history if "reward" in entry]
    assert logged == pytest.approx([sum(rewards) / len(rewards) for rewards in given], abs=1e-5) and len(logged) == 2
    assert changed(policy_before, policy) and not changed(before, dmoerm)


@pytest.mark.requires_ppo
def test_ppo(dmoerm, tmp_path):
    from trl.experimental.ppo import PPOTrainer

    PPOConfig = ppo_config()
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    check_tokenizers(tokenizer, make_tokenizer())
    prompts = [{"input_ids": tokenizer(chat(tokenizer, prompt)[0]).input_ids} for prompt in PROMPTS.values()] * 2
    args = PPOConfig(
        str(tmp_path), per_device_train_batch_size=3, num_ppo_epochs=1, total_episodes=6, response_length=6,
        stop_token="eos", num_sample_generations=0, learning_rate=1e-2, bf16=False, gradient_checkpointing=False, **QUIET,
    )  # fmt: skip
    policy, value_model, given = make_policy(tokenizer), make_value_model(tokenizer), []
    before, policy_before = weights_of(dmoerm), weights_of(policy)
    dmoerm.model.register_forward_hook(lambda _, args, output: given.append(float(output.logits.mean())))
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=make_policy(tokenizer),
        reward_model=dmoerm,
        value_model=value_model,
        train_dataset=Dataset.from_list(prompts),
        eval_dataset=Dataset.from_list(prompts),
    )
    trainer.train()
    logged = [entry["objective/scores"] for entry in trainer.state.log_history if "objective/scores" in entry]
    assert len(logged) == 2 and logged == pytest.approx(given[:2], abs=1e-5)
    assert changed(policy_before, policy) and not changed(before, dmoerm)


def test_where_trl_has_no_ppo_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.experimental.ppo", None)
    with pytest.raises(ImportError, match=r"got TRL 1\.\d+\.\d+.*removed in 1\.13 and 1\.12\.0 is the last") as error:
        ppo_config()
    assert 'pip install "dmoerm-trl[ppo]"' in str(error.value)


# The tokenizers of policy and reward model.


def left(tokenizer):
    tokenizer.padding_side = "left"
    return tokenizer


def test_tokenizers_that_agree_pass(tokenizer):
    check_tokenizers(left(deepcopy(tokenizer)), tokenizer)


def test_a_policy_tokenizer_that_pads_on_the_right_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="padding_side='right', need 'left'"):
        check_tokenizers(tokenizer, tokenizer)


def test_tokenizers_that_differ_are_an_error_that_says_in_what():
    policy, reward = left(make_tokenizer("<|im_end|>")), make_tokenizer()
    policy.add_tokens(["<tool>"])
    policy.chat_template = policy.chat_template.replace("user", "human") + " "
    with pytest.raises(ValueError) as error:
        check_tokenizers(policy, reward)
    message = str(error.value)
    assert (
        f"1 tokens of their vocabularies differ (such as '<tool>', which is {len(reward)} to the policy and None"
        in message
    )
    assert "pad_token_id is 1 to the policy and 2 to the reward model" in message
    assert "their chat templates differ" in message and "eos_token_id" not in message
