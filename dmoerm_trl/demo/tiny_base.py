"""Train a tiny Qwen2 language model with a chat template from scratch, as the base of the demo and of the tests."""

from pathlib import Path

from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

MAX_LENGTH = 1024
"""Maximum tokens of a text, which is the number of positions of the model."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Qwen's ChatML, without its default system prompt."""


def train_tiny_base(
    texts: list[list[dict]],
    output_dir: str | Path,
    *,
    seed: int = 0,
    hidden_size: int = 128,
    num_layers: int = 3,
    num_heads: int = 4,
    vocab_size: int = 2048,
    max_steps: int = 900,
    batch_size: int = 8,
    learning_rate: float = 8e-3,
) -> Path:
    """
    Train a byte-level BPE tokenizer and a `Qwen2ForCausalLM` on conversations, and save both to one folder.

    With the default sizes the model has 0.85 million parameters. The loss covers every token of a conversation. On one machine
    the same arguments give the same weights.

    Args:
        texts (`list[list[dict]]`):
            Conversations, each a list of turns with `role` and `content`.
        output_dir (`str` or `Path`):
            Folder to which the model (safetensors) and the tokenizer are written.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the initial weights and of the order of the texts.
        hidden_size (`int`, *optional*, defaults to `128`):
            Width of the model; the feed-forward layers are three times as wide.
        num_layers (`int`, *optional*, defaults to `3`):
            Number of decoder layers.
        num_heads (`int`, *optional*, defaults to `4`):
            Number of attention heads; each pair of heads shares its keys and values.
        vocab_size (`int`, *optional*, defaults to `2048`):
            Size of the vocabulary, including the special tokens and the 256 bytes.
        max_steps (`int`, *optional*, defaults to `900`):
            Number of optimiser steps.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of conversations per step.
        learning_rate (`float`, *optional*, defaults to `8e-3`):
            Peak learning rate of a cosine schedule.

    Returns:
        `Path`: `output_dir`.

    Raises:
        ValueError: If there is no text, or a text is longer than [`MAX_LENGTH`] tokens.
    """
    if not texts:
        raise ValueError("got no texts, need at least one conversation to train the base on.")
    set_seed(seed)
    tokenizer = train_tokenizer(texts, vocab_size)
    encoded = [tokenizer(tokenizer.apply_chat_template(text, tokenize=False))["input_ids"] for text in texts]
    for index, ids in enumerate(encoded):
        if len(ids) > MAX_LENGTH:
            raise ValueError(
                f"texts[{index}]: got {len(ids)} tokens, need at most {MAX_LENGTH}, because the tiny base has no more "
                "positions: shorten the conversation or leave it out."
            )
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=max(1, num_heads // 2),
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            attention_dropout=0.0,
            initializer_range=0.05,  # with the usual 0.02 so small a model learns to copy words much later
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    output_dir = Path(output_dir)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output_dir),
            seed=seed,
            max_steps=max_steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(50, max_steps // 10),
            adam_beta2=0.98,
            logging_steps=max(1, max_steps // 10),
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_dict({"input_ids": encoded}),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.train()
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return output_dir


def train_tokenizer(texts: list[list[dict]], vocab_size: int) -> Qwen2Tokenizer:
    """
    Train a byte-level BPE tokenizer of at most `vocab_size` tokens on conversations.

    It is a Qwen2 tokenizer with other merges, because `AutoTokenizer` always splits text into words in Qwen2's way for a Qwen2
    model, whatever the file says.
    """
    qwen = Qwen2Tokenizer(eos_token=END, pad_token=PAD, extra_special_tokens=[START], model_max_length=MAX_LENGTH)
    turns = (f"{turn['role']}\n{turn['content']}\n" for text in texts for turn in text)
    tokenizer = qwen.train_new_from_iterator(turns, vocab_size, show_progress=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
