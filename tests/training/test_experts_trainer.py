"""Phase 2: experts trained together end as experts trained one by one, stop when their patience ends, survive a kill."""

import json
import math
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import PROMPTS, RESPONSES, TASKS, make_single, make_tokenizer
from safetensors import safe_open
from torch import Tensor
from transformers import TrainerCallback

from dmoerm_trl.data.formatting import Formatter
from dmoerm_trl.data.rows import PreferenceRow
from dmoerm_trl.modeling.modeling_dmoerm import DMoERMForSequenceClassification
from dmoerm_trl.tasks import slug
from dmoerm_trl.training.experts_trainer import BestExperts, Experts, ExpertsTrainer, history_of, untrained_experts
from dmoerm_trl.training.phases import phase2
from dmoerm_trl.training.ranked_config import RankedRewardConfig
from dmoerm_trl.training.ranked_dataset import ranked_dataset
from dmoerm_trl.training.ranked_trainer import last_checkpoint, ranking_loss, train_or_resume

POINTS = TASKS["chitchat"]


def make_rows(start: int = 0, count: int = 6, **changes) -> list[PreferenceRow]:
    """Rows with labels of all points, each point its own; `changes` replace a point's labels of all rows."""
    rows = []
    for number in range(start, start + count):
        texts = [f"{text} {number}" for text in RESPONSES]
        labels = {p: [(number * (i + 1) + k * (i + 2)) % 5 + 1 for k in range(3)] for i, p in enumerate(POINTS)}
        labels = {point: ranks for point, ranks in {**labels, **changes}.items() if ranks}
        prompt = [{"role": "user", "content": f"{PROMPTS['chitchat']} {number}"}]
        rows.append(PreferenceRow(prompt, texts, [1, 2, 3], "chitchat", labels))
    return rows


ROWS, EVAL_ROWS = make_rows(), make_rows(20, 3)


def base(dropout: float = 0.0) -> DMoERMForSequenceClassification:
    single = make_single(make_tokenizer())
    single.config.lora_dropout = dropout
    return single


def settings(folder, **changes) -> RankedRewardConfig:
    few = {"max_steps": 8, "eval_steps": 2, "learning_rate": 3e-2, "use_cpu": True, "disable_tqdm": True}
    return RankedRewardConfig(str(folder), **{**few, "logging_steps": 1, **changes})


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def expert_of(model: DMoERMForSequenceClassification, point: str) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in Experts(model).expert(point).items()}


