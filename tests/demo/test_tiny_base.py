"""The tiny base: an ordinary Hugging Face folder, the same for the same seed."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dmoerm_trl.demo.tiny_base import train_tiny_base, train_tokenizer
from dmoerm_trl.demo.world import World

SIZES = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 512, "max_steps": 20, "batch_size": 4}


@pytest.fixture(scope="module")
def texts() -> list[list[dict]]:
    return World(0).texts(100)


@pytest.fixture(scope="module")
def base(texts, tmp_path_factory) -> Path:
    return train_tiny_base(texts, tmp_path_factory.mktemp("base"), **SIZES)


def test_it_is_an_ordinary_folder_without_pickles(base):
    names = {path.name for path in base.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


def test_it_learned_something(base, texts):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    assert model.config.model_type == "qwen2" and model.config.tie_word_embeddings
    assert model.config.max_position_embeddings == 1024
    ids = tokenizer(tokenizer.apply_chat_template(texts[0], tokenize=False), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert model(ids, labels=ids).loss < 0.95 * math.log(512)


def test_the_same_seed_gives_the_same_weights(base, texts, tmp_path):
    weights = [
        (folder / "model.safetensors").read_bytes()
        for folder in (
            base,
            train_tiny_base(texts, tmp_path / "same", **SIZES),
            train_tiny_base(texts, tmp_path / "other", seed=1, **SIZES),
        )
    ]
    assert weights[0] == weights[1] != weights[2]


def test_the_tokenizer_reads_back_as_it_was_trained(base, texts):
    tokenizer, trained = AutoTokenizer.from_pretrained(base), train_tokenizer(texts, SIZES["vocab_size"])
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for text in (
        "What is 36 / 60?\n\nIt's fine.",
        "<|im_start|>user\nnaïve 茶<|im_end|>\n",
        *(turns[-1]["content"] for turns in texts),
    ):
        ids = tokenizer(text)["input_ids"]
        assert ids == trained(text)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_the_chat_template_is_chatml_without_a_system_prompt(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    turns = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    turns.append({"role": "assistant", "content": "Oh I see."})
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert whole == prompt + "Oh I see.<|im_end|>\n"
    assert tokenizer(prompt)["input_ids"].count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2


def test_texts_that_it_cannot_use_are_errors(texts, tmp_path):
    with pytest.raises(ValueError, match="got no texts"):
        train_tiny_base([], tmp_path, **SIZES)
    long = [{"role": "user", "content": "a " * 2000}]
    with pytest.raises(ValueError, match=r"texts\[100\]: got \d+ tokens, need at most 1024"):
        train_tiny_base([*texts, long], tmp_path, **SIZES)
