"""All experts in one pass over packed texts, against the plain loop: PEFT's adapters one by one, one text at a time."""

import threading
import warnings
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_dmoerm, make_tokenizer, padded, peft_expert
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import (
    AutoModel,
    BertConfig,
    BloomConfig,
    DebertaV2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from dmoerm_trl.modeling import embedding
from dmoerm_trl.modeling import multi_lora as one_pass
from dmoerm_trl.modeling.configuration_dmoerm import DMoERMConfig
from dmoerm_trl.modeling.embedding import embeddings, packing_support
from dmoerm_trl.modeling.experts import add_experts
from dmoerm_trl.modeling.modeling_dmoerm import DMoERMForSequenceClassification

ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 300,
    "pad_token_id": 1,
    "initializer_range": 0.2,
}
DECODER = {**ENCODER, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
WIDE = {**DECODER, "head_dim": 8}
Q_V = ("q_proj", "v_proj")

CONFIGS = {
    "Qwen2": Qwen2Config(**DECODER),
    "Qwen2, window": Qwen2Config(**DECODER, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "Mistral, window": MistralConfig(**DECODER, sliding_window=8),
    "Qwen3": Qwen3Config(**WIDE),
    "Llama": LlamaConfig(**DECODER),
    "Gemma": GemmaConfig(**WIDE),
    "Gemma 2": Gemma2Config(**WIDE, sliding_window=8, attn_logit_softcapping=2.0, attn_implementation="eager"),
    "Gemma 3": Gemma3TextConfig(**WIDE, sliding_window=8),
    "BERT": BertConfig(**ENCODER, max_position_embeddings=64),
    "RoBERTa": RobertaConfig(**ENCODER, max_position_embeddings=66),
}
OTHERS = {
    "Mamba": (MambaConfig(hidden_size=32, num_hidden_layers=3, vocab_size=300, state_size=8), "linear_attention"),
    "Bloom": (BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=300), "size of the tensor"),
    "DeBERTa": (DebertaV2Config(**ENCODER), "attention interface"),
    "GPT-OSS": (GptOssConfig(**WIDE, num_local_experts=4, sliding_window=8), "'s_aux'"),
    "ModernBERT": (ModernBertConfig(**ENCODER, local_attention=8), "a window on both sides"),
}
TARGETS = {
    "BERT": ("query", "value"),
    "RoBERTa": ("query", "value"),
    "Mamba": ("in_proj",),
    "Bloom": ("query_key_value",),
    "DeBERTa": ("query_proj", "value_proj"),
    "ModernBERT": ("Wqkv",),
}
NAMES = ["a", "b", "c"]
LAYERS = ["all", "top half", "top third"]


def make_texts(prompts=(25, 40), responses=(1, 7, 19, 0)) -> list[list[int]]:
    """Responses of several lengths to each of several prompts, and one text that shares nothing."""
    generator = torch.Generator().manual_seed(3)

    def tokens(count: int) -> list[int]:
        return torch.randint(5, 300, (count,), generator=generator).tolist()

    texts = [prompt + tokens(length) for prompt in map(tokens, prompts) for length in responses]
    return [*texts, tokens(9)]


TEXTS = make_texts()


def make_backbone(
    config: PreTrainedConfig, targets=Q_V, lora_layers: str = "all", names: list[str] = NAMES
) -> PreTrainedModel:
    """A backbone with experts that differ clearly from each other and from the base."""
    torch.manual_seed(0)
    backbone = AutoModel.from_config(config)
    settings = {"lora_rank": 4, "lora_alpha": 6, "lora_target_modules": targets, "lora_layers": lora_layers}
    if names:
        add_experts(backbone, DMoERMConfig(backbone_config=config, tasks={"t": names}, **settings), names)
    for name, weight in backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return backbone.eval()


def of(name: str, lora_layers: str = "all") -> PreTrainedModel:
    config = CONFIGS[name] if name in CONFIGS else OTHERS[name][0]
    return make_backbone(config, TARGETS.get(name, Q_V), lora_layers)


def z_of(backbone: PreTrainedModel, texts: list[list[int]] = TEXTS, names: list[str] = NAMES) -> Tensor:
    ids, mask = padded(texts, 0)
    return embeddings(backbone, names, ids, mask.sum(1))


def switch(backbone: PreTrainedModel, name: str) -> None:
    for layer in backbone.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter(name)


def plainly(backbone: PreTrainedModel, texts: list[list[int]] = TEXTS, names: list[str] = NAMES) -> Tensor:
    """The plain loop, shape (B, k, H)."""
    z = []
    for name in names:
        switch(backbone, name)
        z.append(torch.stack([backbone(torch.tensor([text])).last_hidden_state[0, -1] for text in texts]))
    backbone.requires_grad_(True)  # PEFT froze the adapters that it switched off
    return torch.stack(z, 1)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance * float(expected.detach().abs().max()), rtol=0)


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in module.named_parameters() if weight.grad is not None}


