"""Scoring many texts: the same numbers whatever the batches, and every shared prompt through the model once."""

from types import SimpleNamespace

import pytest
import torch
from models import PROMPTS, RESPONSES, bert_config, chat, make_dmoerm, padded, score_one
from transformers import pipeline

from dmoerm_trl.cli import main
from dmoerm_trl.data.formatting import Encoding, Formatter
from dmoerm_trl.data.rows import PreferenceRow
from dmoerm_trl.modeling import embedding
from dmoerm_trl.modeling.finite import nan_allowed
from dmoerm_trl.modeling.modeling_dmoerm import DMoERMForSequenceClassification
from dmoerm_trl.scoring.batch import (
    map_encodings,
    points_of,
    score_capabilities,
    score_encodings,
    score_rows,
)
from dmoerm_trl.scoring.describe import describe
from dmoerm_trl.scoring.reward_functions import TextRewards, gold_rewards
from dmoerm_trl.scoring.reward_models import ScorerSpec

RESPONSES_OF_EACH = [text + ending for text in RESPONSES for ending in ("", " Well.", " And so on, and so on.")]


@pytest.fixture
def encodings(tokenizer) -> list[Encoding]:
    """Nine responses to each of three prompts, one after the other."""
    found = []
    for prompt in PROMPTS.values():
        opened = len(tokenizer(chat(tokenizer, prompt)[0]).input_ids)
        for response in RESPONSES_OF_EACH:
            found.append(Encoding(tokenizer(chat(tokenizer, prompt, response)[1].rstrip()).input_ids, opened, 0))
    return found


@pytest.fixture
def rewards(dmoerm, encodings) -> torch.Tensor:
    """Of each text alone."""
    return torch.cat([score_one(dmoerm, encoding).logits[0] for encoding in encodings])


def count_tokens(model) -> list[int]:
    """Grows by the number of tokens that reach an embedding layer of a base, call by call."""
    counts: list[int] = []
    for backbone in model.model.backbones.values():
        backbone.get_input_embeddings().register_forward_hook(lambda _, args, __: counts.append(args[0].numel()))
    return counts


def tokens_once(encodings: list[Encoding]) -> int:
    """Tokens of the texts, the prompts of equal texts counted once."""
    prompts = {tuple(encoding.input_ids[: encoding.prompt_length]) for encoding in encodings}
    responses = sum(len(encoding.input_ids) - encoding.prompt_length for encoding in encodings)
    return sum(map(len, prompts)) + responses


@pytest.mark.parametrize("tokens_per_batch", [1, 70, 300, 16_384])
def test_rewards_do_not_depend_on_the_batches(dmoerm, encodings, rewards, tokens_per_batch):
    found = score_encodings(dmoerm, encodings, pad_token_id=2, tokens_per_batch=tokens_per_batch)
    assert found.shape == (27,) and found.device.type == "cpu" and not found.requires_grad
    torch.testing.assert_close(found, rewards, atol=1e-5 * float(rewards.abs().max()), rtol=0)


def test_rewards_come_back_in_the_order_of_the_texts(dmoerm, encodings, rewards):
    order = torch.randperm(27, generator=torch.Generator().manual_seed(0))
    shuffled = [encodings[index] for index in order.tolist()]
    for tokens_per_batch in (70, 16_384):
        found = score_encodings(dmoerm, shuffled, pad_token_id=2, tokens_per_batch=tokens_per_batch)
        torch.testing.assert_close(found, rewards[order], atol=1e-5 * float(rewards.abs().max()), rtol=0)


def test_scoring_leaves_training_mode(dmoerm, encodings, rewards):
    found = score_encodings(dmoerm.train(), encodings, pad_token_id=2)
    assert not dmoerm.training
    torch.testing.assert_close(found, rewards, atol=1e-5 * float(rewards.abs().max()), rtol=0)


def test_each_prompt_goes_through_its_base_once(dmoerm, encodings):
    score_encodings(dmoerm, encodings, pad_token_id=2)  # tries the bases
    counts = count_tokens(dmoerm)
    score_encodings(dmoerm, encodings, pad_token_id=2)
    assert len(counts) == 3  # one pass a task, for all its experts
    most = tokens_once(encodings)
    # what responses have in common beyond their prompt may be shared too
    assert most - 9 * 3 * 4 <= sum(counts) <= most < 0.6 * sum(len(encoding.input_ids) for encoding in encodings)


