"""The router and the three phases: what each trains, what it leaves bit-equal, and what it starts from."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from models import PROMPTS, RESPONSES, TASKS, bert_config, make_backbone, make_tokenizer
from tokenizers.normalizers import NFC
from torch import Tensor
from transformers import AutoModel, TrainerCallback
from transformers.modeling_outputs import SequenceClassifierOutput

from dmoerm_trl.data.formatting import Formatter
from dmoerm_trl.data.rows import PreferenceRow
from dmoerm_trl.modeling.assembly import base_reward_model, export_expert
from dmoerm_trl.modeling.heads import Aggregator
from dmoerm_trl.modeling.modeling_dmoerm import DMoERMForSequenceClassification, DMoERMModel
from dmoerm_trl.modeling.pretrained import DMoERMPreTrainedModel
from dmoerm_trl.scoring.batch import score_rows
from dmoerm_trl.training import aggregator_training, embedding_cache, phases
from dmoerm_trl.training.embedding_cache import embeddings_on_disk
from dmoerm_trl.training.phases import normalise, phase1, phase2, phase3
from dmoerm_trl.training.ranked_config import RankedRewardConfig
from dmoerm_trl.training.ranked_dataset import ranked_dataset
from dmoerm_trl.training.ranked_trainer import RankedRewardTrainer, fit
from dmoerm_trl.training.router_training import routing_metrics, train_router

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


def settings(folder, **changes) -> RankedRewardConfig:
    few = {"max_steps": 2, "eval_steps": 2, "learning_rate": 1e-2, "use_cpu": True, "disable_tqdm": True}
    return RankedRewardConfig(str(folder), **{**few, **changes})


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# The rows as the trainer takes them.


def test_responses_that_are_the_same_tokens_are_not_trained_on(formatter, capsys):
    formatter.tokenizer.backend_tokenizer.normalizer = NFC()
    composed, apart = "Caf\u00e9.", "Cafe\u0301."
    rows = [
        row(0, responses=[composed, apart, "No."], logic=[1, 2, 2]),
        row(1, responses=[composed, apart], logic=[1, 2]),
        row(2, responses=["Same.", "Same."], logic=[1, 2]),
        row(3, responses=["Yes.", "No."], logic=[1, 2]),
    ]
    data = ranked_dataset(rows, formatter)
    assert data["pairs"] == [[[0, 0, 2], [0, 1, 2]], [[0, 1, 0]]]
    assert "2 labelled pairs are not trained on: their responses are the same tokens" in capsys.readouterr().out
    assert ranked_dataset(rows, formatter, ["logic"])["pairs"] == [[[0, 0, 2]], [[0, 0, 1]]]
    with pytest.raises(ValueError, match="got 1 rows and none with a pair of logic"):
        ranked_dataset(rows[1:2], formatter, ["logic"])


def test_ranked_dataset_drops_only_the_rows_without_a_pair_of_the_point(formatter):
    rows = [
        row(0, logic=[1, 2, 3]),
        row(1),
        row(2, logic=[2, 2, 2]),
        row(3, correctness=[1, 2, 3]),
        row(4, logic=[3, 1, 1]),
    ]
    assert ranked_dataset(rows, formatter)["pairs"] == [[[0, *pair] for pair in r.pairs_of()] for r in rows]
    labelled = ranked_dataset(rows, formatter, ["logic"])
    assert labelled["pairs"] == [[[0, 0, 1], [0, 0, 2], [0, 1, 2]], [[0, 1, 0], [0, 2, 0]]]
    encodings, _ = formatter.encode_rows([rows[0], rows[4]])
    assert labelled["input_ids"] == [[encoding.input_ids for encoding in row] for row in encodings]
    assert labelled["prompt_lengths"] == [[encoding.prompt_length for encoding in row] for row in encodings]


def test_ranked_dataset_without_a_labelled_row_is_an_error_that_names_the_point(formatter):
    with pytest.raises(ValueError, match="got 4 rows and none with a pair of correctness, need one.*: label the rows"):
        ranked_dataset(ROWS, formatter, ["logic", "correctness"])


def test_ranked_dataset_of_several_points_keeps_the_rows_with_a_pair_of_some(formatter):
    rows = [row(0, logic=[1, 2, 3]), row(1), row(2, correctness=[2, 1, 1], logic=[1, 1, 1]), row(3, logic=[1, 1, 1])]
    data = ranked_dataset(rows, formatter, ["correctness", "logic"])
    assert data["pairs"] == [[[1, 0, 1], [1, 0, 2], [1, 1, 2]], [[0, 1, 0], [0, 2, 0]]]
    encodings, _ = formatter.encode_rows([rows[0], rows[2]])
    assert data["input_ids"] == [[encoding.input_ids for encoding in row] for row in encodings]


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
    evaluations = [entry for entry in history if "eval_accuracy" in entry]
    assert evaluations[-1]["eval_accuracy"] == evaluations[-1]["eval_macro_f1"] == 1.0
    assert list(router.config.tasks) == list(PROMPTS)


@pytest.mark.parametrize(("balance", "share"), [(0, 5 / 6), (0.5, 5 / (5 + 5**0.5)), (1, 1 / 2)])
def test_the_balance_says_how_much_a_rare_task_weighs(balance, share, base, formatter, tmp_path):
    """Six times the same prompt, five of them of one task: what is learned is that task's share of the loss."""
    rows = [replace(row(0), task=task) for task in 5 * ["chitchat"] + ["maths"]]
    tasks = ["chitchat", "maths", "story writing"]  # the last has no rows
    args = settings(tmp_path, max_steps=40, eval_steps=40, per_device_train_batch_size=6)
    router, _ = train_router(base, tasks, rows, rows, formatter, args, balance=balance)
    encoding = formatter.encode(rows[0].prompt, "")
    prompt = torch.tensor([encoding.input_ids[: encoding.prompt_length]])
    probabilities = router.probabilities(prompt, torch.ones_like(prompt))[0]
    assert float(probabilities[0]) == pytest.approx(share, abs=0.05)
    assert float(probabilities[2]) < 0.05


