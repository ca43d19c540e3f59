"""A task's base and its experts as ordinary files of transformers and PEFT."""

import pytest
import torch
from models import PROMPTS, RESPONSES, bert_config
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertModel

from dmoerm_trl import DMoERMForSequenceClassification, Formatter, base_reward_model, inner_model
from dmoerm_trl.scoring.export import export_adapter, export_reward_model, logit_shift, sequence_classifier

TASK = "chitchat"


def chats(tokenizer) -> list[str]:
    """Whole chats as any client renders them."""
    turns = [
        [{"role": "user", "content": PROMPTS[TASK]}, {"role": "assistant", "content": text}] for text in RESPONSES
    ]
    return [tokenizer.apply_chat_template(chat, tokenize=False) for chat in turns]


def logits_of(model, tokenizer) -> torch.Tensor:
    batch = tokenizer(chats(tokenizer), padding=True, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]


@torch.no_grad()
def own_output(model: DMoERMForSequenceClassification, tokenizer):
    formatter = Formatter.for_model(model.config, tokenizer, 200)
    return model(**formatter.batch([PROMPTS[TASK]] * len(RESPONSES), RESPONSES))


def logit(share: torch.Tensor) -> torch.Tensor:
    return torch.log(share / (1 - share))


@pytest.fixture
def exported(dmoerm, tokenizer, tmp_path):
    export_reward_model(dmoerm, TASK, tmp_path / "base", tokenizer)
    return tmp_path / "base"


def test_the_exported_base_has_the_logits_of_the_base_without_its_bias(dmoerm, tokenizer, exported):
    rewards = own_output(base_reward_model(dmoerm, TASK), tokenizer).logits[:, 0]  # sigmoid, not normalised
    found = logits_of(
        AutoModelForSequenceClassification.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    )
    torch.testing.assert_close(found + logit_shift(dmoerm, TASK), logit(rewards), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("point", ["empathy ability", "logic", "情感"])
def test_an_exported_expert_is_loaded_by_peft_with_no_key_missing(
    point, dmoerm, tokenizer, exported, tmp_path, recwarn
):
    export_adapter(dmoerm, TASK, point, tmp_path / "expert", base=exported)
    base = AutoModelForSequenceClassification.from_pretrained(exported)
    adapted = PeftModel.from_pretrained(base, tmp_path / "expert")
    assert not [str(one.message) for one in recwarn if "missing" in str(one.message)]
    scores = own_output(inner_model(dmoerm, TASK), tokenizer).capability_scores[point]
    tokenizer_of_export = AutoTokenizer.from_pretrained(exported)
    found = logits_of(adapted.eval(), tokenizer_of_export)
    torch.testing.assert_close(found + logit_shift(dmoerm, TASK, point), logit(scores), atol=1e-4, rtol=1e-4)
    merged = logits_of(adapted.merge_and_unload().eval(), tokenizer_of_export)
    torch.testing.assert_close(merged, found, atol=1e-4, rtol=1e-4)


def test_a_padding_token_that_ends_turns_is_refused(dmoerm, tokenizer, tmp_path):
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ValueError, match="which ends a turn too, need one of its own"):
        export_reward_model(dmoerm, TASK, tmp_path, tokenizer)


def test_an_encoder_is_refused(tokenizer):
    encoder = DMoERMForSequenceClassification.from_base(BertModel(bert_config(tokenizer)), task=TASK)
    with pytest.raises(ValueError, match="got a base of the architecture 'bert', need a decoder"):
        sequence_classifier(encoder, TASK)


def test_an_unknown_point_is_named(dmoerm, tmp_path):
    with pytest.raises(ValueError, match="got the capability point 'wit' of the task 'chitchat', need one of"):
        export_adapter(dmoerm, TASK, "wit", tmp_path, base="base")


@pytest.mark.parametrize("around", [("", ""), ("\n  \n", ""), ("  ", "\n"), ("", "  \n")])
def test_the_exported_chat_template_ends_with_the_turn_and_opens_a_response_as_before(
    around, dmoerm, tokenizer, tmp_path
):
    tokenizer.chat_template = around[0] + tokenizer.chat_template + around[1]
    export_reward_model(dmoerm, TASK, tmp_path, tokenizer)
    chat = [{"role": "user", "content": " Hello \n"}, {"role": "assistant", "content": "Hi  "}]
    own = AutoTokenizer.from_pretrained(tmp_path)
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert own.apply_chat_template(chat, tokenize=False) == whole.rstrip() != whole
    options = {"tokenize": False, "add_generation_prompt": True}
    assert own.apply_chat_template(chat[:1], **options) == tokenizer.apply_chat_template(chat[:1], **options)


def test_text_after_the_last_turn_is_refused(dmoerm, tokenizer, tmp_path):
    tokenizer.chat_template += "That was all."
    with pytest.raises(ValueError, match="writes .*That was all.* after the last turn, need nothing but white space"):
        export_reward_model(dmoerm, TASK, tmp_path, tokenizer)