def trained(folder, points=POINTS, rows=ROWS, eval_rows=EVAL_ROWS, dropout=0.0, **changes):
    formatter = Formatter(make_tokenizer(), 256)
    return phase2(base(dropout), points, rows, eval_rows, formatter, settings(folder, **changes))


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To float tolerance after some steps of Adam, which divides a small gradient by itself."""
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


# Together and one by one.

SETTINGS = {
    "plain": {},
    "last weights": {"load_best_model_at_end": False},
    "patience": {"patience": 1, "max_steps": 24, "metric_for_best_model": "eval_loss"},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 5},
    "clipping": {"max_grad_norm": 1e-2, "optim": "sgd", "learning_rate": 100.0},
    "no clipping": {"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.3},
    "tokens": {"train_tokens_per_batch": 250, "weight_decay": 0.1},
    "centred": {"center_rewards_coefficient": 0.5},
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_experts_trained_together_are_those_trained_one_by_one(changes, tmp_path):
    together, histories = trained(tmp_path / "all", **changes)
    start, stops = untrained_experts(base(), POINTS, seed=42), set()
    for number, point in enumerate(POINTS):
        alone, history = trained(tmp_path / str(number), [point], **changes)
        close(expert_of(together, point), expert_of(alone, point))
        assert not same(expert_of(start, point), expert_of(alone, point))
        for metric in ("eval_accuracy", "eval_loss", "accuracy", "loss"):
            curves = [[(e["step"], e[metric]) for e in h[point] if metric in e] for h in (histories, history)]
            assert [step for step, _ in curves[0]] == [step for step, _ in curves[1]]
            assert [v for _, v in curves[0]] == pytest.approx([v for _, v in curves[1]], rel=1e-3, abs=1e-5)
        stops.add(max(entry["step"] for entry in history[point]))
    if "patience" in changes:
        assert len(stops) > 1 and max(stops) < 24  # they did not stop together, and all stopped


def test_a_clipped_gradient_is_that_of_one_expert(tmp_path):
    """Clipped by the norm of all experts together, no expert would take the whole step."""
    start = untrained_experts(base(), POINTS, seed=42)
    before = {point: expert_of(start, point) for point in POINTS}
    limit = {"max_steps": 1, "max_grad_norm": 1e-3, "optim": "sgd", "learning_rate": 1.0, "eval_steps": 1}
    model, _ = trained(tmp_path, **limit)
    for point in POINTS:
        moves = [after - before[point][name] for name, after in expert_of(model, point).items()]
        assert float(torch.cat([move.flatten() for move in moves]).norm()) == pytest.approx(1e-3, rel=1e-2)


def test_the_base_stays_as_it_is_and_the_experts_move(tmp_path):
    model, _ = trained(tmp_path, dropout=0.1)
    after = {name.replace(".base_layer", ""): weight for name, weight in weights_of(model).items()}
    for name, weight in weights_of(base()).items():
        assert "reward_" in name or torch.equal(after[name], weight), name
    for point in POINTS:
        assert all(weight.any() for weight in expert_of(model, point).values())  # LoRA's B started at zero


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_an_expert_does_not_depend_on_the_labels_of_other_points(dropout, tmp_path):
    first, _ = trained(tmp_path / "first", dropout=dropout)
    others = {point: [3, 1, 2] for point in POINTS[1:]}
    second, _ = trained(tmp_path / "second", rows=make_rows(**others), dropout=dropout)
    assert same(expert_of(first, POINTS[0]), expert_of(second, POINTS[0]))
    for point in POINTS[1:]:
        assert not same(expert_of(first, point), expert_of(second, point))


def test_an_experts_random_start_depends_on_seed_and_point_alone():
    alone = untrained_experts(base(), ["logic"], seed=3)
    assert same(expert_of(alone, "logic"), expert_of(untrained_experts(base(), POINTS, seed=3), "logic"))
    assert not same(expert_of(alone, "logic"), expert_of(untrained_experts(base(), ["logic"], seed=4), "logic"))
    a_weights = [
        {
            name: w
            for name, w in expert_of(untrained_experts(base(), POINTS, seed=3), point).items()
            if "lora_A" in name
        }
        for point in POINTS[:2]
    ]
    assert not any(torch.equal(a, b) for a, b in zip(*(w.values() for w in a_weights), strict=True))


# Rows without labels of some points.


@pytest.mark.parametrize("center", [None, 0.5])
def test_rows_without_labels_of_a_point_have_no_part_in_its_loss(center, tmp_path):
    """The loss of each expert is equation 7 over the prompts that have its labels."""
    rows = [make_rows(0, 1)[0], make_rows(1, 1, logic=[])[0], make_rows(2, 1, logic=[2, 2, 2])[0]]
    formatter = Formatter(make_tokenizer(), 256)
    data = ranked_dataset(rows, formatter, POINTS)
    logic = [[pair for pair in pairs if pair[0] == POINTS.index("logic")] for pairs in data["pairs"]]
    assert [len(pairs) for pairs in logic] == [3, 0, 0]
    model = Experts(untrained_experts(base(), POINTS, seed=0))
    args = settings(tmp_path, per_device_train_batch_size=3, center_rewards_coefficient=center)
    trainer = ExpertsTrainer(model, args, data, data, formatter.tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(model, batch)

    expected = centring = 0
    for point in POINTS:
        losses, squares = [], []
        for row in rows:
            pairs = torch.tensor(row.pairs_of(point))
            texts = formatter.encode_rows([row])[0][0]
            scores = [
                model(torch.tensor([t.input_ids]), None, torch.tensor([t.prompt_length]), points=[point]).logits[0, 0]
                for t in texts
            ]
            if len(pairs):
                losses.append(ranking_loss(torch.stack(scores), pairs, torch.zeros(3, dtype=torch.long))[0])
                squares += [score**2 for score in scores]
        expected += sum(losses) / len(losses)
        centring += (center or 0) * sum(squares) / len(squares)
    torch.testing.assert_close(loss, expected + centring, rtol=1e-5, atol=1e-6)
    metrics = trainer.evaluate()
    assert sum(metrics[f"eval_loss/{point}"] for point in POINTS) == pytest.approx(float(expected.detach()), rel=1e-5)


class Weights(TrainerCallback):
    """The weights of each expert after every step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append({point: {n: w.detach().clone() for n, w in model.expert(point).items()} for point in POINTS})