def test_texts_of_a_prompt_meet_in_a_pass_wherever_they_stand_in_the_batch(tokenizer, encodings, monkeypatch):
    model = make_dmoerm(tokenizer, {"chitchat": ["logic", "empathy ability"]})
    score_encodings(model, encodings, pad_token_id=2)
    counts = count_tokens(model)
    monkeypatch.setitem(embedding.PASS_TOKENS, "cpu", 180)
    score_encodings(model, encodings[::3] + encodings[1::3] + encodings[2::3], pad_token_id=2)
    longest = max(encoding.prompt_length for encoding in encodings)
    assert len(counts) == 3 and sum(counts) <= tokens_once(encodings) + 2 * longest  # a pass may end within a prompt's


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_in_ppos_padded_batches_are_shared(tokenizer, side):
    """TRL pads queries on the left and the responses after them on the right; several samples of a prompt are in a batch."""
    model = make_dmoerm(tokenizer, {"chitchat": ["logic", "empathy ability"]})
    pad = tokenizer.pad_token_id
    queries = [tokenizer(chat(tokenizer, prompt)[0]).input_ids for prompt in PROMPTS.values()]
    responses = [[*range(20 + 9 * n, 24 + 10 * n), tokenizer.eos_token_id] for n in range(4)]
    pairs = [(query, response) for response in responses for query in queries]
    query_ids, query_mask = padded([query for query, _ in pairs], pad, side="left")
    response_ids, response_mask = padded([response for _, response in pairs], pad)
    ids, mask = torch.cat([query_ids, response_ids], 1), torch.cat([query_mask, response_mask], 1)
    if side == "right":
        ids, mask = padded([query + response for query, response in pairs], pad)
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([query + response])).logits for query, response in pairs])
        counts = count_tokens(model)
        found = model(ids, mask).logits
    assert sum(counts) == sum(map(len, queries)) + 3 * sum(map(len, responses))
    torch.testing.assert_close(found, alone, atol=1e-5 * float(alone.abs().max()), rtol=0)


def test_prompts_of_an_encoder_are_not_shared(tokenizer, encodings):
    arguments = {"backbone_config": bert_config(tokenizer), "lora_target_modules": ["query", "value"]}
    model = make_dmoerm(tokenizer, {"chitchat": ["logic", "empathy ability"]}, **arguments)
    alone = torch.cat([score_one(model, encoding).logits[0] for encoding in encodings])
    counts = count_tokens(model)
    found = score_encodings(model, encodings, pad_token_id=2)
    assert sum(counts) == sum(len(encoding.input_ids) for encoding in encodings)
    torch.testing.assert_close(found, alone, atol=1e-5 * float(alone.abs().max()), rtol=0)


def test_rows_are_scored_response_by_response(dmoerm, tokenizer):
    rows = [
        PreferenceRow(
            [{"role": "user", "content": prompt}], RESPONSES[: 2 + number % 2], [1, 2, 3][: 2 + number % 2], task
        )
        for number, (task, prompt) in enumerate(PROMPTS.items())
    ]
    formatter = Formatter(tokenizer, 256)
    found = score_rows(dmoerm, rows, formatter, tokens_per_batch=60)
    assert [len(row) for row in found] == [2, 3, 2]
    for row, scores in zip(rows, found, strict=True):
        (texts,), _ = formatter.encode_rows([row])
        for text, score in zip(texts, scores, strict=True):
            assert score == pytest.approx(float(score_one(dmoerm, text).logits), abs=1e-5)


def test_a_function_gets_padded_texts_and_its_results_are_put_in_order():
    encodings = [Encoding([7] * length, 1, 0) for length in (5, 2, 9, 4)]
    batches = []

    def lengths(input_ids, attention_mask, prompt_lengths):
        batches.append(input_ids.shape)
        assert torch.equal(input_ids, torch.where(attention_mask == 1, 7, 3)) and (prompt_lengths == 1).all()
        return torch.stack([attention_mask.sum(1), prompt_lengths], 1).double()

    found = map_encodings(lengths, encodings, pad_token_id=3, tokens_per_batch=8)
    assert found.tolist() == [[5, 1], [2, 1], [9, 1], [4, 1]] and found.dtype == torch.float64
    assert len(batches) > 1


def test_what_texts_share_counts_for_a_model_that_does_not_share_it():
    encodings = [Encoding([7] * 100 + [8] * number, 100, 0) for number in range(1, 21)]
    sizes = {True: [], False: []}
    for share, found in sizes.items():

        def count(input_ids, attention_mask, prompt_lengths, found=found):
            found.append(input_ids.numel())
            return input_ids[:, 0]

        map_encodings(count, encodings, pad_token_id=3, tokens_per_batch=400, share=share)
    assert max(sizes[False]) <= 400 < max(sizes[True])


def test_no_texts_are_an_error(dmoerm):
    with pytest.raises(ValueError, match="got no texts, need at least one"):
        score_encodings(dmoerm, [], pad_token_id=2)


def test_processes_that_divide_the_texts_differently_are_an_error(dmoerm, encodings, tokenizer, monkeypatch):
    monkeypatch.setattr("dmoerm_trl.scoring.batch.gather_object", lambda parts: parts)  # the other's are missing
    processes = SimpleNamespace(num_processes=2, process_index=0, is_main_process=True)
    options = {"pad_token_id": tokenizer.pad_token_id, "tokens_per_batch": 200, "processes": processes}
    with pytest.raises(RuntimeError, match="got processes that divide the texts differently"):
        map_encodings(lambda ids, mask, lengths: lengths, encodings, **options)


# Rewards that are no numbers.


@pytest.fixture
def overflowing(tokenizer, tmp_path):
    """A folder whose finite weights overflow in half precision, as those of some public models do."""
    model = make_dmoerm(tokenizer)
    for base in model.model.backbones.values():
        base.norm.weight.data.fill_(60_000.0)
        for layer in base.layers:
            layer.post_attention_layernorm.weight.data.mul_(3e3)
    model.half().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