def test_the_balanced_loss_does_not_depend_on_how_a_step_is_batched(base, formatter, tmp_path):
    rows = router_rows(RESPONSES, 2)[1:6]  # tasks of one row and of two
    histories = []
    for size in (5, 1):
        args = settings(
            tmp_path / str(size),
            max_steps=1,
            eval_steps=1,
            logging_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=5 // size,
        )
        histories.append(train_router(base, list(PROMPTS), rows, rows, formatter, args, balance=1)[1])
    for name in ("loss", "grad_norm"):
        whole, in_parts = (next(entry[name] for entry in history if name in entry) for history in histories)
        assert in_parts == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("balance", [-0.1, 1.1])
def test_a_balance_outside_0_to_1_is_an_error(balance, base, formatter, tmp_path):
    with pytest.raises(ValueError, match=f"got balance={balance}, need 0 .* to 1"):
        train_router(base, list(PROMPTS), ROWS, ROWS, formatter, settings(tmp_path), balance=balance)


def test_routing_metrics_by_hand():
    """F1 of the tasks: 2 / (2 + 1), 2 / (1 + 3), 0 / (1 + 0); task 3 occurs nowhere."""
    metrics = routing_metrics([0, 0, 1, 2], [0, 1, 1, 1])
    assert metrics == {"accuracy": 1 / 2, "macro_f1": pytest.approx((2 / 3 + 1 / 2 + 0) / 3)}


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


def test_the_router_has_no_budget_of_tokens(base, formatter, tmp_path):
    with pytest.raises(ValueError, match="train_tokens_per_batch=100 for the router.*per_device_train_batch_size"):
        train_router(base, list(PROMPTS), ROWS, ROWS, formatter, settings(tmp_path, train_tokens_per_batch=100))


@pytest.mark.parametrize("disabled", [False, True])
def test_the_routers_dropout_can_be_turned_off(disabled, tokenizer, formatter, tmp_path):
    AutoModel.from_config(bert_config(tokenizer)).save_pretrained(tmp_path / "encoder")
    args = settings(tmp_path, disable_dropout=disabled)
    rows = router_rows(RESPONSES, per_task=1)
    router, _ = train_router(str(tmp_path / "encoder"), list(PROMPTS), rows, rows, formatter, args)
    shares = {module.p for module in router.modules() if isinstance(module, torch.nn.Dropout)}
    assert shares == ({0.0} if disabled else {0.1})


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


# Phase 2; how experts are trained together is in test_experts_training.py.


