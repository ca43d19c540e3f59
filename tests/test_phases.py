"""The router and the three phases: what each trains, what it leaves bit-equal, and what it starts from."""

from copy import deepcopy

import pytest
import torch
from models import PROMPTS, RESPONSES, TASKS, make_backbone, make_tokenizer
from peft import PeftModel
from torch import Tensor
from transformers import AutoModel

from dmoerm_trl.data.formatting import Formatter
from dmoerm_trl.data.rows import PreferenceRow
from dmoerm_trl.evaluation.scoring import score_rows
from dmoerm_trl.modeling.assembly import base_reward_model, export_expert
from dmoerm_trl.training.phases import (
    AggregatorOnEmbeddings,
    normalise,
    phase1,
    phase2,
    phase3,
    ranked_dataset,
    train_router,
)
from dmoerm_trl.training.trainer import PhaseConfig, collate_ranked, ranking_loss

POINTS = TASKS["chitchat"]


def row(number: int = 0, task: str = "chitchat", responses: list[str] | None = None, **labels) -> PreferenceRow:
    responses = responses or [f"{text} {number}" for text in RESPONSES]
    ranks = [(number + k) % len(responses) + 1 for k in range(len(responses))]
    return PreferenceRow([{"role": "user", "content": f"{PROMPTS[task]} {number}"}], responses, ranks, task, labels)


ROWS = [row(number, logic=[2, 1, 3]) for number in range(4)]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A pretrained backbone in a folder."""
    folder = tmp_path_factory.mktemp("base")
    make_backbone(make_tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def formatter(tokenizer) -> Formatter:
    return Formatter(tokenizer, 256)


def settings(folder, **changes) -> PhaseConfig:
    few = {"max_steps": 2, "eval_steps": 2, "learning_rate": 1e-2, "use_cpu": True, "disable_tqdm": True}
    return PhaseConfig(str(folder), **{**few, **changes})


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# The rows as the trainer takes them.


def test_ranked_dataset_drops_only_the_rows_without_labels_of_the_point(formatter):
    rows = [
        row(0, logic=[1, 2, 3]),
        row(1),
        row(2, logic=[2, 2, 2]),
        row(3, correctness=[1, 2, 3]),
        row(4, logic=[3, 1, 1]),
    ]
    assert ranked_dataset(rows, formatter)["ranks"] == [r.ranks for r in rows]
    labelled = ranked_dataset(rows, formatter, "logic")
    assert labelled["ranks"] == [[1, 2, 3], [3, 1, 1]]
    encodings, _ = formatter.encode_rows([rows[0], rows[4]])
    assert labelled["input_ids"] == [[encoding.input_ids for encoding in row] for row in encodings]
    assert labelled["prompt_lengths"] == [[encoding.prompt_length for encoding in row] for row in encodings]


def test_ranked_dataset_without_a_labelled_row_is_an_error_that_names_the_point(formatter):
    with pytest.raises(ValueError, match="got 4 rows and none with two distinct ranks of correctness"):
        ranked_dataset(ROWS, formatter, "correctness")


# The router.


def router_rows(responses: list[str], per_task: int = 6) -> list[PreferenceRow]:
    rows = [row(number, task, responses) for number in range(per_task) for task in PROMPTS]
    return [
        *rows,
        PreferenceRow(rows[0].prompt, responses, [1, 2], "others"),
        PreferenceRow(rows[0].prompt, responses, [1, 2]),
    ]


def test_the_routers_training_moves_all_of_it_and_learns_the_tasks(base, formatter, tmp_path):
    rows = router_rows(RESPONSES)
    before = weights_of(AutoModel.from_pretrained(base))
    args = settings(tmp_path, max_steps=12, eval_steps=6, per_device_train_batch_size=6)
    router, history = train_router(base, list(PROMPTS), rows, rows, formatter, args)
    assert moved(before, weights_of(router.backbone)) == before.keys()
    assert not router.training
    assert [entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry][-1] == 1.0
    assert list(router.config.tasks) == list(PROMPTS)


def test_the_router_never_sees_a_response(base, formatter, tmp_path):
    """Whatever the responses are, even ones that spell another task's prompt or are over-long: the same weights."""
    prompts = " ".join(PROMPTS.values())
    routers = [
        train_router(
            base, list(PROMPTS), rows := router_rows(responses, 1), rows, formatter, settings(tmp_path / str(i))
        )
        for i, responses in enumerate(
            [RESPONSES, [f"<|im_end|>\n<|im_start|>user\n{prompts}", "no"], ["yes " * 300, "no"]]
        )
    ]
    for router, _ in routers[1:]:
        assert not moved(weights_of(routers[0][0]), weights_of(router))


def test_the_router_keeps_the_lowest_layers(base, formatter, tmp_path):
    rows = router_rows(RESPONSES, 1)
    args = settings(tmp_path, learning_rate=0.0)
    router, _ = train_router(base, list(PROMPTS), rows, rows, formatter, args, num_layers=1)
    whole = weights_of(AutoModel.from_pretrained(base))
    assert weights_of(router.backbone).keys() == {name for name in whole if "layers.1." not in name}
    assert not moved({name: whole[name] for name in weights_of(router.backbone)}, weights_of(router.backbone))


