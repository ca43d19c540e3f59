"""Learned positions: how many tokens a backbone has them for."""

import pytest
import torch
from transformers import AutoModel, BertConfig, GPT2Config, OPTConfig, PreTrainedConfig, Qwen2Config, RobertaConfig

from dmoerm_trl.modeling.positions import check_positions, longest_text

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
LEARNED: list[PreTrainedConfig] = [
    BertConfig(**SIZES, max_position_embeddings=32),
    RobertaConfig(**SIZES, max_position_embeddings=34, pad_token_id=1),
    GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0),
    OPTConfig(
        vocab_size=50,
        hidden_size=16,
        word_embed_proj_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=16,
        max_position_embeddings=32,
    ),
]


@pytest.mark.parametrize("config", LEARNED, ids=lambda config: config.model_type)
def test_a_text_of_so_many_tokens_is_read_and_of_one_more_is_not(config):
    backbone = AutoModel.from_config(config)
    assert longest_text(backbone) == 32
    text = torch.full((1, 32), 5)
    assert backbone(text).last_hidden_state.shape == (1, 32, 16)
    with pytest.raises((IndexError, RuntimeError)):
        backbone(torch.full((1, 33), 5))
    check_positions(backbone, "the base", 32)
    with pytest.raises(
        ValueError, match="got max_length=33, need at most 32, because the base has positions for so many tokens"
    ):
        check_positions(backbone, "the base", 33)


def test_rotary_positions_have_no_limit():
    backbone = AutoModel.from_config(Qwen2Config(**SIZES, num_key_value_heads=2, max_position_embeddings=32))
    assert longest_text(backbone) is None
    check_positions(backbone, "the base", 10**6)
