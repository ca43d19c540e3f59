"""Where the bases are changes no score: a limit on those in memory, devices by task, several processes."""

import copy
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import models
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from models import PROMPTS, RESPONSES, TASKS, chat, make_dmoerm, make_tokenizer, padded, qwen2_config
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification

from dmoerm_trl.data.formatting import Encoding, Formatter
from dmoerm_trl.modeling import base_placement as placing
from dmoerm_trl.modeling.assembly import base_reward_model, export_expert, inner_model
from dmoerm_trl.modeling.base_placement import PlacedBases
from dmoerm_trl.modeling.modeling_dmoerm import DMoERMForSequenceClassification
from dmoerm_trl.rl.needed_tasks import keep_tasks, routed_tasks
from dmoerm_trl.rl.value_model import value_model_from
from dmoerm_trl.scoring.batch import route_encodings, score_encodings

ROOT = Path(__file__).parents[2]
KEYS = ["story_writing", "chitchat", "maths"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The checkpoint of a DMoERM of three tasks, with its tokenizer."""
    folder = tmp_path_factory.mktemp("placing") / "dmoerm"
    tokenizer = make_tokenizer()
    make_dmoerm(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def encodings(tokenizer) -> list[Encoding]:
    """Nine texts, the tasks by turns."""
    found = []
    for response, prompt in product(RESPONSES, PROMPTS.values()):
        opened, whole = chat(tokenizer, prompt, response)
        found.append(Encoding(tokenizer(whole.rstrip()).input_ids, len(tokenizer(opened).input_ids), 0))
    return found


@pytest.fixture
def batch(tokenizer, encodings) -> dict:
    ids, mask = padded([encoding.input_ids for encoding in encodings], tokenizer.pad_token_id)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def read(monkeypatch) -> list:
    """The bases that are read from a checkpoint, one after the other."""
    found = []
    load = placing.load_base
    monkeypatch.setattr(placing, "load_base", lambda *args: found.append(args[-2]) or load(*args))
    return found


def in_memory(model) -> list[str]:
    return list(model.model.backbones)


def weights(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# A limit on the tasks in memory.


@given(st.lists(st.sampled_from("abcd")), st.integers(1, 5))
def test_the_bases_in_memory_are_those_that_were_used_last(uses, limit):
    loads = []

    def load(key, device):
        assert len(bases) < limit  # there is room before the next base comes
        loads.append(key)
        return nn.Linear(1, 1)

    bases = PlacedBases("abcd", load, limit=limit).eval()
    expected, number = [], 0
    for key in uses:
        number += key not in expected
        expected = ([other for other in expected if other != key] + [key])[-limit:]
        assert isinstance(bases[key], nn.Linear)
        assert list(bases) == expected and len(loads) == number
        assert bases.waiting == [key for key in "abcd" if key not in expected]
        assert bases[key] is bases[key]
    with pytest.raises(KeyError, match="e"):
        bases["e"]


@pytest.mark.parametrize("limit", [1, 2, 3, 9])
@torch.no_grad()
def test_a_limit_changes_no_score(folder, batch, limit):
    expected = DMoERMForSequenceClassification.from_pretrained(folder)(**batch)
    model = AutoModelForSequenceClassification.from_pretrained(folder, resident_tasks=limit)
    assert in_memory(model) == [] and not model.training and model.device.type == "cpu"
    for _ in range(2):
        output = model(**batch)
        assert torch.equal(output.logits, expected.logits) and torch.equal(output.route, expected.route)
        assert torch.equal(output.route_probabilities, expected.route_probabilities)
        for point, scores in expected.capability_scores.items():
            torch.testing.assert_close(output.capability_scores[point], scores, atol=0, rtol=0, equal_nan=True)
        assert in_memory(model) == KEYS[-limit:]
    assert torch.equal(copy.deepcopy(model)(**batch).logits, expected.logits)


@torch.no_grad()
def test_a_base_is_read_in_the_dtype_that_was_asked_for(folder, batch):
    options = {"dtype": "bfloat16", "attn_implementation": "eager"}
    expected = DMoERMForSequenceClassification.from_pretrained(folder, **options)
    model, info = DMoERMForSequenceClassification.from_pretrained(
        folder, resident_tasks=1, output_loading_info=True, **options
    )
    assert torch.equal(model(**batch).logits, expected(**batch).logits) and not info["unexpected_keys"]
    base = model.model.backbones["maths"]
    assert base.dtype == torch.bfloat16 and not base.training
    assert base.config._attn_implementation == expected.model.backbones["maths"].config._attn_implementation == "eager"


def test_a_job_reads_each_base_once_whatever_the_order_of_the_texts(folder, encodings, read):
    expected = score_encodings(
        DMoERMForSequenceClassification.from_pretrained(folder), encodings, pad_token_id=2, tokens_per_batch=60
    )
    model = DMoERMForSequenceClassification.from_pretrained(folder, resident_tasks=1)
    found = score_encodings(model, encodings, pad_token_id=2, tokens_per_batch=60)  # several batches a task
    assert torch.equal(found, expected) and read == KEYS


def test_the_router_reads_a_prompt_once_and_no_base_is_read_for_it(folder, encodings, tokenizer, read):
    model = DMoERMForSequenceClassification.from_pretrained(folder, resident_tasks=1)
    short = encodings[0]._replace(input_ids=encodings[0].input_ids[:5], prompt_length=5)
    route_encodings(model, [short], pad_token_id=2)  # tries the router's backbone
    tokens = []
    embedding = model.model.router.backbone.get_input_embeddings()
    embedding.register_forward_hook(lambda _, args, __: tokens.append(args[0].numel()))
    assert route_encodings(model, encodings, pad_token_id=2).argmax(1).tolist() == [0, 1, 2] * 3
    assert 0 < sum(tokens) <= sum(encoding.prompt_length for encoding in encodings[:3])
    assert in_memory(model) == read == []
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS.values()]
    assert routed_tasks(model, prompts, Formatter(tokenizer, 100)) == dict.fromkeys(TASKS, 1)
    assert in_memory(model) == read == []


def test_parts_of_a_model_with_waiting_tasks_are_those_of_the_whole(folder, tmp_path):
    whole = DMoERMForSequenceClassification.from_pretrained(folder)
    model = DMoERMForSequenceClassification.from_pretrained(folder, resident_tasks=1)
    for task in ("maths", "chitchat"):
        for part in (inner_model, base_reward_model, value_model_from):
            expected, found = part(whole, task).state_dict(), part(model, task).state_dict()
            assert expected.keys() == found.keys()
            assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    for name, source in (("whole", whole), ("placed", model)):
        export_expert(source, "story writing", "logic", tmp_path / name)
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "placed"))
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_model_with_waiting_tasks_is_neither_trained_nor_saved(folder, batch, tmp_path):
    model = DMoERMForSequenceClassification.from_pretrained(folder, resident_tasks=3)
    model(**batch)
    model.train()  # all of it is in memory
    model.eval().save_pretrained(tmp_path / "whole")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "whole"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    model = DMoERMForSequenceClassification.from_pretrained(folder, resident_tasks=2)
    model(**batch)
    says = r"that has the bases of \['chitchat', 'maths'\] in memory and not those of \['story_writing'\], need all"
    with pytest.raises(ValueError, match="got a model to train " + says):
        model.train()
    with pytest.raises(ValueError, match="got a model to save " + says):
        model.save_pretrained(tmp_path / "half")
    assert not list(tmp_path.glob("half/*.safetensors"))


def test_kept_tasks_are_read_and_the_others_never(folder, tokenizer, read):
    model = DMoERMForSequenceClassification.from_pretrained(folder, resident_tasks=1)
    formatter = Formatter(tokenizer, 100)
    keep_tasks(model, ["chitchat", "maths"])
    assert in_memory(model) == read == ["chitchat", "maths"]
    score = {task: torch.tensor([formatter.encode(PROMPTS[task], "Four.").input_ids]) for task in TASKS}
    whole = DMoERMForSequenceClassification.from_pretrained(folder)
    for task in ("maths", "chitchat", "maths"):
        assert torch.equal(model(score[task]).logits, whole(score[task]).logits)
    with pytest.raises(
        ValueError, match="sends to the task 'story_writing', which was left out.*one of .'chitchat', "
    ):
        model(score["story writing"])
    with pytest.raises(ValueError, match="got a model to save that has the bases of .* do not call `keep_tasks`"):
        model.state_dict()
    assert len(read) == 2


def test_a_fault_in_a_base_is_found_when_it_is_read(folder, batch, tmp_path):
    for fault, says in (("nan", "maths.*not finite"), ("missing", "1 missing keys.*maths"), ("shape", "1 mismatched")):
        weights = load_file(folder / "model.safetensors")
        name = "model.backbones.maths.norm.weight"
        weights[name] = {"nan": weights[name] * torch.nan, "missing": None, "shape": weights[name][:-1]}[fault]
        broken = tmp_path / fault
        broken.mkdir()
        (broken / "config.json").write_bytes((folder / "config.json").read_bytes())
        kept = {name: weight.contiguous() for name, weight in weights.items() if weight is not None}
        save_file(kept, broken / "model.safetensors", metadata={"format": "pt"})
        model = DMoERMForSequenceClassification.from_pretrained(broken, resident_tasks=1)
        model(**{name: values[:2] for name, values in batch.items()})  # of the other tasks
        with pytest.raises(ValueError, match=says):
            model(**batch)


# Devices by task. "meta" stands for another device, whose weights have no values.


@torch.no_grad()
def test_each_base_is_on_its_device(folder, batch, read):
    expected = DMoERMForSequenceClassification.from_pretrained(folder)(**batch)
    model = DMoERMForSequenceClassification.from_pretrained(folder, device_map={"chitchat": "meta", "": "cpu"})
    assert read == in_memory(model) == KEYS  # without a limit all are read at once
    assert [model.model.backbones[key].device.type for key in KEYS] == ["cpu", "meta", "cpu"]
    assert {part.device.type for part in model.model.inner_models.parameters()} == {
        "cpu"
    } and model.device.type == "cpu"
    rows = [row for row in range(9) if row % 3 != 1]
    output = model(**{name: values[rows] for name, values in batch.items()})
    torch.testing.assert_close(output.logits, expected.logits[rows], atol=1e-6, rtol=0)
    assert weights(model) == weights(DMoERMForSequenceClassification.from_pretrained(folder))


def test_kept_tasks_stay_on_their_devices(folder):
    model = DMoERMForSequenceClassification.from_pretrained(folder, device_map={"chitchat": "cpu"})
    keep_tasks(model, ["chitchat", "maths"])
    model.to("meta")
    devices = {key: model.model.backbones[key].device.type for key in ("maths", "chitchat")}
    assert devices == {"maths": "meta", "chitchat": "cpu"}


@pytest.mark.parametrize("limit", [None, 2])
def test_a_base_with_a_device_of_its_own_stays_there_when_the_model_is_moved(folder, limit):
    options = {"device_map": {"chitchat": "cpu"}, "resident_tasks": limit}
    model = DMoERMForSequenceClassification.from_pretrained(folder, **options)
    model.model.backbones["maths"]
    model.to("meta")
    devices = {key: model.model.backbones[key].device.type for key in ("maths", "chitchat")}
    assert devices == {"maths": "meta", "chitchat": "cpu"} and model.device.type == "meta"
    assert model.model.backbones["story_writing"].device.type == "meta"  # one that was not in memory follows the model
    model.to(torch.bfloat16)
    assert model.model.backbones["chitchat"].dtype == torch.bfloat16
    assert model.model.backbones["chitchat"].device.type == "cpu"


def test_one_device_is_one_device(folder):
    for device_map in ("meta", {"": "meta"}, torch.device("meta")):
        model = DMoERMForSequenceClassification.from_pretrained(folder, device_map=device_map)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert not isinstance(model.model.backbones, PlacedBases)


# Bad input.


@pytest.mark.parametrize(
    "options, says",
    [
        ({"resident_tasks": 0}, "got resident_tasks=0, need a whole number, at least 1, because"),
        ({"resident_tasks": -1}, "got resident_tasks=-1, need a whole number, at least 1"),
        ({"resident_tasks": 1.5}, "got resident_tasks=1.5, need a whole number"),
        (
            {"device_map": {"math": "cpu"}},
            r"keys \['math'\], need tasks among \['story writing', 'chitchat', 'maths'\]",
        ),
        ({"device_map": {"maths": "cuda:99"}}, r"got the device 'cuda:99' in the device_map, need one .* \['cpu'"),
        ({"device_map": {"maths": "disk"}}, "got the device 'disk' in the device_map"),
        ({"device_map": "auto", "resident_tasks": 1}, "got the device 'auto' in the device_map"),
    ],
)
def test_a_placing_that_cannot_be_is_an_error(folder, options, says):
    with pytest.raises(ValueError, match=says):
        DMoERMForSequenceClassification.from_pretrained(folder, **options)


@pytest.mark.parametrize("options", [{"resident_tasks": 1}, {"device_map": {"maths": "cpu"}}])
def test_tasks_that_share_one_base_have_one_place(tokenizer, tmp_path, options):
    make_dmoerm(tokenizer, share_base=True).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="whose tasks share one base, need a base for each task: leave `resident_tasks`"
    ):
        DMoERMForSequenceClassification.from_pretrained(tmp_path, **options)


# Memory.

SCORE = """
import json, re, sys
from pathlib import Path
from dmoerm_trl.data.formatting import Encoding
from dmoerm_trl.scoring.batch import score_encodings
from dmoerm_trl.modeling.modeling_dmoerm import DMoERMForSequenceClassification

def megabytes(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def score(folder, **options):
    model = DMoERMForSequenceClassification.from_pretrained(folder, **options)
    encodings = [Encoding([5 + n, 6, 7, 8 + n], 3, 0) for n in range(30)]
    rewards = score_encodings(model, encodings, pad_token_id=2).tolist()
    return {"rewards": rewards, "peak": megabytes("VmHWM"), "bases": sorted(model.model.backbones)}

small, folder, limit = sys.argv[1:]
score(small, resident_tasks=1)  # what it imports and keeps is no model's
before = megabytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
found = score(folder, resident_tasks=json.loads(limit))
print(json.dumps({**found, "peak": found["peak"] - before}))
"""


def run(*command, **environment) -> str:
    """What a Python process prints, with one thread."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of resident memory is read from /proc")
def test_five_tasks_with_one_in_memory_take_the_memory_of_one(tokenizer, folder, tmp_path):
    config = qwen2_config(tokenizer, hidden_size=1024)
    config.intermediate_size = 2304
    arguments = {"backbone_config": config, "router_config": qwen2_config(tokenizer), "aggregator_hidden_size": 32}
    five = make_dmoerm(tokenizer, {f"task {n}": ["a", "b"] for n in range(5)}, **arguments)
    torch.nn.init.normal_(five.model.router.score.weight, std=5)  # sends some texts to each task
    five.save_pretrained(tmp_path / "five")
    inner_model(five, "task 0").save_pretrained(tmp_path / "one")
    size = sum(parameter.nbytes for parameter in five.model.backbones["task_0"].parameters()) / 2**20
    del five
    one, limited, whole = (
        json.loads(run("-c", SCORE, folder, tmp_path / name, limit).splitlines()[-1])
        for name, limit in (("one", "null"), ("five", "1"), ("five", "null"))
    )
    print(
        f"a base of {size:.0f} MB: peak {one['peak']:.0f} MB for one task, {limited['peak']:.0f} limited, {whole['peak']:.0f} not"
    )
    assert len(limited["bases"]) == 1 and len(whole["bases"]) == 5
    assert limited["rewards"] == whole["rewards"] and len(set(limited["rewards"])) == 30
    assert size > 50 and limited["peak"] <= 1.2 * one["peak"] and whole["peak"] > 4 * size


# Several processes.


def launched(*command) -> str:
    """What two processes that share a job print."""
    return run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, *command)