REFUSED = r"got (the score|reward) nan for .*, need a number, because .*: load the reward model in float32 or bfloat16"


@pytest.fixture
def half(overflowing) -> DMoERMForSequenceClassification:
    return DMoERMForSequenceClassification.from_pretrained(overflowing)


def ways_to_a_reward(folder, model, formatter) -> dict:
    """Name -> a call that gives one reward or more."""
    prompt, responses = [{"role": "user", "content": "Hi?"}], ["All is well.", "No."]
    encodings = [formatter.encode(prompt, response) for response in responses]
    row = PreferenceRow(prompt, responses, [1, 2], "maths")
    pad = formatter.tokenizer.pad_token_id

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([encodings[0].input_ids])).logits

    def by_pipeline() -> list:
        return pipeline("text-classification", model=model, tokenizer=formatter.tokenizer)(
            chat(formatter.tokenizer, "Hi?", "All is well.")[1]
        )

    return {
        "score_encodings": lambda: score_encodings(model, encodings, pad_token_id=pad),
        "score_rows": lambda: score_rows(model, [row], formatter),
        "score_one": lambda: score_one(model, encodings[0]),
        "score_capabilities": lambda: score_capabilities(model, encodings, pad_token_id=pad),
        "describe": lambda: describe(model, formatter, [(prompt, response) for response in responses]),
        "TextRewards": lambda: TextRewards(model, formatter)([prompt, prompt], responses),
        "ScorerSpec": lambda: ScorerSpec(str(folder), dtype="float16").load()({"prompt": prompt}, responses),
        "forward": forward,
        "pipeline": by_pipeline,
        "dmoerm score": lambda: main(["score", "--model", str(folder), "--prompt", "Hi?", "--response", "No."]),
        "gold_rewards": lambda: gold_rewards("test_batch:no_number", [{"prompt": prompt}], max_length=64)(
            [prompt], ["No."]
        ),
    }


def no_number(*, response: str, **_: object) -> float:
    return float("nan")


WAYS = ["score_encodings", "score_rows", "score_one", "score_capabilities", "describe", "TextRewards", "ScorerSpec",
        "forward", "pipeline", "dmoerm score"]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_a_reward_refuses_one_that_is_no_number(overflowing, half, tokenizer, way, recwarn, capsys):
    formatter = Formatter(tokenizer, 256)
    with pytest.raises(ValueError, match=REFUSED):
        ways_to_a_reward(overflowing, half, formatter)[way]()
    assert "NaN" not in capsys.readouterr().out
    assert not [warning for warning in recwarn if "The rewards are right" in str(warning.message)]
    whole = DMoERMForSequenceClassification.from_pretrained(overflowing, dtype="float32")
    if way not in ("ScorerSpec", "dmoerm score"):
        ways_to_a_reward(overflowing, whole, formatter)[way]()


def test_the_response_is_named(half, tokenizer):
    formatter = Formatter(tokenizer, 256)
    with pytest.raises(ValueError, match="got reward nan for the response 'All is well.' and 1 more, need a number"):
        ways_to_a_reward(None, half, formatter)["score_rows"]()


def test_a_function_that_returns_no_number_is_to_be_mended(half, tokenizer):
    with pytest.raises(ValueError, match="got the score nan for the response 'No.'.*: fix what test_batch:no_number"):
        ways_to_a_reward(None, half, Formatter(tokenizer, 256))["gold_rewards"]()


def test_a_gradient_may_be_taken_of_whatever_comes(half, tokenizer):
    """A diverged training is the trainer's to see."""
    ids = torch.tensor([tokenizer(chat(tokenizer, "Hi?", "No.")[1]).input_ids])
    assert half(ids).logits.isnan().all()
    with torch.no_grad(), nan_allowed():
        assert half(ids).logits.isnan().all()


def test_a_score_of_a_point_may_be_missing_but_not_broken(dmoerm, tokenizer):
    formatter = Formatter(tokenizer, 256)
    encodings = [formatter.encode([{"role": "user", "content": prompt}], "Well.") for prompt in PROMPTS.values()]
    options = {"pad_token_id": tokenizer.pad_token_id, "responses": ["Well."] * 3}
    found = score_capabilities(dmoerm, encodings, **options)
    points = points_of(dmoerm)
    for route, scores in zip(found.routes.tolist(), found.scores, strict=True):
        own = list(dmoerm.config.tasks.values())[route]
        assert [point in own for point in points] == (~scores.isnan()).tolist()
    inner = dmoerm.model.inner_models["maths"]
    next(iter(inner.expert_heads.parameters())).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="got score for 'correctness' nan for the response 'Well.', need a number"):
        score_capabilities(dmoerm, encodings, **options)


def test_a_router_that_gives_no_probability_is_an_error(dmoerm, tokenizer, encodings):
    for weight in dmoerm.model.router.parameters():
        weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="got probabilities of the router nan for text 1 of 27"):
        score_encodings(dmoerm, encodings, pad_token_id=tokenizer.pad_token_id)