def test_phase_2_gives_a_model_with_the_experts_and_their_histories(single, formatter, tmp_path):
    rows = [row(number, logic=[2, 1, 3], correctness=[1, 2, 3]) for number in range(4)]
    model, histories = phase2(single, ["correctness", "logic"], rows, ROWS + rows, formatter, settings(tmp_path))
    assert model.config.tasks == {"chitchat": ["correctness", "logic"]} and not model.training
    assert set(histories) == {"correctness", "logic"}
    for history in histories.values():
        (evaluation,) = [entry for entry in history if "eval_accuracy" in entry]
        assert evaluation["step"] == 2 and {"eval_loss", "eval_margin", "epoch"} <= evaluation.keys()


def test_experts_start_as_their_base(single, formatter, tmp_path):
    head = single.model.inner_models["chitchat"]
    encodings = [encoding for row in formatter.encode_rows(ROWS)[0] for encoding in row]
    texts = [torch.tensor([encoding.input_ids]) for encoding in encodings]
    expected = [(single(text).logits[0, 0] * head.reward_std + head.reward_mean).item() for text in texts]
    model, _ = phase2(single, ["logic"], ROWS, ROWS, formatter, settings(tmp_path, learning_rate=0.0))
    assert [model(text).capability_scores["logic"].item() for text in texts] == pytest.approx(expected, abs=1e-6)


def test_phase_2_trains_on_the_labels_of_its_point_alone(single, formatter, tmp_path):
    """Whatever the overall ranks say, and whatever rows without labels of the point there are."""

    def expert(name: str, rows: list[PreferenceRow]) -> dict[str, Tensor]:
        model, _ = phase2(deepcopy(single), ["logic"], rows, ROWS, formatter, settings(tmp_path / name))
        return {name: weight for name, weight in weights_of(model).items() if "aggregator" not in name}

    turned = [replace(r, ranks=r.ranks[::-1]) for r in ROWS]
    first = expert("first", ROWS)
    assert not moved(first, expert("turned", turned))
    assert not moved(first, expert("more", [row(8), *ROWS, row(9, correctness=[1, 2, 3])]))
    assert moved(first, expert("other labels", [row(number, logic=[3, 1, 2]) for number in range(4)]))


# Phase 3.


@pytest.fixture
def adapters(inner, tmp_path) -> dict[str, str]:
    """The experts of the fixture `inner`, as phase 2 saves them."""
    folders = {point: str(tmp_path / "experts" / str(i)) for i, point in enumerate(POINTS)}
    for point, folder in folders.items():
        export_expert(inner, "chitchat", point, folder)
    return folders


@pytest.mark.parametrize(
    "aggregator_input, members", [("embeddings", 1), ("embeddings", 2), ("scores", 1), ("scores", 3)]
)
def test_phase_3_trains_the_aggregator_alone(inner, adapters, formatter, tmp_path, aggregator_input, members):
    base = base_reward_model(inner, "chitchat")
    base.config.aggregator_input, base.config.aggregator_members = aggregator_input, members
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


def test_aggregators_are_validated_on_prompts_of_their_own_and_averaged(
    inner, adapters, formatter, tmp_path, monkeypatch
):
    """Each is what phase 3 makes of the rows that the others validate, with a seed of its own."""
    base, seen = base_reward_model(inner, "chitchat"), []
    base.config.aggregator_input = "scores"
    twice = [replace(ROWS[0], responses=["a", "b", "c"])]  # a prompt that is there already
    monkeypatch.setattr(aggregator_training, "fit", lambda *given: seen.append(given) or fit(*given))
    base.config.aggregator_members = 2
    rows = [*ROWS, *twice]
    model, _ = phase3(deepcopy(base), adapters, rows[:3], rows[3:], formatter, settings(tmp_path, max_steps=6))
    texts = [[[tuple(row["texts"]) for row in dataset] for dataset in given[2:4]] for given in seen]
    of_row = [tuple(range(start, start + 3)) for start in range(0, 15, 3)]
    assert [sorted(validated) for _, validated in texts] == [[of_row[0], of_row[2], of_row[4]], [of_row[1], of_row[3]]]
    assert all(sorted(trained + validated) == of_row for trained, validated in texts)
    assert seen[1][1].seed == seen[0][1].seed + 1

    aggregator = model.model.inner_models["chitchat"].aggregator
    x = torch.randn(5, len(POINTS), 1)
    members = [given[0].aggregator for given in seen]
    merged = Aggregator(len(POINTS), 1, members[0].hidden.out_features, members=2)
    merged.set_members(members)
    torch.testing.assert_close(merged(x), (members[0](x) + members[1](x)) / 2, atol=1e-6, rtol=1e-5)
    assert not torch.equal(members[0].hidden.weight, members[1].hidden.weight)
    assert torch.equal(aggregator.output.weight, merged.output.weight)
    model.save_pretrained(tmp_path / "model")
    again = DMoERMForSequenceClassification.from_pretrained(tmp_path / "model")
    assert score_rows(again, ROWS, formatter) == score_rows(model, ROWS, formatter)

    base.config.aggregator_members = 5
    with pytest.raises(
        ValueError, match="got aggregator_members=5 and 4 ranked prompts in phase 3, need at least as many"
    ):
        phase3(base, adapters, rows[:3], rows[3:], formatter, settings(tmp_path / "few"))


