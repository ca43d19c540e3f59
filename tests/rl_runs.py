"""What the tests of PPO, GRPO and their recipes share: a tiny run's folders, and a reward that is easy to raise."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import yaml
from models import PROMPTS, make_dmoerm, make_policy, make_tokenizer
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]

QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "bf16": False}


def write_run(folder: Path, *, prompts: int = 10) -> dict[str, str]:
    """A policy (with tied weights, as small ones have), a DMoERM and prompts of one task in a folder, as the examples' keys."""
    tokenizer = make_tokenizer()
    policy = make_policy(tokenizer, tie_word_embeddings=True)
    for name, model in (("policy", policy), ("reward_model", make_dmoerm(tokenizer))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_prompts(folder / "prompts.jsonl", [f"{PROMPTS['chitchat']} {number}" for number in range(prompts)])
    return {
        "policy": str(folder / "policy"),
        "reward_model": str(folder / "reward_model"),
        "prompts": str(folder / "prompts.jsonl"),
    }


def write_prompts(path: Path, prompts: list[str]) -> str:
    path.write_text("".join(json.dumps({"prompt": prompt, "task": "chitchat"}) + "\n" for prompt in prompts))
    return str(path)


def example(name: str) -> ModuleType:
    """examples/<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_recipe(path: Path, settings: dict) -> list[str]:
    """The arguments that run an example with these settings as its recipe."""
    path.write_text(yaml.safe_dump(settings, allow_unicode=True))
    return ["--config", str(path)]


def letter_count(prompts: list, responses: list[str]) -> list[float]:
    """A reward that is easy to raise: the share of a response's characters that are letters."""
    return [sum(map(str.isalpha, text)) / max(len(text), 1) for text in responses]


class LowTokens(nn.Module):
    """A reward model that is easy to satisfy: the share of a text's tokens whose id is below 150."""

    base_model_prefix = "body"
    device = "cpu"

    def __init__(self):
        super().__init__()
        self.body, self.score = self.Body(), nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.body(input_ids, attention_mask).hidden_states[-1][:, -1])

    class Body(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs) -> SimpleNamespace:
            low = ((input_ids < 150) & attention_mask.bool()).float().cumsum(1)
            share = low / attention_mask.cumsum(1).clamp(min=1)
            return SimpleNamespace(hidden_states=(share.unsqueeze(-1),))


class NotANumber(LowTokens):
    class Body(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs) -> SimpleNamespace:
            return SimpleNamespace(hidden_states=(torch.full((*input_ids.shape, 1), torch.nan),))


def letters_of(*, prompt: list, response: str, task: str) -> float:
    """A gold reward that reads the row."""
    return len(response) + len(task)