def close_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Measured by the largest of all gradients: those of a key's bias are zero but for rounding."""
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name],
            expected[name],
            atol=tolerance * largest,
            rtol=0,
            msg=lambda text, name=name: f"{name}: {text}",
        )


# Inference.


@pytest.mark.parametrize("lora_layers", LAYERS)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_embeddings_are_those_of_the_plain_loop(name, lora_layers):
    backbone = of(name, lora_layers)
    expected = plainly(backbone)
    assert (expected - expected[:, :1]).abs().amax((0, 2))[1:].min() > 0.1  # the experts differ
    assert packing_support(backbone) is not None
    close(z_of(backbone), expected)


@pytest.mark.parametrize("name", ["Qwen2", "BERT"])
@torch.no_grad()
def test_a_backbone_without_experts(name):
    backbone = make_backbone(CONFIGS[name], names=[])
    expected = torch.stack([backbone(torch.tensor([text])).last_hidden_state[0, -1:] for text in TEXTS])
    close(z_of(backbone, names=[]), expected)


@pytest.mark.parametrize(
    "name, targets",
    [
        ("Qwen2", ("k_proj",)),
        ("Qwen2", ("o_proj",)),
        ("Qwen2", ("up_proj", "down_proj")),
        ("Qwen2", ("gate_proj",)),
        ("Qwen2", ("self_attn.v_proj", "mlp.down_proj")),
        ("Qwen2", ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
        ("BERT", ("key",)),
        ("BERT", ("output.dense",)),
    ],
)
@pytest.mark.parametrize("lora_layers", ["all", "top third"])
@torch.no_grad()
def test_any_linear_layer_may_have_lora(name, targets, lora_layers):
    backbone = make_backbone(CONFIGS[name], targets, lora_layers)
    assert packing_support(backbone) is not None
    close(z_of(backbone), plainly(backbone))


@pytest.mark.parametrize("lora_layers", LAYERS)
@torch.no_grad()
def test_each_row_is_its_own_expert(lora_layers):
    backbone = of("Qwen2", lora_layers)
    z = z_of(backbone)
    assert torch.equal(z_of(backbone, names=["c", "a", "b"]), z[:, [2, 0, 1]])
    close(z_of(backbone, names=["b"]), z[:, 1:2])  # a lone expert is merged where several share the base
    close(z_of(backbone, names=["b", "b"]), z[:, [1, 1]], 1e-6)
    close(z_of(backbone, names=["b", "b", "a", "c"]), z[:, [1, 1, 0, 2]], 1e-6)


@pytest.mark.parametrize("name", ["Qwen2", "Mistral, window", "BERT"])
@torch.no_grad()
def test_a_batch_larger_than_a_pass_takes_several(name, monkeypatch):
    backbone = of(name)
    lengths = []
    backbone.get_input_embeddings().register_forward_hook(lambda _, args, __: lengths.append(args[0].shape))
    expected = plainly(backbone)
    packing_support(backbone)
    lengths.clear()
    monkeypatch.setitem(embedding.PASS_TOKENS, "cpu", 64)
    close(z_of(backbone), expected)
    assert len(lengths) > 1 and all(rows == 1 and tokens <= 2 * 59 for rows, tokens in lengths)


@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("lora_layers", ["all", "top third"])
def test_experts_may_go_in_groups(lora_layers, tokens, monkeypatch):
    """One by one, or two and one: 300 tokens are more than twice those of the packed texts, and less than three times."""
    backbone = of("Qwen2", lora_layers)
    weights = torch.randn(len(TEXTS), 3, 32)
    (plainly(backbone) * weights).sum().backward()
    with torch.no_grad():
        expected = plainly(backbone)
    backbone.zero_grad()
    z = z_of(backbone)
    (z * weights).sum().backward()
    whole = gradients(backbone)
    backbone.zero_grad()

    calls = []
    backbone.layers[-1].mlp.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    monkeypatch.setattr(one_pass, "GROUP_TOKENS", tokens)
    z = z_of(backbone)
    assert calls == ([1, 1, 1] if tokens == 1 else [2, 1])
    close(z, expected)
    (z * weights).sum().backward()
    close_gradients(gradients(backbone), whole)


@torch.no_grad()
def test_short_batches_keep_lora_apart_and_long_ones_merge_it():
    backbone = of("Qwen2")
    (base,) = {
        layer.get_base_layer() for name, layer in backbone.named_modules() if name == "layers.1.self_attn.q_proj"
    }
    calls = []
    base.register_forward_pre_hook(lambda *_: calls.append(1))
    short = [text[:3] for text in TEXTS[:2]]
    for texts in (short, TEXTS):
        expected = plainly(backbone, texts)
        packing_support(backbone)
        calls.clear()
        close(z_of(backbone, texts), expected)
        assert bool(calls) == (texts is short)


@pytest.mark.parametrize("name", ["Qwen2", "Mistral, window", "Gemma 2", "RoBERTa"])
@torch.no_grad()
def test_bf16_is_as_near_to_fp32_as_the_plain_loop_in_bf16(name):
    """Within 5% of the largest number, and not twice as far as the loop."""
    backbone = of(name)
    exact = plainly(backbone)
    backbone.bfloat16()
    plain, z = plainly(backbone).float(), z_of(backbone)
    assert z.dtype == torch.bfloat16 and z.isfinite().all() and packing_support(backbone) is not None
    close(z.float(), exact, 0.05)
    assert (z.float() - exact).norm() < 2 * (plain - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("initializer_range", [0.01, 0.02, 0.05])
@torch.no_grad()
def test_an_encoder_is_not_taken_for_a_decoder(initializer_range, dtype):
    """Though with weights as small as these the response hardly moves the prompt's hidden states."""
    config = BertConfig(**{**ENCODER, "initializer_range": initializer_range})
    backbone = make_backbone(config, TARGETS["BERT"]).to(dtype)
    assert not packing_support(backbone).causal
    close(z_of(backbone), plainly(backbone), 1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("name", ["Qwen2", "BERT"])
@torch.no_grad()
def test_autocast_is_taken(name):
    backbone = of(name)
    expected = plainly(backbone)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = z_of(backbone)
    close(z.float(), expected, 0.05)
    assert not torch.equal(z.float(), z_of(backbone))


# One text, one reward, whatever the batch, its order, its padding, the number of experts and where they have LoRA.


@cache
def reward_model(experts: int, lora_layers: str = "all", **options) -> DMoERMForSequenceClassification:
    points = [f"point {number}" for number in range(experts)]
    return make_dmoerm(make_tokenizer(), {"t": points}, lora_layers=lora_layers, **options)


def plain_rewards(model: DMoERMForSequenceClassification, texts: list[list[int]]) -> Tensor:
    inner, backbone = model.model.inner_models["t"], model.model.backbones["t"]
    return inner.reward(plainly(backbone, texts, inner.adapters))


def tokens(count: st.SearchStrategy[int]) -> st.SearchStrategy[list[int]]:
    """Ids that are no markers of the template. Few draws for many tokens."""
    return st.tuples(count, st.integers(0, 999)).map(
        lambda drawn: [10 + drawn[1] * (i + 7) % 239 for i in range(drawn[0])]
    )


@settings(max_examples=25, deadline=None)
@given(st.data())
@torch.no_grad()
def test_rewards_are_those_of_the_plain_loop(data):
    model = reward_model(data.draw(st.integers(1, 4), "experts"), data.draw(st.sampled_from(LAYERS), "lora_layers"))
    rows = []
    for prompt in data.draw(st.lists(tokens(st.integers(1, 40)), min_size=1, max_size=3), "prompts"):
        for response in data.draw(st.lists(tokens(st.integers(0, 25)), min_size=1, max_size=4), "responses"):
            rows.append((prompt + response, len(prompt)))
    rows = data.draw(st.permutations(rows), "order")
    expected = plain_rewards(model, [text for text, _ in rows])
    cut = data.draw(st.integers(0, len(rows) - 1), "cut")
    found = []
    for part in (rows[:cut], rows[cut:]):
        if part:
            ids, mask = padded([text for text, _ in part], 2, data.draw(st.sampled_from(["left", "right"]), "side"))
            found.append(model(ids, mask, prompt_lengths=torch.tensor([length for _, length in part])).logits)
    # a reward is a sum of terms of about 1, which may cancel: what is left is exact to the rounding of the terms
    tolerance = max(1e-5 * float(expected.abs().max()), 1e-6)
    torch.testing.assert_close(torch.cat(found), expected, atol=tolerance, rtol=0)


# Training.


@pytest.mark.parametrize("lora_layers", ["all", "top half"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_lora_and_of_the_base_are_those_of_the_plain_loop(name, lora_layers):
    backbone = of(name, lora_layers)
    weights = torch.randn(len(TEXTS), 3, 32, generator=torch.Generator().manual_seed(1))
    for index, expert in enumerate(NAMES):
        z = plainly(backbone, names=[expert])
        (z * weights[:, index : index + 1]).sum().backward()
    expected = gradients(backbone)
    assert len([name for name in expected if "lora_" in name]) == {"all": 36, "top half": 24}[lora_layers]
    backbone.zero_grad()
    (z_of(backbone) * weights).sum().backward()
    close_gradients(gradients(backbone), expected)


@pytest.mark.parametrize("lora_layers", ["all", "top half"])
def test_gradients_of_the_whole_model_are_those_of_the_plain_loop(lora_layers):
    """The heads' among them, and with a frozen base those of LoRA and heads alone."""
    model = reward_model(3, lora_layers, lora_dropout=0.0).train()
    inner, backbone = model.model.inner_models["t"], model.model.backbones["t"]
    texts = [[10 + token % 239 for token in text] for text in TEXTS]
    ids, mask = padded(texts, 2)
    batch = {"input_ids": ids, "attention_mask": mask, "prompt_lengths": mask.sum(1)}
    weights = torch.linspace(1, 2, len(texts)).unsqueeze(1)

    model.zero_grad()
    with torch.no_grad():
        z = plainly(backbone, texts, inner.adapters)
    (inner.reward(z.requires_grad_()) * weights).sum().backward()
    for index, adapter in enumerate(inner.adapters):
        plainly(backbone, texts, [adapter]).backward(z.grad[:, index : index + 1])
    expected = gradients(model)
    model.zero_grad()
    (model(**batch).logits * weights).sum().backward()
    close_gradients(gradients(model), expected)

    model.zero_grad()
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name or "inner_models" in name)
    (model(**batch).logits * weights).sum().backward()
    frozen = gradients(model)
    model.requires_grad_(True)
    assert frozen.keys() == {name for name in expected if "lora_" in name or "inner_models" in name}
    close_gradients(frozen, {name: expected[name] for name in frozen})


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("group", [1, 2048])
@pytest.mark.parametrize("name", ["Qwen2", "Mistral, window", "Gemma 2", "BERT"])
def test_gradient_checkpointing_changes_no_gradient(name, group, use_reentrant, monkeypatch):
    monkeypatch.setattr(one_pass, "GROUP_TOKENS", group)
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = CONFIGS[name] if name != "BERT" else BertConfig(**ENCODER, **options)
    model = make_dmoerm(
        make_tokenizer(),
        {"t": NAMES},
        backbone_config=config,
        lora_target_modules=TARGETS.get(name, Q_V),
        lora_layers="top half",
        lora_dropout=0.0,
        response_marker=[],
        end_of_turn=[],
    ).train()
    ids, mask = padded(TEXTS, 2)
    backbone = model.model.backbones["t"]
    assert packing_support(backbone) is not None
    layers = [module for module in backbone.modules() if hasattr(module, "gradient_checkpointing")]
    calls = []
    inside = "encoder.layer.0.intermediate" if name == "BERT" else "layers.0.mlp"
    backbone.get_submodule(inside).register_forward_pre_hook(lambda *_: calls.append(1))

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        calls.clear()
        model(ids, mask, prompt_lengths=mask.sum(1)).logits.sum().backward()
        return gradients(model)

    expected = run()
    assert len(calls) == 1
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    found = run()
    assert len(calls) == 2  # the layer ran again
    assert all(layer.gradient_checkpointing for layer in layers[-3:])
    close_gradients(found, expected)


def test_lora_dropout_is_of_training_alone_and_each_expert_draws_its_own():
    backbone = of("Qwen2")
    for layer in backbone.modules():
        if isinstance(layer, LoraLayer):
            for parts in (layer.lora_A, layer.lora_B):
                for name in NAMES:
                    parts[name].load_state_dict(parts["a"].state_dict())
            for dropout in NAMES:
                layer.lora_dropout[dropout] = torch.nn.Dropout(0.5).eval()
    z = z_of(backbone)
    assert torch.equal(z, z_of(backbone))
    close(z, z[:, :1].expand(-1, 3, -1))
    backbone.train()
    first, second = z_of(backbone), z_of(backbone)
    assert (first - second).abs().max() > 0.01
    assert (first[:, 0] - first[:, 1]).abs().max() > 0.01


# What a pass leaves behind, and what may be around it.


@torch.no_grad()
def test_a_pass_that_fails_leaves_the_backbone_as_it_was(monkeypatch):
    backbone = of("Qwen2")
    packing_support(backbone)
    expected = plainly(backbone)

    def fail(*args, **kwargs):
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(one_pass, "packed_attention", fail)
        with pytest.raises(MemoryError, match="no memory"):
            z_of(backbone)
    assert torch.equal(plainly(backbone), expected)
    close(z_of(backbone), expected)


@torch.no_grad()
def test_a_pass_leaves_the_active_adapter_and_the_mode_alone():
    backbone = of("Qwen2").train()
    switch(backbone, "b")
    frozen = {name: weight.requires_grad for name, weight in backbone.named_parameters()}
    z_of(backbone)
    assert {name: weight.requires_grad for name, weight in backbone.named_parameters()} == frozen
    assert all(layer.active_adapters == ["b"] for layer in backbone.modules() if isinstance(layer, LoraLayer))
    assert all(module.training for module in backbone.modules())


@torch.no_grad()
def test_threads_do_not_disturb_each_other():
    backbone = of("Qwen2")
    expected = plainly(backbone)
    failures = []

    def score() -> None:
        try:
            for _ in range(5):
                with torch.no_grad():
                    close(z_of(backbone), expected)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=score) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@torch.no_grad()
def test_a_task_without_experts_gets_the_base_that_it_shares_with_experts():
    model = make_dmoerm(make_tokenizer(), {"t": NAMES, "u": []}, share_base=True)
    backbone = model.model.backbones["shared"]
    texts = [[10 + token % 239 for token in text] for text in TEXTS]
    ids, mask = padded(texts, 2)
    spans = model.model.find_spans(ids, mask, mask.sum(1))
    z = model.model.embed("u", spans)
    for layer in backbone.modules():
        if isinstance(layer, LoraLayer):
            layer.enable_adapters(False)
    close(z, torch.stack([backbone(torch.tensor([text])).last_hidden_state[0, -1:] for text in texts]))


@pytest.mark.parametrize("name", ["Qwen2", "Bloom"])
@torch.no_grad()
def test_an_adapter_that_peft_put_on_the_base_is_at_work(name):
    """As of `PeftModel.from_pretrained` on a single reward model: the architecture does not matter."""
    config = CONFIGS["Qwen2"] if name == "Qwen2" else OTHERS[name][0]
    options = {"response_marker": [], "end_of_turn": [], "lora_target_modules": TARGETS.get(name, Q_V)}
    single = make_dmoerm(make_tokenizer(), {"t": []}, backbone_config=config, **options)
    ids, mask = padded(TEXTS, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = single(ids, mask, prompt_lengths=mask.sum(1)).logits
        expert = peft_expert(single).eval()
        close(expert(ids, mask, prompt_lengths=mask.sum(1)).logits, base)  # B is zero
        for name, weight in expert.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.3)
        found = expert(ids, mask, prompt_lengths=mask.sum(1)).logits
        backbone = expert.base_model.model.model.backbones["t"]
        z = torch.stack([backbone(torch.tensor([text])).last_hidden_state[0, -1:] for text in TEXTS])
        expected = expert.base_model.model.model.inner_models["t"].reward(z)
    assert (found - base).abs().max() > 0.01
    close(found, expected)


# Architectures that cannot.


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_go_the_plain_way_with_one_warning(name):
    backbone = of(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.no_grad():
            z = z_of(backbone)
        trained = z_of(backbone)
    messages = [str(warning.message) for warning in caught if "packed texts do not fit it" in str(warning.message)]
    assert len(messages) == 1
    assert messages[0].startswith(type(backbone).__name__) and OTHERS[name][1] in messages[0]
    assert packing_support(backbone) is None
    expected = plainly(backbone)
    close(z, expected)
    close(trained, expected)


def test_a_window_that_attention_is_not_told_of_is_seen_though_the_trial_is_shorter():
    """The mask of transformers has it, which packed texts do not use."""
    config = Qwen2Config(**DECODER, use_sliding_window=True, sliding_window=45, max_window_layers=0)
    backbone = make_backbone(config)
    for layer in backbone.layers:
        layer.self_attn.sliding_window = None
    with pytest.warns(UserWarning, match="its attention is not told the window"), torch.no_grad():
        z = z_of(backbone)
    close(z, plainly(backbone))


@torch.no_grad()
def test_embeddings_that_are_no_numbers_are_not_taken_for_texts_that_do_not_fit():
    """In half precision a weight may overflow; once it is fixed, packed texts go through."""
    backbone = of("Qwen2")
    weight = backbone.norm.weight.clone()
    backbone.norm.weight.fill_(torch.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not z_of(backbone).isfinite().any()
    backbone.norm.weight.copy_(weight)
    assert packing_support(backbone) is not None
    close(z_of(backbone), plainly(backbone))


def test_an_architecture_that_can_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        z_of(of("Qwen2"))