def test_an_aggregator_of_scores_does_not_depend_on_their_units(inner, adapters, formatter, tmp_path):
    """What an expert adds to all scores, or multiplies them by, changes nothing; nor does an expert that scores all texts alike."""
    base, rewards = base_reward_model(inner, "chitchat"), []
    base.config.aggregator_input = "scores"
    for number, (factor, shift) in enumerate([(1.0, 0.0), (50.0, 7.0)]):
        with torch.no_grad():
            for head in inner.model.inner_models["chitchat"].expert_heads.values():
                head.weight.mul_(factor)
                head.bias.mul_(factor).add_(shift)
        for point, folder in adapters.items():
            export_expert(inner, "chitchat", point, folder)
        args = settings(tmp_path / str(number), max_steps=6)
        model, _ = phase3(deepcopy(base), adapters, ROWS, ROWS, formatter, args)
        rewards.append(torch.tensor(score_rows(model, ROWS, formatter)))
    torch.testing.assert_close(*rewards, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        inner.model.inner_models["chitchat"].expert_heads["logic"].weight.zero_()
    export_expert(inner, "chitchat", "logic", adapters["logic"])
    model, _ = phase3(base, adapters, ROWS, ROWS, formatter, settings(tmp_path / "constant", max_steps=6))
    assert torch.tensor(score_rows(model, ROWS, formatter)).std() > 0


@pytest.mark.parametrize("aggregator_input", ["embeddings", "scores"])
def test_the_accuracy_of_phase_3_is_that_of_the_model_that_it_returns(
    inner, adapters, formatter, tmp_path, aggregator_input
):
    base = base_reward_model(inner, "chitchat")
    base.config.aggregator_input = aggregator_input
    model, history = phase3(base, adapters, ROWS, ROWS[:2], formatter, settings(tmp_path, max_steps=6))
    right = pairs = 0
    for row_rewards, r in zip(score_rows(model, ROWS[:2], formatter), ROWS[:2], strict=True):
        for better, worse in r.pairs_of():
            pairs, right = pairs + 1, right + (row_rewards[better] > row_rewards[worse])
    assert right / pairs == max(entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry)


class WholeModel(DMoERMPreTrainedModel):
    """An inner model as phase 3 would train it without a cache: every text goes through base and experts in every step."""

    def __init__(self, model: DMoERMForSequenceClassification):
        super().__init__(model.config)
        self.whole = model.requires_grad_(False).eval()
        self.aggregator = model.model.inner_models["chitchat"].aggregator.requires_grad_(True)

    def train(self, mode: bool = True):
        return self  # base and experts are frozen and without dropout

    def forward(self, **inputs) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.whole(**inputs).logits)