@pytest.mark.slow
def test_two_processes_print_together_what_one_writes(folder, tmp_path):
    rows = [
        {"prompt": prompt, "responses": [f"{text} {n}" for text in RESPONSES], "ranks": [1, 2, 3], "task": task}
        for n in range(4)
        for task, prompt in PROMPTS.items()
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"tasks": TASKS, "overall": ["logic"]}, allow_unicode=True))
    arguments = ["score", "--model", folder, "--rows", tmp_path / "rows.jsonl", "--tasks", tmp_path / "tasks.yaml"]
    run("-m", "dmoerm_trl.cli", *arguments, "--output", tmp_path / "one.jsonl")
    said = launched("-m", "dmoerm_trl.cli", *arguments, "--resident_tasks", 1)
    written = (tmp_path / "one.jsonl").read_text().splitlines()
    assert len(written) == 36
    assert [line for line in said.splitlines() if '{"prompt"' in line] == written  # each printed once


@pytest.mark.slow
def test_two_processes_share_best_of_n(folder, tmp_path):
    tokenizer = make_tokenizer()
    for model, name in ((models.make_policy(tokenizer), "policy"), (models.make_value_model(tokenizer), "plain")):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS.values()))
    settings = {"policy": tmp_path / "policy", "prompts": tmp_path / "prompts.jsonl", "n": 32, "max_new_tokens": 2}
    settings |= {"shard_size": 8, "batch_size": 8, "gold": "length"}
    settings = {key: value if isinstance(value, int) else str(value) for key, value in settings.items()}
    settings["reward_models"] = {"DMoERM": str(folder), "plain": str(tmp_path / "plain")}
    (tmp_path / "bon.yaml").write_text(yaml.safe_dump(settings))
    command = [ROOT / "examples" / "bon_eval.py", "--config", tmp_path / "bon.yaml", "--output_dir"]
    run(*command, tmp_path / "one")
    assert launched(*command, tmp_path / "two").count("table: ") == 1
    files = {
        name: sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*.*"))
        for name in ("one", "two")
    }
    assert files["one"] == files["two"] and len(files["one"]) > 4 * 3 * 4
    for path in files["one"]:
        first, second = tmp_path / "one" / path, tmp_path / "two" / path
        if path.suffix == ".parquet":
            assert pq.read_table(first).equals(pq.read_table(second))
        elif path.suffix == ".md":
            assert first.read_text() == second.read_text()
    first, second = (json.loads((tmp_path / name / "best_of_n.json").read_text()) for name in ("one", "two"))
    for name, fit in first.pop("fits").items():  # a solver's last digits differ between runs of one process too
        for key, value in fit.items():
            assert second["fits"][name][key] == (value if value is None else pytest.approx(value, rel=1e-9))
    assert second.pop("fits") and first == second
