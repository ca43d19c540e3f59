"""PPO: what is checked before it starts, its rollout, its going on after a kill, and what it leaves."""

import json
import os
import signal
import subprocess
import sys
from copy import deepcopy
from itertools import count

import pytest
import torch
from models import PROMPTS, make_policy, make_tokenizer, make_value_model
from rl_runs import QUIET, ROOT, LowTokens, NotANumber, example, write_prompts, write_recipe, write_run
from safetensors.torch import load_file
from transformers import GenerationConfig

from dmoerm_trl.data.formatting import Formatter
from dmoerm_trl.generation.log_probs import log_probs, nucleus_rollout, sample
from dmoerm_trl.rl.monitor import read_monitor
from dmoerm_trl.rl.needed_tasks import keep_tasks, routed_tasks
from dmoerm_trl.rl.ppo import check_arguments, check_tokenizers, ppo_config, ppo_trainer
from dmoerm_trl.rl.value_model import value_model_from

CHITCHAT = [[{"role": "user", "content": PROMPTS["chitchat"]}]]

SMALL = {
    **QUIET,
    "per_device_train_batch_size": 4,
    "num_ppo_epochs": 1,
    "response_length": 6,
    "num_sample_generations": 0,
    "gradient_checkpointing": False,
    "temperature": 1.0,
    "save_strategy": "no",
}


def config(folder, **settings):
    return ppo_config()(output_dir=str(folder), **SMALL | settings)


def trainer_for(folder, reward_model, *, prompts=CHITCHAT * 8, options=None, **settings):
    tokenizer = make_tokenizer()
    policy, value_model = make_policy(tokenizer), make_value_model(tokenizer)
    formatter = Formatter(tokenizer, 100)
    options = dict(options or {})
    policy_tokenizer = options.pop("policy_tokenizer", tokenizer)
    return ppo_trainer(
        config(folder, **settings),
        policy_tokenizer,
        policy,
        None,
        reward_model,
        prompts,
        value_model,
        formatter=formatter,
        **options,
    )


# Which inner models are kept.