@pytest.mark.parametrize("others_stopped", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_adam_leaves_an_expert_without_a_pair_in_a_step_as_it_is(accumulation, others_stopped, tmp_path):
    """Momentum and weight decay would move it."""
    rows = [*make_rows(0, 2), *make_rows(2, 4, **{POINTS[0]: []})]
    formatter = Formatter(make_tokenizer(), 256)
    model = Experts(untrained_experts(base(), POINTS, seed=0))
    args = settings(
        tmp_path, train_sampling_strategy="sequential", gradient_accumulation_steps=accumulation, weight_decay=0.1,
        max_steps=6 // accumulation, patience=20,
    )  # fmt: skip
    trainer = ExpertsTrainer(
        model,
        args,
        ranked_dataset(rows, formatter, POINTS),
        ranked_dataset(EVAL_ROWS, formatter, POINTS),
        formatter.tokenizer,
    )
    if others_stopped:  # then no expert of some batches is in training
        best = next(c for c in trainer.callback_handler.callbacks if isinstance(c, BestExperts))
        best.records = {point: {"best": 1.0, "step": None, "since": 20} for point in POINTS[1:]}
    seen = Weights()
    trainer.add_callback(seen)
    train_or_resume(trainer)
    labelled = 2 // accumulation
    for step in range(1, 6 // accumulation):
        before, after = seen.steps[step - 1], seen.steps[step]
        assert same(before[POINTS[0]], after[POINTS[0]]) == (step >= labelled)
        assert same(before[POINTS[1]], after[POINTS[1]]) == others_stopped


def test_a_point_without_labels_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match="got 6 rows and none with a pair of logic"):
        trained(tmp_path, rows=make_rows(logic=[1, 1, 1]))
    with pytest.raises(ValueError, match="got 3 rows and none with a pair of logic"):
        trained(tmp_path, eval_rows=make_rows(logic=[], count=3))


# Labels that are pairs.


def as_pairs(rows: list[PreferenceRow]) -> list[PreferenceRow]:
    """The same labels, written as pairs from the last to the first."""
    return [
        replace(
            row,
            capability_ranks={},
            capability_pairs={
                point: [list(pair) for pair in reversed(row.pairs_of(point))] for point in row.labelled_points
            },
        )
        for row in rows
    ]


class Gradients(TrainerCallback):
    """The gradients of each expert in every step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({f"{point}/{n}": w.grad.clone() for point in POINTS for n, w in model.expert(point).items()})


def test_pairs_that_say_what_ranks_say_train_the_same_experts(tmp_path):
    """Loss, gradients, evaluation and weights, bit by bit, also where ties leave a partial order."""
    runs = []
    tied = make_rows(logic=[2, 1, 2])
    for name, rows, eval_rows in (("ranks", tied, EVAL_ROWS), ("pairs", as_pairs(tied), as_pairs(EVAL_ROWS))):
        formatter = Formatter(make_tokenizer(), 256)
        data = ranked_dataset(rows, formatter, POINTS), ranked_dataset(eval_rows, formatter, POINTS)
        model = Experts(untrained_experts(base(), POINTS, seed=0))
        trainer = ExpertsTrainer(model, settings(tmp_path / name, max_steps=4), *data, formatter.tokenizer)
        gradients = Gradients()
        trainer.add_callback(gradients)
        train_or_resume(trainer)
        metrics = {
            (entry["step"], key): value
            for entry in trainer.state.log_history
            for key, value in entry.items()
            if key.partition("/")[0].removeprefix("eval_") in ("loss", "accuracy", "margin")
        }
        runs.append((gradients.steps, metrics, model))
    (ranks_gradients, ranks_metrics, ranked), (pairs_gradients, pairs_metrics, paired) = runs
    assert len(ranks_gradients) == 4 and all(map(same, ranks_gradients, pairs_gradients))
    assert ranks_metrics == pairs_metrics
    assert {key for _, key in ranks_metrics} >= {f"eval_loss/{point}" for point in POINTS}
    for point in POINTS:
        assert same(ranked.expert(point), paired.expert(point))


def test_an_expert_learns_the_pairs_that_were_decided_and_no_others(tmp_path):
    """The third response is in no pair of the point, so what it says is of no account; a cycle trains too."""
    pairs = {"logic": [[1, 0]], "情感": [[0, 1], [1, 2], [2, 0]]}
    labels = {"capability_ranks": {"empathy ability": [1, 2, 3]}, "capability_pairs": pairs}
    rows = [replace(row, **labels) for row in ROWS]
    other_text = [replace(row, responses=[*row.responses[:2], f"Nobody asked. {i}"]) for i, row in enumerate(rows)]
    (first, histories), (second, _) = (
        trained(tmp_path / str(i), rows=r, eval_rows=r[:3]) for i, r in enumerate((rows, other_text))
    )
    close(expert_of(first, "logic"), expert_of(second, "logic"))
    assert not same(expert_of(first, "empathy ability"), expert_of(second, "empathy ability"))
    assert not same(expert_of(first, "logic"), expert_of(untrained_experts(base(), POINTS, seed=42), "logic"))
    accuracy = {point: [e["eval_accuracy"] for e in histories[point] if "eval_accuracy" in e] for point in POINTS}
    assert max(accuracy["logic"]) == 1
    assert 0 < max(accuracy["情感"]) < 1  # no rewards are in the order of a cycle
    loss = [entry["eval_loss"] for entry in histories["情感"] if "eval_loss" in entry]
    assert all(math.isfinite(value) for value in loss)


# Best weights and patience.


def scripted(folder, values: dict[str, list[float]], monkeypatch, **changes):
    """A training whose evaluations, one a step, give each point's values; returns the trainer and the weights by step."""
    formatter = Formatter(make_tokenizer(), 256)
    model = Experts(untrained_experts(base(), POINTS, seed=0))
    args = settings(folder, **{"eval_steps": 1, "max_steps": len(values[POINTS[0]]), **changes})
    data = ranked_dataset(ROWS, formatter, POINTS), ranked_dataset(EVAL_ROWS, formatter, POINTS)
    trainer = ExpertsTrainer(model, args, *data, formatter.tokenizer)
    embedded, loop, embed = [], trainer.evaluation_loop, model.model.embed

    def evaluation_loop(*args, **kwargs):
        output = loop(*args, **kwargs)
        for point in model.active:
            output.metrics[f"eval_accuracy/{point}"] = values[point][trainer.state.global_step - 1]
        return output

    def spy(task, spans, points):
        embedded.append((trainer.state.global_step, list(points)))
        return embed(task, spans, points)

    monkeypatch.setattr(trainer, "evaluation_loop", evaluation_loop)
    monkeypatch.setattr(model.model, "embed", spy)
    seen = Weights()
    trainer.add_callback(seen)
    train_or_resume(trainer)
    return trainer, seen.steps, embedded


VALUES = {
    POINTS[0]: [0.5, 0.7, 0.7, 0.6, 0.9, 0.9, 0.9],  # best at 2, stops at 4
    POINTS[1]: [0.9, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5],  # best at 1, stops at 3
    POINTS[2]: [0.1, 0.2, 0.3, 0.4, 0.5, 0.4, 0.4],  # best at 5, stops at 7
}


def test_each_expert_stops_with_its_own_patience_and_leaves_the_computation(tmp_path, monkeypatch):
    trainer, steps, embedded = scripted(tmp_path, VALUES, monkeypatch, patience=2, max_steps=20)
    assert trainer.state.global_step == 7
    for point, best, stop in zip(POINTS, (2, 1, 5), (4, 3, 7), strict=True):
        weights = {name: weight.detach() for name, weight in trainer.model.expert(point).items()}
        assert same(weights, steps[best - 1][point]) and not same(weights, steps[-1][point])
        assert {step for step, points in embedded if point in points} == set(range(stop + 1))
        assert all(same(steps[step][point], steps[stop - 1][point]) for step in range(stop, 7))
        evaluations = [entry for entry in history_of(trainer.state.log_history, point) if "eval_accuracy" in entry]
        assert [(entry["step"], entry["eval_accuracy"]) for entry in evaluations] == [
            (step + 1, VALUES[point][step]) for step in range(stop)
        ]


def test_without_patience_no_expert_stops(tmp_path, monkeypatch):
    trainer, steps, embedded = scripted(tmp_path, VALUES, monkeypatch, patience=0)
    assert trainer.state.global_step == 7
    assert all(points == POINTS for _, points in embedded)
    weights = {name: weight.detach() for name, weight in trainer.model.expert(POINTS[0]).items()}
    assert same(weights, steps[4][POINTS[0]])


def test_a_metric_that_is_nan_is_never_the_best(tmp_path, monkeypatch):
    values = {**VALUES, POINTS[0]: [float("nan"), 0.1, float("nan"), float("nan")]}
    trainer, steps, _ = scripted(tmp_path, values, monkeypatch, patience=2, max_steps=4)
    weights = {name: weight.detach() for name, weight in trainer.model.expert(POINTS[0]).items()}
    assert same(weights, steps[1][POINTS[0]])


def records_of(checkpoint: str | Path) -> dict[str, dict]:
    """What a checkpoint knows of each expert's best weights."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    return state["stateful_callbacks"]["BestExperts"]["attributes"]["records"]


def test_checkpoints_hold_the_experts_alone_and_only_the_best_weights_are_kept(tmp_path):
    trained(tmp_path, save_total_limit=2)
    newest = tmp_path / "checkpoint-8"
    with safe_open(newest / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {
            name for point in POINTS for name in expert_of(untrained_experts(base(), POINTS, 0), point)
        }
    records = records_of(newest)
    assert set(records) == set(POINTS)
    files = {path.name for path in (tmp_path / "best").iterdir()}
    assert files == {f"{slug(point)}-{record['step']}.safetensors" for point, record in records.items()}


# A run that is killed.


class Kill(TrainerCallback):
    """Stops the run as a killed process would: before its checkpoint is whole, or right after."""

    def __init__(self, step: int, event: str):
        self.step, self.event = step, event

    def on_evaluate(self, args, state, control, **kwargs):
        if self.event == "evaluate" and state.global_step == self.step:
            raise KeyboardInterrupt

    def on_save(self, args, state, control, **kwargs):
        if self.event == "save" and state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("event", ["evaluate", "save"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"patience": 1, "metric_for_best_model": "eval_loss"}, {"gradient_accumulation_steps": 2}],
    ids=["plain", "patience", "accumulation"],
)
def test_a_killed_and_resumed_phase_2_gives_the_experts_of_an_unbroken_one(event, changes, tmp_path, monkeypatch):
    """Dropout, the order of the data, best weights and patience included."""
    changes = {"max_steps": 12, "dropout": 0.2, **changes}
    unbroken, histories = trained(tmp_path / "unbroken", **changes)
    init = ExpertsTrainer.__init__
    for step in (4, 10):
        with monkeypatch.context() as patch:

            def with_kill(self, *args, step=step, **kwargs):
                init(self, *args, **kwargs)
                self.add_callback(Kill(step, event))

            patch.setattr(ExpertsTrainer, "__init__", with_kill)
            try:
                trained(tmp_path / "killed", **changes)
            except KeyboardInterrupt:
                pass
            else:
                assert "patience" in changes  # all had stopped before
        for point, record in records_of(last_checkpoint(tmp_path / "killed")).items():
            assert (tmp_path / "killed/best" / f"{slug(point)}-{record['step']}.safetensors").exists()
    resumed, again = trained(tmp_path / "killed", **changes)
    for point in POINTS:
        assert same(expert_of(unbroken, point), expert_of(resumed, point))
        curves = [[(e["step"], e["eval_loss"]) for e in h[point] if "eval_loss" in e] for h in (histories, again)]
        assert curves[0] == curves[1]


def train_experts(folder: Path) -> None:
    """What a child process of the next test does: it leaves the experts in one file."""
    folder.mkdir(exist_ok=True)
    model, _ = trained(folder, dropout=0.2, max_steps=30, patience=4)
    torch.save(weights_of(model), folder / "experts.pt")


@pytest.mark.slow
def test_a_phase_2_killed_by_the_system_at_any_moment_ends_with_the_same_experts(tmp_path, start):
    process = start(train_experts, tmp_path / "unbroken")
    process.join()
    assert process.exitcode == 0
    killed, kills = tmp_path / "killed", 0
    for attempt in range(12):
        process = start(train_experts, killed)
        before = len(list(killed.glob("*")))
        while process.is_alive() and len(list(killed.glob("*"))) == before:
            time.sleep(0.005)
        process.join(0.02 + 0.13 * (attempt % 4) if attempt < 11 else None)
        if not process.is_alive():
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0 and kills >= 2, kills
    found, expected = (torch.load(tmp_path / name / "experts.pt") for name in ("killed", "unbroken"))
    names = [name for point in POINTS for name in expert_of(untrained_experts(base(), POINTS, 0), point)]
    assert names and all(torch.equal(found[name], expected[name]) for name in names)


# What cannot be.


def test_a_learning_rate_that_follows_a_metric_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="'reduce_lr_on_plateau', need one that does not follow a metric"):
        trained(tmp_path, lr_scheduler_type="reduce_lr_on_plateau")


def test_an_unknown_metric_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="metric_for_best_model='f1', need 'eval_accuracy'"):
        trained(tmp_path, metric_for_best_model="eval_f1", greater_is_better=True)


def test_the_record_of_the_best_survives_json():
    callback = BestExperts("eval_loss", False, 3, True)
    callback.records = {"logic": {"best": 0.5, "step": 4, "since": 1}}
    state = json.loads(json.dumps(callback.state()))
    again = BestExperts.from_state(state)
    assert again.state() == callback.state() and deepcopy(again).records == callback.records