@pytest.mark.parametrize("changes", [{}, {"per_device_train_batch_size": 3, "eval_tokens_per_batch": 100}])
def test_training_on_cached_embeddings_is_training_through_the_whole_model(
    inner, adapters, formatter, tmp_path, changes
):
    base = base_reward_model(inner, "chitchat")
    changes = {"max_steps": 8, "save_total_limit": 2, "seed": 5, **changes}
    cached, history = phase3(deepcopy(base), adapters, ROWS, ROWS[1:], formatter, settings(tmp_path / "a", **changes))

    start, _ = phase3(
        base, adapters, ROWS, ROWS[1:], formatter, settings(tmp_path / "b", **{**changes, "learning_rate": 0.0})
    )
    data = ranked_dataset(ROWS, formatter), ranked_dataset(ROWS[1:], formatter)
    args = settings(tmp_path / "c", load_best_model_at_end=False, patience=0, **changes)
    args.save_strategy = "no"  # of the whole model
    before = weights_of(start)
    start.model.inner_models["chitchat"].reward_mean.zero_()
    trainer = RankedRewardTrainer(
        WholeModel(start), args, train_dataset=data[0], eval_dataset=data[1], processing_class=formatter.tokenizer
    )
    best = {}

    class Best(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            if metrics["eval_accuracy"] > best.get("accuracy", -1):
                best.update(accuracy=metrics["eval_accuracy"], weights=weights_of(start))

    trainer.add_callback(Best())
    trainer.train()
    expected = {name: weight for name, weight in best["weights"].items() if ".aggregator." in name}
    assert len(expected) == 5 and moved({name: before[name] for name in expected}, expected)
    for name, weight in expected.items():
        torch.testing.assert_close(cached.state_dict()[name], weight, rtol=1e-3, atol=1e-4)
    evaluations = [
        [(e["step"], e["eval_loss"]) for e in log if "eval_loss" in e] for log in (history, trainer.state.log_history)
    ]
    assert [step for step, _ in evaluations[0]] == [step for step, _ in evaluations[1]] == [2, 4, 6, 8]
    assert [x for _, x in evaluations[0]] == pytest.approx([x for _, x in evaluations[1]], rel=1e-4)


def test_embeddings_lie_on_disk_and_are_those_of_the_model(inner, formatter, tmp_path, monkeypatch):
    """Whatever the number of texts in memory at once."""
    encodings = [encoding for row in formatter.encode_rows(ROWS)[0] for encoding in row]
    texts = [(torch.tensor([encoding.input_ids]), torch.tensor([encoding.prompt_length])) for encoding in encodings]
    with torch.no_grad():
        spans = [inner.model.find_spans(ids, None, length) for ids, length in texts]
        expected = torch.cat([inner.model.embed("chitchat", span) for span in spans])
    for chunk in (5, 4096):
        for module in (phases, embedding_cache):
            monkeypatch.setattr(module, "CHUNK", chunk)
        z = embeddings_on_disk(inner, encodings, formatter.tokenizer.pad_token_id, tmp_path / str(chunk))
        (file,) = (tmp_path / str(chunk)).iterdir()
        assert z.shape == (12, 3, 32) and file.stat().st_size == 4 * z.numel()
        torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-5)


def test_embeddings_are_computed_once_also_by_a_run_that_was_killed(inner, adapters, formatter, tmp_path, monkeypatch):
    base, counts = base_reward_model(inner, "chitchat"), []
    embed = DMoERMModel.embed

    def spy(self, task, spans, points=None):
        counts.append(len(spans.lengths))
        if len(counts) == kill_at:
            raise KeyboardInterrupt
        return embed(self, task, spans, points)

    monkeypatch.setattr(DMoERMModel, "embed", spy)
    for module in (phases, embedding_cache):
        monkeypatch.setattr(module, "CHUNK", 8)  # 24 texts
    kill_at = 3
    with pytest.raises(KeyboardInterrupt):
        phase3(deepcopy(base), adapters, ROWS, ROWS, formatter, settings(tmp_path))
    counts, kill_at = [], 0
    first, _ = phase3(deepcopy(base), adapters, ROWS, ROWS, formatter, settings(tmp_path))
    assert sum(counts) == 24  # the half-written file of the killed run was not taken for a whole one
    counts = []
    again, _ = phase3(deepcopy(base), adapters, ROWS, ROWS, formatter, settings(tmp_path))
    assert counts == []
    assert not moved(weights_of(first), weights_of(again))
    phase3(deepcopy(base), adapters, ROWS[1:], ROWS, formatter, settings(tmp_path))  # other texts
    turned = dict(zip(adapters, reversed(adapters.values()), strict=True))
    phase3(deepcopy(base), turned, ROWS, ROWS, formatter, settings(tmp_path))  # other experts
    assert sum(counts) == 21 + 24


def test_rows_without_a_pair_are_an_error_in_phase_3(inner, adapters, formatter, tmp_path):
    with pytest.raises(ValueError, match="got 0 rows and none with a pair of the overall preference"):
        phase3(base_reward_model(inner, "chitchat"), adapters, ROWS, [], formatter, settings(tmp_path))


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