def turns(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def test_prompts_are_counted_by_the_task_that_the_router_sends_them_to(dmoerm, tokenizer):
    prompts = [turns(PROMPTS[task]) for task in ("maths", "chitchat", "maths")]
    assert routed_tasks(dmoerm, prompts, Formatter(tokenizer, 100)) == {"maths": 2, "chitchat": 1}


def test_a_kept_task_gives_the_rewards_it_gave_and_a_left_out_one_is_an_error(dmoerm, tokenizer):
    formatter = Formatter(tokenizer, 100)
    whole = deepcopy(dmoerm)
    keep_tasks(dmoerm, ["chitchat"])
    kept = torch.tensor([formatter.encode(PROMPTS["chitchat"], "All is well.").input_ids])
    torch.testing.assert_close(dmoerm(kept).logits, whole(kept).logits, atol=0, rtol=0)
    assert torch.equal(dmoerm(kept).route, whole(kept).route)
    size, before = (sum(p.numel() for p in model.model.backbones.parameters()) for model in (dmoerm, whole))
    assert size < before / 2
    left_out = torch.tensor([formatter.encode(PROMPTS["maths"], "Four.").input_ids])
    with pytest.raises(ValueError, match="sends to the task 'maths', which was left out.*need one of .'chitchat'."):
        dmoerm(left_out)
    with pytest.raises(ValueError, match="got the tasks .'math'., need some of"):
        keep_tasks(dmoerm, ["math"])


def test_the_value_model_is_the_tasks_base_and_starts_at_zero(dmoerm, tokenizer):
    value_model = value_model_from(dmoerm, "chitchat")
    ids = torch.tensor([Formatter(tokenizer, 100).encode(PROMPTS["chitchat"], "All is well.").input_ids])
    backbone = dmoerm.model.backbones["chitchat"]
    expected = backbone.get_submodule("embed_tokens")(ids)
    torch.testing.assert_close(value_model.model.embed_tokens(ids), expected, atol=0, rtol=0)
    assert not value_model(ids).logits.any()
    names = {name for name, _ in value_model.named_parameters()}
    assert not [name for name in names if "lora" in name or "base_layer" in name]
    q = next(module for name, module in backbone.named_modules() if name.endswith("layers.1.self_attn.q_proj"))
    assert torch.equal(value_model.model.layers[1].self_attn.q_proj.weight, q.base_layer.weight)


# What is checked before PPO starts.


@pytest.mark.requires_ppo
@pytest.mark.parametrize(
    "settings, says",
    [
        ({"max_steps": 5}, r"max_steps=5 \(set total_episodes"),
        ({"max_grad_norm": 0.5}, r"max_grad_norm=0.5 \(set cliprange"),
        ({"sft_model_path": "mine"}, r"sft_model_path='mine' \(set policy\)"),
        ({"bf16": True}, r"bf16=True \(set bf16: false, or run"),
        ({"total_episodes": 8, "num_train_epochs": 1}, "num_train_epochs=1 .it counts only without"),
        ({"eval_strategy": "steps", "eval_steps": 5}, "eval_strategy"),
        ({"resume_from_checkpoint": "x"}, "resume_from_checkpoint='x'"),
    ],
)
def test_a_key_that_ppo_would_not_read_is_an_error(tmp_path, settings, says, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    with pytest.raises(ValueError, match=says) as error:
        check_arguments(config(tmp_path, **settings))
    assert "PPOTrainer does not read" in str(error.value)


@pytest.mark.requires_ppo
def test_the_defaults_that_ppo_reads_pass(tmp_path):
    check_arguments(config(tmp_path, total_episodes=8))
    check_arguments(config(tmp_path, num_train_epochs=1))


def test_one_chat_template_missing_is_an_error():
    policy, reward = make_tokenizer(), make_tokenizer()
    policy.padding_side, policy.chat_template = "left", None
    with pytest.raises(ValueError, match="the chat template of the policy is missing"):
        check_tokenizers(policy, reward)


@pytest.mark.requires_ppo
def test_the_policys_own_tokenizer_is_compared(tmp_path):
    other = make_tokenizer()
    other.add_tokens(["<tool>"])
    with pytest.raises(ValueError, match="1 tokens of their vocabularies differ"):
        trainer_for(tmp_path, LowTokens(), options={"policy_tokenizer": other}, total_episodes=4)


@pytest.mark.requires_ppo
def test_an_eos_that_does_not_end_a_turn_is_an_error(tmp_path):
    """The policy could write a turn of the user and its answer, and be judged by these."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    policy, value_model, formatter = make_policy(tokenizer), make_value_model(tokenizer), Formatter(tokenizer, 100)
    says = r"whose eos is '<\|endoftext\|>', need '<\|im_end\|>', with which the chat template ends a turn.*set `eos_token`"
    with pytest.raises(ValueError, match=says):
        args = config(tmp_path, total_episodes=4)
        ppo_trainer(args, formatter.tokenizer, policy, None, LowTokens(), CHITCHAT, value_model)


@pytest.mark.requires_ppo
def test_top_p_out_of_range_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="got top_p=1.5, need above 0"):
        trainer_for(tmp_path, LowTokens(), options={"top_p": 1.5}, total_episodes=4)


# The rollout.


def test_log_probs_are_those_of_the_policy_on_unpadded_text(tokenizer):
    policy, formatter = make_policy(tokenizer).eval(), Formatter(tokenizer, 100)
    torch.manual_seed(0)
    drawn = sample(policy, [turns(text) for text in PROMPTS.values()], formatter, max_new_tokens=5)
    found = log_probs(policy, drawn, temperature=0.7)
    for row, (text, response) in enumerate(zip(PROMPTS.values(), drawn.responses, strict=True)):
        encoding = formatter.encode(text, "")
        ids = encoding.input_ids[: encoding.prompt_length] + response
        logits = policy(torch.tensor([ids])).logits[0] / 0.7
        for place, token in enumerate(response):
            expected = logits[encoding.prompt_length - 1 + place].log_softmax(-1)[token]
            torch.testing.assert_close(found[row, place], expected, atol=1e-5, rtol=0)


def test_a_response_ends_with_its_first_end(tokenizer):
    policy, formatter = make_policy(tokenizer).eval(), Formatter(tokenizer, 100)
    endless, short = [], []
    for bias, kept in ((-1e4, endless), (1e4, short)):
        policy.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
        policy.lm_head.bias.data[tokenizer.eos_token_id] = bias
        policy.lm_head.bias.data[tokenizer.pad_token_id] = -1e4
        kept.append(sample(policy, CHITCHAT * 2, formatter, max_new_tokens=5))
    assert not endless[0].ended.any() and endless[0].response_mask.sum(1).tolist() == [5, 5]
    assert short[0].ended.all() and short[0].responses == [[], []] and short[0].response_mask.sum(1).tolist() == [1, 1]


def test_the_rollout_draws_from_the_nucleus_and_keeps_the_whole_distributions_scores(tokenizer):
    policy = make_policy(tokenizer).eval()
    prompt = torch.tensor([Formatter(tokenizer, 100).encode(PROMPTS["chitchat"], "").input_ids] * 200)
    asked = {"max_new_tokens": 1, "do_sample": True, "top_k": 0, "temperature": 0.5}
    torch.manual_seed(0)
    with nucleus_rollout(policy, 0.5):
        output = policy.generate(
            prompt, generation_config=GenerationConfig(**asked), return_dict_in_generate=True, output_scores=True
        )
    logits = policy(prompt[:1]).logits[0, -1].float() / 0.5
    torch.testing.assert_close(output.scores[0][0], logits, atol=1e-4, rtol=1e-4)
    probabilities, order = logits.softmax(-1).sort(descending=True)
    size = int((probabilities.cumsum(0) < 0.5).sum()) + 1
    drawn = set(output.sequences[:, -1].tolist())
    assert 1 < size < 100 and drawn <= set(order[:size].tolist())
    assert "generate" not in vars(policy)


def test_a_penalty_that_the_checkpoint_brings_is_not_applied(tokenizer):
    """Two tokens have high logits. The higher is in the prompt, so the penalty would choose the other."""
    policy, formatter = make_policy(tokenizer).eval(), Formatter(tokenizer, 100)
    policy.generation_config.repetition_penalty = 5.0  # Qwen1.5-Chat has 1.1
    prompt = formatter.encode(PROMPTS["chitchat"], "").input_ids
    in_prompt, other = prompt[-3], next(token for token in range(3, 300) if token not in prompt)
    policy.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    policy.lm_head.bias.data[[in_prompt, other]] = torch.tensor([60.0, 40.0])
    drawn = sample(policy, CHITCHAT * 4, formatter, max_new_tokens=1)
    asked = GenerationConfig(max_new_tokens=1, do_sample=True, top_k=0, temperature=1.0)
    with nucleus_rollout(policy, 1.0):
        output = policy.generate(torch.tensor([prompt] * 4), generation_config=asked, return_dict_in_generate=True)
    assert drawn.input_ids[:, -1].tolist() == output.sequences[:, -1].tolist() == [in_prompt] * 4
    assert policy.generation_config.repetition_penalty == 5.0


# Training.


@pytest.mark.requires_ppo
def test_a_reward_that_can_be_raised_rises(tmp_path):
    trainer = trainer_for(
        tmp_path, LowTokens(), prompts=CHITCHAT * 32, per_device_train_batch_size=32, total_episodes=256,
        learning_rate=1e-2, kl_coef=0.0, num_ppo_epochs=2, options={"top_p": 0.9},
    )  # fmt: skip
    trainer.train()
    scores = [entry["objective/scores"] for entry in trainer.state.log_history]
    assert len(scores) == 8 and sum(scores[-2:]) / 2 > scores[0] + 0.03


@pytest.mark.requires_ppo
@pytest.mark.parametrize("top_p", [0.3, 1.0])
def test_the_first_ratio_is_one_and_the_first_penalty_zero_whatever_the_top_p(tmp_path, top_p):
    trainer = trainer_for(tmp_path, LowTokens(), total_episodes=4, learning_rate=0.0, options={"top_p": top_p})
    trainer.train()
    (entry,) = trainer.state.log_history
    assert entry["val/ratio"] == pytest.approx(1, abs=1e-5) and entry["objective/kl"] == pytest.approx(0, abs=1e-4)


@pytest.mark.requires_ppo
def test_the_seed_decides_a_run(tmp_path):
    def weights(seed: int) -> torch.Tensor:
        trainer = trainer_for(tmp_path, LowTokens(), total_episodes=8, learning_rate=1e-2, seed=seed)
        trainer.train()
        return trainer.policy_model.lm_head.weight.detach().clone()

    first, again, other = weights(0), weights(0), weights(1)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.requires_ppo
def test_gradient_checkpointing_is_read(tmp_path):
    trainer = trainer_for(tmp_path, LowTokens(), total_episodes=4, gradient_checkpointing=True)
    assert trainer.policy_model.is_gradient_checkpointing and trainer.value_model.is_gradient_checkpointing
    trainer.train()


@pytest.mark.requires_ppo
def test_rewards_that_are_not_numbers_stop_the_run_before_anything_is_saved(tmp_path):
    trainer = trainer_for(tmp_path, NotANumber(), total_episodes=8, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match="got objective/scores nan at step 1, need a number"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


# The example, killed and started again.

KILLED = """
import os, runpy, signal
from dmoerm_trl.rl.ppo_trainer import ResumablePPOTrainer

log = ResumablePPOTrainer.log

def log_and_die(self, logs, start_time=None):
    log(self, logs, start_time)
    if self.state.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)

ResumablePPOTrainer.log = log_and_die
runpy.run_path(os.environ["EXAMPLE"], run_name="__main__")
"""


@pytest.fixture
def recipe(tmp_path):
    run = write_run(tmp_path, prompts=14)  # 12 to train on: an epoch has three steps
    numbers = count()

    def write(output: str, **settings) -> list[str]:
        settings = {
            **SMALL, **run, "output_dir": str(tmp_path / output), "max_prompt_length": 60, "total_episodes": 24,
            "learning_rate": 1e-2, "lr_scheduler_type": "cosine", "save_strategy": "steps", "save_steps": 2, "top_p": 0.8,
            "monitor_every": 1, "monitor_prompts": 2, **settings,
        }  # fmt: skip
        return write_recipe(tmp_path / f"{next(numbers)}.yaml", settings)

    return write


@pytest.mark.slow
@pytest.mark.requires_ppo
def test_a_killed_run_goes_on_and_ends_as_an_unbroken_one(recipe, tmp_path, capsys):
    ppo = example("ppo")
    broken = recipe("broken")
    code = [sys.executable, "-c", KILLED, *broken]
    environment = os.environ | {"EXAMPLE": str(ROOT / "examples" / "ppo.py"), "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(code, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert sorted(path.name for path in (tmp_path / "broken").glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",  # in the second epoch
    ]
    assert [line["step"] for line in read_monitor(tmp_path / "broken" / "monitor.jsonl")] == [*range(6)]

    ppo.main(broken)
    ppo.main(recipe("unbroken"))
    first, second = (tmp_path / name for name in ("broken", "unbroken"))
    for weights in ("model.safetensors", "checkpoint-6/value_model/model.safetensors"):
        gone_on, unbroken = load_file(first / weights), load_file(second / weights)
        assert all(torch.equal(gone_on[name], unbroken[name]) for name in unbroken | gone_on)
    trained = load_file(first / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(trained, make_policy(make_tokenizer(), tie_word_embeddings=True).model.embed_tokens.weight)
    lines = [read_monitor(folder / "monitor.jsonl") for folder in (first, second)]
    assert lines[0] == lines[1] and [line["step"] for line in lines[0]] == list(range(7))
    states = [json.loads((folder / "checkpoint-6/trainer_state.json").read_text()) for folder in (first, second)]
    scores = [[entry["objective/scores"] for entry in state["log_history"]] for state in states]
    assert scores[0] == scores[1] and len(scores[0]) == 6

    capsys.readouterr()
    ppo.main(broken)  # nothing is left to do, and nothing is done again
    assert [line["step"] for line in read_monitor(first / "monitor.jsonl")] == list(range(7))
    with pytest.raises(ValueError, match="of a run of 6 steps with 4 episodes each, need 8 with 4"):
        ppo.main([*broken, "--total_episodes", "32"])


@pytest.mark.requires_ppo
@pytest.mark.parametrize(
    "settings, says",
    [
        ({"kl_coeff": 0.1}, "kl_coeff"),
        ({"max_steps": 3}, "max_steps=3"),
        ({"max_prompt_length": 5}, "need some: raise max_prompt_length"),
        ({"max_prompt_length": 0}, "got max_prompt_length=0"),
        ({"monitor_prompts": -1}, "got .* -1 prompts to measure on.*`monitor_prompts`"),
        ({"value_model": "/missing"}, "/missing: got .*need a model that gets one label"),
        ({"monitor_every": 0}, "got monitor_every=0, need at least 1"),
        ({"learning_rate": float("inf")}, "got learning_rate=inf, need finite numbers"),
        ({"gamma": float("nan")}, "got gamma=nan"),
        ({"learning_rate": -1.0}, "got learning_rate=-1.0, need .* of 0 or more"),
        ({"temperature": 0.0}, r"got temperature=0.0, need .* above 0"),
    ],
)
def test_a_recipe_with_a_mistake_is_an_error_that_names_it(recipe, settings, says):
    with pytest.raises(ValueError, match=says):
        example("ppo").main(recipe("run", **settings))


@pytest.mark.requires_ppo
def test_prompts_that_the_reward_model_was_trained_on_are_an_error(recipe, tmp_path):
    rows = write_prompts(tmp_path / "seen.jsonl", [PROMPTS["chitchat"].upper() + " 3"])
    with pytest.raises(ValueError, match="got 1 prompts that are both in the prompts to .* and in the reward model's"):
        example("ppo").main(recipe("run", reward_prompts=rows))
