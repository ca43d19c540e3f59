"""What training starts from: every kind of pretrained model either serves, and gives the plain loop's rewards, or says why not."""

import json
from pathlib import Path

import pytest
import torch
from models import TASKS, make_backbone, make_dmoerm, make_inner, make_tokenizer, padded, qwen2_config
from safetensors.torch import load_file, save_file
from test_embedding import DECODER, ENCODER, WIDE, close
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    ConvBertConfig,
    DebertaV2Config,
    DistilBertConfig,
    FalconConfig,
    FNetConfig,
    Gemma3Config,
    Gemma3ForSequenceClassification,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    IBertConfig,
    Llama4Config,
    Llama4TextConfig,
    LlamaConfig,
    LlavaConfig,
    LongformerConfig,
    MambaConfig,
    Mistral3Config,
    MixtralConfig,
    MllamaConfig,
    MobileBertConfig,
    MptConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen2VLConfig,
    Qwen3MoeConfig,
    RobertaConfig,
    T5Config,
    ViTConfig,
    XLNetConfig,
)

from dmoerm_trl.data.formatting import Formatter
from dmoerm_trl.data.rows import PreferenceRow
from dmoerm_trl.modeling.assembly import base_reward_model, export_expert
from dmoerm_trl.modeling.modeling_dmoerm import DMoERMForSequenceClassification
from dmoerm_trl.modeling.positions import longest_text
from dmoerm_trl.training.ranked_config import RankedRewardConfig
from dmoerm_trl.training.router_training import train_router

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "initializer_range": 0.2,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 300, "initializer_range": 0.2, "n_positions": 64}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 28,
    "patch_size": 14,
}

CONFIGS = {
    "GPT-2": GPT2Config(**GPT),
    "GPT-J": GPTJConfig(**GPT, rotary_dim=4),
    "OPT": OPTConfig(**{**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "Falcon, alibi": FalconConfig(**SIZES, alibi=True),
    "MPT": MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=300, initializer_range=0.2, max_seq_len=64),
    "GPT-NeoX": GPTNeoXConfig(**ENCODER),
    "Mixtral": MixtralConfig(**DECODER, num_local_experts=4),
    "Qwen2-MoE": Qwen2MoeConfig(**DECODER, **MOE, shared_expert_intermediate_size=32),
    "Qwen3-MoE": Qwen3MoeConfig(**WIDE, **MOE),
    "Phi-3": Phi3Config(**DECODER),
    "Phi-3, two sets of positions": Phi3Config(
        **DECODER,
        max_position_embeddings=64,
        rope_parameters={**LONG, "original_max_position_embeddings": 20},
        original_max_position_embeddings=20,
    ),
    "Llama-4, text": Llama4TextConfig(**WIDE, num_local_experts=2, intermediate_size_mlp=64, attention_chunk_size=16),
    "Mamba": MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=300, state_size=8, initializer_range=0.2),
    "BERT": BertConfig(**ENCODER, max_position_embeddings=64),
    "RoBERTa": RobertaConfig(**ENCODER, max_position_embeddings=66),
    "I-BERT": IBertConfig(**ENCODER, max_position_embeddings=66),
    "DeBERTa": DebertaV2Config(**ENCODER, relative_attention=True, position_biased_input=False),
    "Longformer": LongformerConfig(**ENCODER, attention_window=8, max_position_embeddings=70),
    "XLNet": XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=64, vocab_size=300, initializer_range=0.2),
    "ConvBERT": ConvBertConfig(**ENCODER, embedding_size=32, max_position_embeddings=64),
    "MobileBERT": MobileBertConfig(**ENCODER, intra_bottleneck_size=32, embedding_size=32, max_position_embeddings=64),
    "FNet": FNetConfig(
        hidden_size=32, num_hidden_layers=2, intermediate_size=64, vocab_size=300, initializer_range=0.2
    ),
}
MULTIMODAL = {
    "Gemma 3": Gemma3Config(text_config=WIDE, vision_config=VISION),
    "Qwen2-VL": Qwen2VLConfig(
        text_config={
            **WIDE,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2},
    ),
    "Mistral Small 3": Mistral3Config(
        text_config={"model_type": "mistral", **DECODER}, vision_config={"model_type": "pixtral", **VISION}
    ),
    "Llama 4": Llama4Config(
        text_config={**WIDE, "num_local_experts": 2, "intermediate_size_mlp": 64},
        vision_config={
            **{**VISION, "intermediate_size": 64},
            **dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32),
        },
    ),
    "LLaVA": LlavaConfig(
        text_config={"model_type": "llama", **DECODER}, vision_config={"model_type": "clip_vision_model", **VISION}
    ),
}
CANNOT = {
    "T5": (T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=300), "fails on token ids alone"),
    "ViT": (ViTConfig(**VISION), "it has no tokens"),
    "OPT, narrower embeddings": (
        OPTConfig(**{**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 16}),
        r"makes embeddings of shape \(2, 16, 16\)",
    ),
    "Mllama": (
        MllamaConfig(
            text_config={**SIZES, "num_key_value_heads": 2, "intermediate_size": 64, "cross_attention_layers": [1], "pad_token_id": 1},
            vision_config={
                **{key: VISION[key] for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "image_size", "patch_size")},
                **{"num_global_layers": 1, "attention_heads": 2, "intermediate_layers_indices": [0], "vision_output_dim": 64},
            },
        ),
        "in which there is nothing that `AutoModel` builds from its MllamaTextConfig",
    ),
}  # fmt: skip