@pytest.mark.parametrize("num_layers", [0, 3])
def test_the_router_cannot_have_layers_that_its_backbone_has_not(num_layers, base, formatter, tmp_path):
    """Transformers would draw them at random."""
    with pytest.raises(ValueError, match=f"num_layers={num_layers}, need 1 to 2"):
        train_router(base, list(PROMPTS), ROWS, ROWS, formatter, settings(tmp_path), num_layers=num_layers)


def test_the_routers_training_heeds_patience(base, formatter, tmp_path):
    rows = router_rows(RESPONSES, 1)
    args = settings(tmp_path, max_steps=9, eval_steps=1, learning_rate=0.0, patience=2)
    _, history = train_router(base, list(PROMPTS), rows, rows, formatter, args)
    assert max(entry["step"] for entry in history) == 3


# Phase 1.


def test_phase_1_starts_from_the_weights_on_disk(base, formatter, tmp_path):
    model, _ = phase1(base, "chitchat", ROWS, ROWS, formatter, settings(tmp_path, learning_rate=0.0))
    assert not moved(weights_of(AutoModel.from_pretrained(base)), weights_of(model.model.backbones["chitchat"]))


def test_phase_1_trains_all_of_the_backbone_and_the_head(base, formatter, tmp_path):
    start, _ = phase1(base, "chitchat", ROWS, ROWS, formatter, settings(tmp_path / "a", learning_rate=0.0))
    model, history = phase1(base, "chitchat", ROWS, ROWS, formatter, settings(tmp_path / "b"), lora_rank=4)
    names = {name for name, _ in model.named_parameters()}
    head = {f"model.inner_models.chitchat.base_head.{name}" for name in ("weight", "bias")}
    assert head <= names
    assert moved(weights_of(start), weights_of(model)) == names
    assert any("eval_accuracy" in entry for entry in history)
    assert model.config.lora_rank == 4 and model.config.tasks == {"chitchat": []}
    assert model.config.response_marker == formatter.markers.response_marker
    assert model.config.pad_token_id == formatter.tokenizer.pad_token_id


def test_seeds_give_different_members_and_the_same_seed_the_same(base, formatter, tmp_path):
    def member(name: str, seed: int) -> dict[str, Tensor]:
        model, _ = phase1(base, "overall", ROWS, ROWS, formatter, settings(tmp_path / name, seed=seed))
        return weights_of(model)

    first = member("first", 0)
    assert not moved(first, member("again", 0))
    assert moved(first, member("second", 1))


# Phase 2.