LENGTHS = (3, 50, 17, 29, 23)


def texts() -> list[list[int]]:
    """Five texts of unlike lengths, two with a common beginning."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 300, (length,), generator=generator).tolist() for length in LENGTHS]
    rows[4][:20] = rows[1][:20]
    return rows


def built(config: PreTrainedConfig, auto: type = AutoModel) -> PreTrainedModel:
    torch.manual_seed(0)
    return auto.from_config(config).eval()


def saved(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def started(base: str | PreTrainedModel, **options) -> DMoERMForSequenceClassification:
    return DMoERMForSequenceClassification.from_base(base, task="t", pad_token_id=0, **options).eval()


def head_of(model: DMoERMForSequenceClassification) -> tuple[torch.Tensor, torch.Tensor]:
    head = model.model.inner_models["t"].base_head
    return head.weight.detach(), head.bias.detach()


def rewards(model: DMoERMForSequenceClassification) -> torch.Tensor:
    rows = texts()
    ids, mask = padded(rows, 0)
    return model(ids, mask, prompt_lengths=mask.sum(1) - 1).logits


@torch.no_grad()
def rewards_of_the_plain_loop(model: DMoERMForSequenceClassification, backbone: PreTrainedModel) -> torch.Tensor:
    z = torch.stack([backbone(input_ids=torch.tensor([row])).last_hidden_state[0, -1:] for row in texts()])
    return model.model.inner_models["t"].reward(z)


# Architectures.


@pytest.mark.filterwarnings("ignore:.* is run once for each expert and text")
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_any_architecture_of_text_has_the_rewards_of_the_plain_loop_after_saving_too(name, tmp_path):
    model = started(saved(built(CONFIGS[name]), tmp_path / "base"))
    expected = rewards_of_the_plain_loop(model, built(CONFIGS[name]))
    assert expected.std() > 1e-3
    close(rewards(model), expected, 1e-4)
    model.save_pretrained(tmp_path / "model")
    close(rewards(DMoERMForSequenceClassification.from_pretrained(tmp_path / "model")), expected, 1e-4)


@pytest.mark.filterwarnings("ignore:.* is run once for each expert and text")
@pytest.mark.parametrize("name", ["FNet", "Phi-3, two sets of positions"])
def test_gradients_where_padding_or_a_neighbour_would_move_an_embedding(name, tmp_path):
    model = started(built(CONFIGS[name]))
    alone = [model(torch.tensor([row]), prompt_lengths=torch.tensor([len(row) - 1])).logits for row in texts()]
    torch.cat(alone).sum().backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    rewards(model).sum().backward()
    for key, weight in model.named_parameters():
        if key in expected:
            torch.testing.assert_close(weight.grad, expected[key], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", CANNOT)
def test_an_architecture_that_does_not_embed_texts_is_an_error(name, tmp_path):
    config, message = CANNOT[name]
    with pytest.raises(ValueError, match=message):
        started(saved(built(config), tmp_path))


@pytest.mark.filterwarnings("ignore:.* is run once for each expert and text")
@pytest.mark.parametrize(
    "name, limit",
    [("GPT-2", 64), ("GPT-J", 64), ("OPT", 64), ("MPT", 64), ("BERT", 64), ("RoBERTa", 64), ("I-BERT", 64), ("Mixtral", None)],
)  # fmt: skip
@torch.no_grad()
def test_a_text_longer_than_the_positions_is_an_error_that_names_both(name, limit):
    model = started(built(CONFIGS[name]))
    assert longest_text(model.model.backbones["t"]) in (limit, None)
    lengths = torch.tensor([10])
    assert model(torch.full((1, 64), 7), prompt_lengths=lengths).logits.isfinite().all()
    for length in (65, 200):
        if limit is None:
            model(torch.full((1, length), 7), prompt_lengths=lengths)
        else:
            with pytest.raises(
                ValueError, match=f"a text of {length} tokens .* with positions for {limit}, need at most"
            ):
                model(torch.full((1, length), 7), prompt_lengths=lengths)


def test_positions_that_depend_on_the_texts_before_are_refused():
    """ "dynamic" rotary positions keep what the longest text so far made of them."""
    config = LlamaConfig(
        **DECODER,
        max_position_embeddings=20,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    )
    model = started(built(config))
    model(torch.full((1, 20), 7), prompt_lengths=torch.tensor([10]))
    with pytest.raises(ValueError, match="a text of 21 tokens for a LlamaModel with positions for 20"):
        model(torch.full((1, 21), 7), prompt_lengths=torch.tensor([10]))


# Multimodal models.


@pytest.mark.filterwarnings("ignore:.* is run once for each expert and text")
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForImageTextToText])
@pytest.mark.parametrize("name", MULTIMODAL)
@torch.no_grad()
def test_of_a_multimodal_model_the_part_that_reads_text_is_used(name, auto, tmp_path):
    whole = built(MULTIMODAL[name], auto)
    with pytest.warns(UserWarning, match="the part of .* that reads text is used, .*; images.* are not read") as said:
        model = started(saved(whole, tmp_path / "base"))
    assert not [warning for warning in said if "head is left out" in str(warning.message)]
    backbone = model.model.backbones["t"]
    (text,) = (part for part in whole.modules() if type(part) is type(backbone))
    assert backbone.config.model_type == whole.config.get_text_config().model_type
    expected = rewards_of_the_plain_loop(model, text)
    close(rewards(model), expected, 1e-4)
    model.save_pretrained(tmp_path / "model")
    assert not [
        key for key in load_file(tmp_path / "model" / "model.safetensors") if "vision" in key or "visual" in key
    ]
    close(rewards(DMoERMForSequenceClassification.from_pretrained(tmp_path / "model")), expected, 1e-4)


# Reward models.


@pytest.mark.parametrize("as_folder", [True, False])
@pytest.mark.parametrize(
    "config", [Qwen2Config(**DECODER, num_labels=1), GPT2Config(**GPT, num_labels=1, pad_token_id=0)]
)
def test_the_head_of_a_decoder_that_is_a_reward_model_is_kept(config, as_folder, tmp_path, recwarn):
    general = built(config, AutoModelForSequenceClassification)
    weight = general.score.weight.detach().clone()
    ids = torch.tensor([texts()[1]])
    expected = general(input_ids=ids).logits
    model = started(saved(general, tmp_path) if as_folder else general, activation="none")
    assert torch.equal(head_of(model)[0], weight) and head_of(model)[1] == 0
    assert not [warning for warning in recwarn if "head" in str(warning.message)]
    close(model(ids, prompt_lengths=torch.tensor([10])).logits, expected, 1e-4)


@pytest.mark.filterwarnings("ignore:.*the part of .* that reads text is used")
def test_the_head_of_a_multimodal_reward_model_is_kept(tmp_path):
    general = Gemma3ForSequenceClassification(Gemma3Config(text_config=WIDE, vision_config=VISION, num_labels=1))
    assert torch.equal(head_of(started(saved(general, tmp_path)))[0], general.score.weight)


@pytest.mark.parametrize(
    "head", [["v_head.summary.weight", "v_head.summary.bias"], ["value_head.weight"], ["score.weight", "mean", "std"]]
)
def test_heads_of_other_libraries_are_kept(head, tmp_path):
    shapes = {"weight": (1, 32), "bias": (1,), "mean": (), "std": ()}
    added = {key: torch.randn(shapes[key.rsplit(".", 1)[-1]]) for key in head}
    saved(built(Qwen2Config(**DECODER), AutoModelForCausalLM), tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), **added}, path, metadata={"format": "pt"})
    weight, bias = head_of(started(str(tmp_path)))
    assert torch.equal(weight, added[head[0]])
    assert torch.equal(bias, added.get("v_head.summary.bias", torch.zeros(1)))


@pytest.mark.parametrize("as_folder", [True, False])
@pytest.mark.parametrize(
    "config, names",
    [
        (Qwen2Config(**DECODER, num_labels=2), "score.weight"),
        (BertConfig(**ENCODER, num_labels=1), "classifier.bias, classifier.weight"),
        (DebertaV2Config(**ENCODER, num_labels=1), "classifier.bias, classifier.weight, pooler.dense.bias"),
        (
            DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=300, num_labels=1),
            "pre_classifier",
        ),
    ],
)
def test_a_head_that_does_not_fit_is_left_out_and_said(config, names, as_folder, tmp_path):
    general = built(config, AutoModelForSequenceClassification)
    with pytest.warns(UserWarning, match=f"its head is left out .*{names}.* and a new one is drawn"):
        started(saved(general, tmp_path) if as_folder else general)


@pytest.mark.parametrize(
    "config, auto",
    [
        (Qwen2Config(**DECODER), AutoModelForCausalLM),
        (BertConfig(**ENCODER), AutoModelForMaskedLM),
        (RobertaConfig(**ENCODER), AutoModelForMaskedLM),
        (DebertaV2Config(**ENCODER), AutoModelForMaskedLM),
    ],
)
def test_the_heads_of_pretraining_are_no_loss(config, auto, tmp_path, recwarn):
    started(saved(built(config, auto), tmp_path))
    assert not [warning for warning in recwarn if "head" in str(warning.message)]


# Models of this package.


@pytest.mark.parametrize("as_folder", [True, False])
@pytest.mark.parametrize("points", [[], TASKS["chitchat"]])
@torch.no_grad()
def test_a_model_with_one_task_gives_its_base_and_head(points, as_folder, tmp_path):
    before = make_dmoerm(make_tokenizer(), {"chitchat": points})
    expected = base_reward_model(before, "chitchat")
    model = started(saved(before, tmp_path) if as_folder else before, lora_rank=4, activation="sigmoid")
    assert list(model.config.tasks) == ["t"]
    assert not [name for name, _ in model.named_parameters() if "lora_" in name or "base_layer" in name]
    inner = expected.model.inner_models["chitchat"]
    inner.reward_mean.fill_(0)  # that of the model before is not taken
    inner.reward_std.fill_(1)
    ids, mask = padded(texts(), 0)
    lengths = mask.sum(1) - 1
    expected = expected(ids, mask, prompt_lengths=lengths).logits
    torch.testing.assert_close(model(ids, mask, prompt_lengths=lengths).logits, expected, atol=1e-6, rtol=0)


def test_a_model_of_several_tasks_is_an_error_with_the_way_out_which_works(dmoerm, tmp_path):
    with pytest.raises(
        ValueError, match=r"of the tasks \['story writing', 'chitchat', 'maths'\], need one base.*base_reward_model"
    ):
        started(saved(dmoerm, tmp_path / "whole"))
    weight = dmoerm.model.inner_models["maths"].base_head.weight
    part = saved(base_reward_model(dmoerm, "maths"), tmp_path / "part")
    assert torch.equal(head_of(started(part))[0], weight)
    with pytest.raises(ValueError, match="got a router, need a model"):
        started(saved(dmoerm.model.router, tmp_path / "router"))


def test_a_router_starts_from_the_text_part_or_the_base_of_what_it_is_given(tokenizer, tmp_path):
    rows = [PreferenceRow(f"Hello {n}", ["a", "b"], [1, 2], task="ab"[n % 2]) for n in range(8)]
    config = Gemma3Config(
        text_config={**WIDE, "vocab_size": len(tokenizer), "num_hidden_layers": 2}, vision_config=VISION
    )
    for name, base in (("multimodal", built(config)), ("inner", make_inner(tokenizer))):
        args = RankedRewardConfig(
            str(tmp_path / f"{name} run"), max_steps=1, eval_steps=1, report_to="none", bf16=False, use_cpu=True
        )
        folder = saved(base, tmp_path / name)
        router, _ = train_router(folder, ["a", "b"], rows, rows, Formatter(tokenizer, 64), args, num_layers=1)
        router.save_pretrained(tmp_path / f"{name} router")
        again = type(router).from_pretrained(tmp_path / f"{name} router")
        assert len(again.backbone.layers) == again.config.router_config.num_hidden_layers == 1
        ids, mask = padded(texts(), 0)
        torch.testing.assert_close(again.probabilities(ids, mask), router.probabilities(ids, mask), atol=1e-6, rtol=0)


# What is no whole model in full precision in safetensors.


def test_an_adapter_is_an_error(inner, tmp_path):
    export_expert(inner, "chitchat", "logic", tmp_path)
    with pytest.raises(ValueError, match="got a PEFT adapter, need a whole model.*merge_and_unload"):
        started(str(tmp_path))


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_gguf(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.Q4_1.gguf")


def quantised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )


def as_integers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["layers.0.mlp.up_proj.weight"] = weights["layers.0.mlp.up_proj.weight"].to(torch.int8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "edit, message",
    [
        (as_pickle, "got no safetensors but pytorch_model.bin, a pickle, need.*convert it once"),
        (lambda folder: (folder / "model.safetensors").unlink(), "got no safetensors, need"),
        (as_gguf, "got a GGUF file, need safetensors"),
        (quantised, "got a quantised checkpoint, need full precision"),
        (as_integers, r"got the weight 'layers.0.mlp.up_proj.weight' as integers \(I8\), need floating-point"),
    ],
)
def test_weights_in_another_form_are_an_error(edit, message, tmp_path):
    saved(make_backbone(make_tokenizer()), tmp_path)
    edit(tmp_path)
    with pytest.raises(ValueError, match=message):
        started(str(tmp_path))


def test_a_part_that_a_saved_model_could_not_be_built_with_again_is_an_error(tokenizer):
    backbone = AutoModel.from_config(qwen2_config(tokenizer))
    backbone.layers[0].mlp.gate_proj.bias = torch.nn.Parameter(torch.zeros(64))
    with pytest.raises(ValueError, match="weights are not those .such as 'layers.0.mlp.gate_proj.bias'"):
        started(backbone)