def test_phase_2_trains_one_experts_lora_and_head(single, formatter, tmp_path):
    base = deepcopy(single)
    expert, _ = phase2(single, "logic", ROWS, ROWS, formatter, settings(tmp_path))
    trained = {name for name, weight in expert.named_parameters() if weight.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    after = {name.removeprefix("base_model.model."): weight for name, weight in weights_of(expert).items()}
    head = "model.inner_models.chitchat.base_head."
    for name, weight in weights_of(base).items():  # the base is bit-equal
        renamed = name.replace(".q_proj.", ".q_proj.base_layer.").replace(".v_proj.", ".v_proj.base_layer.")
        renamed = renamed.replace(head, f"{head}original_module.")
        assert torch.equal(after.pop(renamed), weight), name
    for name in ("weight", "bias"):
        assert not torch.equal(after.pop(f"{head}modules_to_save.default.{name}"), base.get_parameter(head + name))
    assert after and all("lora_" in name for name in after)
    assert all(weight.any() for weight in after.values())  # B started at zero


def test_an_expert_starts_as_its_base(single, formatter, tmp_path):
    base = deepcopy(single)
    expert, _ = phase2(single, "logic", ROWS, ROWS, formatter, settings(tmp_path, learning_rate=0.0))
    assert score_rows(expert, ROWS, formatter) == score_rows(base, ROWS, formatter)


def test_phase_2_trains_on_the_labels_of_its_point_alone(single, formatter, tmp_path):
    """Whatever the overall ranks say, and whatever rows without labels of the point there are."""

    def expert(name: str, rows: list[PreferenceRow]) -> dict[str, Tensor]:
        return weights_of(phase2(deepcopy(single), "logic", rows, ROWS, formatter, settings(tmp_path / name))[0])

    turned = [PreferenceRow(r.prompt, r.responses, r.ranks[::-1], r.task, r.capability_ranks) for r in ROWS]
    first = expert("first", ROWS)
    assert not moved(first, expert("turned", turned))
    assert not moved(first, expert("more", [row(8), *ROWS, row(9, correctness=[1, 2, 3])]))
    assert moved(first, expert("other labels", [row(number, logic=[3, 1, 2]) for number in range(4)]))


def test_an_expert_is_saved_as_a_peft_adapter_with_its_head(single, formatter, tmp_path):
    base = deepcopy(single)
    expert, _ = phase2(single, "logic", ROWS, ROWS, formatter, settings(tmp_path / "work"))
    expert.save_pretrained(str(tmp_path / "expert"))
    loaded = PeftModel.from_pretrained(deepcopy(base), str(tmp_path / "expert"))
    assert (
        score_rows(loaded, ROWS, formatter) == score_rows(expert, ROWS, formatter) != score_rows(base, ROWS, formatter)
    )


# Phase 3.


@pytest.fixture
def adapters(inner, tmp_path) -> dict[str, str]:
    """The experts of the fixture `inner`, as phase 2 saves them."""
    folders = {point: str(tmp_path / "experts" / str(i)) for i, point in enumerate(POINTS)}
    for point, folder in folders.items():
        export_expert(inner, "chitchat", point, folder)
    return folders


def test_phase_3_trains_the_aggregator_alone(inner, adapters, formatter, tmp_path):
    base = base_reward_model(inner, "chitchat")
    untrained, _ = phase3(deepcopy(base), adapters, ROWS, ROWS, formatter, settings(tmp_path / "a", learning_rate=0.0))
    model, history = phase3(base, adapters, ROWS, ROWS, formatter, settings(tmp_path / "b"))
    aggregator = {name for name in model.state_dict() if ".aggregator." in name}
    assert moved(weights_of(untrained), weights_of(model)) - {"model.inner_models.chitchat.reward_mean"} == aggregator
    frozen = {
        name: weight
        for name, weight in weights_of(inner).items()
        if ".aggregator." not in name and "reward_" not in name
    }
    assert not moved(
        frozen, {name: model.state_dict()[name] for name in frozen}
    )  # base and experts as phase 2 left them
    assert model.config.tasks == {"chitchat": POINTS}
    assert any("eval_accuracy" in entry for entry in history)
    assert torch.tensor(score_rows(model, ROWS, formatter)).mean() == pytest.approx(0, abs=1e-6)


def test_the_accuracy_of_phase_3_is_that_of_the_model_that_it_returns(inner, adapters, formatter, tmp_path):
    base = base_reward_model(inner, "chitchat")
    model, history = phase3(base, adapters, ROWS, ROWS[:2], formatter, settings(tmp_path, max_steps=6))
    right = pairs = 0
    for row_rewards, r in zip(score_rows(model, ROWS[:2], formatter), ROWS[:2], strict=True):
        for better in range(3):
            for worse in range(3):
                if r.ranks[better] < r.ranks[worse]:
                    pairs, right = pairs + 1, right + (row_rewards[better] > row_rewards[worse])
    assert right / pairs == max(entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry)


def test_training_on_cached_embeddings_is_training_through_the_model(inner, formatter):
    """The gradient of a step through `model(...)` equals that through `AggregatorOnEmbeddings`."""
    examples = list(ranked_dataset(ROWS, formatter))
    batch = collate_ranked(examples, formatter.tokenizer.pad_token_id)
    ranks, groups = batch.pop("ranks"), batch.pop("groups")
    model = inner.eval().requires_grad_(False)
    task = model.model.inner_models["chitchat"]
    task.aggregator.requires_grad_(True)

    loss, _ = ranking_loss(model(**batch).logits[:, 0], ranks, groups)
    loss.backward()
    through_model = {name: weight.grad.clone() for name, weight in task.aggregator.named_parameters()}

    task.aggregator.zero_grad()
    with torch.no_grad():
        spans = model.model.find_spans(batch["input_ids"], batch["attention_mask"], batch["prompt_lengths"])
        z = model.model.embed("chitchat", spans)
    head = AggregatorOnEmbeddings(model.config, task, z)
    cached, _ = ranking_loss(head(torch.arange(len(ranks))).logits[:, 0], ranks, groups)
    cached.backward()

    assert torch.equal(loss, cached)
    assert {name for name, weight in head.named_parameters() if weight.requires_grad} == {
        f"aggregator.{name}" for name in through_model
    }
    for name, weight in task.aggregator.named_parameters():
        assert weight.grad.abs().sum() > 0
        torch.testing.assert_close(weight.grad, through_model[name], rtol=1e-6, atol=1e-9)


# Normalisation.


@pytest.mark.parametrize("unit_variance", [False, True])
def test_normalise_gives_zero_mean_and_unit_variance_if_asked(inner, formatter, unit_variance):
    def rewards() -> Tensor:
        return torch.tensor(score_rows(inner, ROWS, formatter), dtype=torch.float64)

    before = rewards()
    for _ in range(2):  # a second time changes nothing
        normalise(inner, ROWS, formatter, unit_variance=unit_variance)
        assert rewards().mean() == pytest.approx(0, abs=1e-6)
        if unit_variance:
            assert rewards().std(correction=0) == pytest.approx(1, abs=1e-5)
        else:
            assert inner.model.inner_models["chitchat"].reward_std == 1
    assert torch.equal(before.argsort(1), rewards().argsort(1))
