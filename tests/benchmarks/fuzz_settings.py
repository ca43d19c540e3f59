"""Recipes with a setting that no program can run with, YAML files that are none, and command lines with a mistake."""

import json
import math
import random
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from fuzz_case import Case, Material
from kills import command, dmoerm, example

NO_PATH = [3, [], "", "missing/folder", True, "a\0b"]
NO_COUNT = [0, -1, 1.5, "many", [], math.nan, True]
NO_SHARE = [-0.1, 1.5, math.nan, "half", [], True]
NO_NUMBER = ["fast", math.nan, math.inf, -math.inf, [], {}]
NO_FLAG = ["maybe", 2, [], "nein"]
NO_CHOICE = ["nonsense", 3, [], ""]
NO_SEED = [-1, "x", 1.5, [], math.nan]

STAGE = {
    "learning_rate": [*NO_NUMBER, -1.0],
    "max_steps": ["x", 1.5, [], math.nan],
    "eval_steps": [-1, "x", []],
    "num_train_epochs": ["x", []],
    "per_device_train_batch_size": NO_COUNT,
    "per_device_eval_batch_size": NO_COUNT,
    "gradient_accumulation_steps": NO_COUNT,
    "lr_scheduler_type": NO_CHOICE,
    "optim": NO_CHOICE,
    "warmup_steps": ["x", -1, math.nan],
    "weight_decay": NO_NUMBER,
    "adam_epsilon": [*NO_NUMBER, -1.0],
    "adam_beta1": [1.5, -0.1, "x", math.nan],
    "max_grad_norm": ["x", math.nan, -1.0],
    "patience": [-1, "x", 1.5],
    "metric_for_best_model": ["nonsense", 3],
    "use_cpu": NO_FLAG,
    "learning_rat": [1e-3],
    "output_dir": ["elsewhere"],
    "logging_steps": ["x"],
}
"""Setting of a stage of the training -> wrong values."""

JUDGE = {
    "kind": [*NO_CHOICE, None],
    "function": ["nowhere:f", "dmoerm_trl.labelling.heuristics:nothing", "no_colon", 3, "", None, "math:pi"],
    "funktion": ["x"],
}

WRONG: dict[str, dict[str, list]] = {
    "train": {
        "output_dir": [[], ""],
        **dict.fromkeys(("base_model", "train_data", "tasks", "test_data", "router_model"), NO_PATH),
        "on_error": NO_CHOICE,
        "max_length": [*NO_COUNT, 3],
        **dict.fromkeys(("test_share", "phase1_share", "validation_share"), [*NO_SHARE, 1.0]),
        **dict.fromkeys(
            ("trust_remote_code", "share_base", "unit_variance", "joint_experts", "without_outer"), NO_FLAG
        ),
        **dict.fromkeys(("load_in_8bit", "load_in_4bit"), NO_FLAG),
        "lora_rank": NO_COUNT,
        "lora_alpha": [0, -1, "x", [], math.nan],
        "lora_dropout": NO_SHARE,
        "lora_target_modules": [[], ["nope"], [3], {"q_proj": 1}],
        "lora_layers": [0, -1, 99, "bottom", [], 1.5],
        "aggregator_hidden_size": NO_COUNT,
        "activation": NO_CHOICE,
        "router_layers": [*NO_COUNT, 99],
        "router_balance": NO_SHARE,
        "ensemble_size": [-1, "x", 1.5, []],
        "seed": NO_SEED,
        "workers": NO_COUNT,
        "report_to": ["nonsense", 3],
        "no_such_key": [1],
        **{
            f"{stage}.{key}": values
            for stage in ("router", "phase1", "phase2", "phase3")
            for key, values in STAGE.items()
        },
        **dict.fromkeys(("router", "phase1", "phase2", "phase3"), [3, "x", ["a"], True]),
    },
    "label": {
        "output_dir": [[], ""],
        **dict.fromkeys(("rows", "tasks"), NO_PATH),
        "judge": [3, "x", [], None, {}],
        **{f"judge.{key}": values for key, values in JUDGE.items()},
        "on_error": NO_CHOICE,
        "points": [["logik"], [3], [[]], {"logic": 1}],
        **dict.fromkeys(("overall_points", "dry_run", "stop_early", "ask_again_unreadable"), NO_FLAG),
        **dict.fromkeys(("without_task", "order"), NO_CHOICE),
        "max_pairs": NO_COUNT,
        "seed": ["x", 1.5, [], math.nan],
        **dict.fromkeys(("max_calls", "max_tokens"), [-1, "x", 1.5, math.nan, []]),
        "max_cost": [*NO_NUMBER, 1.0],
        "price_per_million_prompt_tokens": [-1, math.nan, "x", 1.0],
        "answers": [3, [], "/dev/null/answers.sqlite"],
        "no_such_key": [1],
    },
    "best_of_n": {
        "output_dir": [[], ""],
        "responses": NO_PATH,
        "prompts": NO_PATH,
        "n": [*NO_COUNT, 11],
        "reward_models": [
            {},
            3,
            "x",
            [],
            {"a": "missing/folder"},
            {"a": {"max": ["length"]}},
            {"a": {"WCO": []}},
            {"a": None},
            {"a": 3},
        ],
        "gold": ["missing/folder", "nowhere:f", "math:nothing", 3, None, "", []],
        "num_prompts": [0, -1, 99, "x", 1.5],
        "task": ["nonsense", 3],
        "dtype": [*NO_CHOICE, "float7"],
        **dict.fromkeys(("max_length", "shard_size", "workers"), NO_COUNT),
        "grid": [[0], [-1], ["x"], [10**9], [1.5], {}],
        "show": [[0], [-1], ["x"], [1.5]],
        "show_prompts": [-1, "x", 1.5],
        "seed": NO_SEED,
        "no_such_key": [1],
    },
    "ppo": {
        **dict.fromkeys(
            ("policy", "reward_model", "prompts", "value_model", "eval_prompts", "reward_prompts"), NO_PATH
        ),
        "gold": ["missing/folder", "nowhere:f", 3, []],
        "max_prompt_length": NO_COUNT,
        "top_p": [0, -0.1, 1.5, math.nan, "x"],
        **dict.fromkeys(("monitor_every", "monitor_prompts"), NO_COUNT),
        "learning_rate": [*NO_NUMBER, -1.0],
        **dict.fromkeys(
            ("total_episodes", "response_length", "per_device_train_batch_size", "num_ppo_epochs"), NO_COUNT
        ),
        "temperature": [0, -1.0, math.nan, "x"],
        **dict.fromkeys(("kl_coef", "cliprange", "vf_coef", "gamma", "lam"), NO_NUMBER),
        "use_cpu": NO_FLAG,
        "seed": NO_SEED,
        "no_such_key": [1],
    },
    "prepare": {
        "dataset": NO_CHOICE,
        "source": [3, [], "", "/missing/set.jsonl", True],
        "output": [[], "", "/dev/null/rows.jsonl"],
        "max_rows": NO_COUNT,
        "columns": [{"chosen": "nowhere"}, 3, "x", ["a"]],
        "where": [{"nowhere": 1}, 3, "x", ["a"]],
        "tie_margin": [-1, math.nan, "x"],
        "tasks": NO_PATH,
        "task": [[], "...", "chit\u202echat"],  # no letter to name a folder by; what cannot be shown
        "task_column": ["nowhere", 3],
        "points": [3, "x", ["a"]],
        "drop_personal_data": NO_FLAG,
        "phone_region": ["ZZZ", 3],
        "against": [["missing.jsonl"], [3]],
        "tokenizer": NO_PATH,
        "no_such_key": [1],
    },
}
"""Program -> key of its recipe, with a point before what is in another -> wrong values."""


def wrong_setting(draw: random.Random, program: str, recipe: dict[str, Any]) -> tuple[str, Any, tuple]:
    """Sets a key to a wrong value. Returns the key, the value, and what a message has to name: the key or the value."""
    key = draw.choice(list(WRONG[program]))
    value = deepcopy(draw.choice(WRONG[program][key]))
    if program in ("train", "best_of_n") and value == "":
        value = draw.choice(["", " "])
    parent = recipe
    *outer, last = key.split(".")
    for name in outer:
        parent[name] = parent = dict(parent.get(name) or {})
    parent[last] = value
    shown = str(value[0] if isinstance(value, list) and value else value).replace("\0", "\\u0000")
    by_value = [f"got {value!r}", f"{shown}: got", repr(shown), *[shown] * (len(shown) > 3)]
    return key, value, ((last, last.replace("_", " ").rstrip("s"), *by_value),)


def _bomb(content: bytes) -> bytes:
    lines = [b"a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [b"a%d: &a%d [" % (i, i) + b", ".join([b"*a%d" % (i - 1)] * 9) + b"]" for i in range(1, 9)]
    return b"\n".join(lines) + b"\n" + content


BROKEN_FILES: dict[str, Callable[[bytes], bytes]] = {
    "a byte order mark": lambda content: b"\xef\xbb\xbf" + content,
    "Windows' line ends": lambda content: content.replace(b"\n", b"\r\n"),
    "empty": lambda content: b"",
    "a list": lambda content: b"- x\n- y\n",
    "a text": lambda content: b"just words\n",
    "a key twice": lambda content: content + content,
    "a tab": lambda content: content + b"\tmore: 1\n",
    "an open bracket": lambda content: content + b"more: [1, 2\n",
    "not UTF-8": lambda content: content + b"more: \xe9\xff\n",
    "a control character": lambda content: content + b"more: \x07\n",
    "billion laughs": _bomb,
    "a Python object": lambda content: content + b"more: !!python/object/apply:os.getcwd []\n",
    "an unknown alias": lambda content: content + b"more: *nothing\n",
    "two documents": lambda content: content + b"---\n" + content,
    "deep": lambda content: content + b"more: " + b"[" * 20_000 + b"]" * 20_000 + b"\n",
    "an unknown key": lambda content: content + b"more: 1\n",
    "itself in itself": lambda content: content + b"more: &a [*a]\n",
}
"""Name -> what is made of a YAML file's content."""

HARMLESS = ("a byte order mark", "Windows' line ends")
"""Those of them that change nothing that is meant."""

COMMANDS: list[tuple[list[str], tuple]] = [
    (["trian"], ("trian",)),
    (["--foo"], ("--foo",)),
    (["train"], ("--base_model",)),
    (["train", "--config"], ("--config",)),
    (["train", "--config", "missing.yaml"], ("missing.yaml",)),
    (["train", "--config", "HERE"], ("HERE",)),
    (["train", "--config", "ROWS"], ("ROWS",)),
    (["label"], ("--rows",)),
    (["label", "--rows", "ROWS", "--output_dir", "HERE/out", "--judge", "{"], ("judge",)),
    (["label", "--rows", "ROWS", "--output_dir", "HERE/out", "--judge", "[]"], ("judge",)),
    (["eval", "--base_model", "x", "--train_data", "y", "--output_dir", "HERE"], ("HERE",)),
    (["prepare", "--dataset", "nope", "--source", "x", "--output", "y"], ("dataset",)),
    (["prepare", "--dataset", "hh"], ("--source",)),
    (["world", "--no_such", "1"], ("--no_such",)),
    (["demo", "--no_such", "1"], ("--no_such",)),
    (["score"], ("--model",)),
    (["score", "--model"], ("--model",)),
    (["score", "--model", "MODEL"], ("--prompt",)),
    (["score", "--model", "MODEL", "--prompt", "x"], ("--response",)),
    (["score", "--model", "MODEL", "--prompt", "x", "--response", "y", "--rows", "ROWS"], ("--rows",)),
    (["score", "--model", "nowhere/at/all", "--prompt", "x", "--response", "y"], ("nowhere/at/all",)),
    (["score", "--model", "ROWS", "--prompt", "x", "--response", "y"], ("ROWS",)),
    (["score", "--model", "MODEL", "--rows", "missing.jsonl"], ("missing.jsonl",)),
    (["score", "--model", "MODEL", "--rows", "ROWS"], ("ROWS",)),  # tasks that the paper's table does not have
    (["score", "--model", "MODEL", "--rows", "ROWS", "--tasks", "nowhere"], ("nowhere",)),
    (["score", "--model", "MODEL", "--prompt", "x", "--response", "y", "--dtype", "float7"], ("float7",)),
    (["score", "--model", "MODEL", "--prompt", "x", "--response", "y", "--max_length", "0"], ("max_length",)),
    (["score", "--model", "MODEL", "--prompt", "x", "--response", "y", "--max_length", "-5"], ("max_length",)),
    (["score", "--model", "MODEL", "--prompt", "x", "--response", "y", "--max_length", "ten"], ("max_length",)),
    (["score", "--model", "MODEL", "--prompt", "x", "--response", "y", "--resident_tasks", "-1"], ("resident_tasks",)),
    (["score", "--model", "MODEL", "--prompt", "x", "--response", "y", "--resident_tasks", "0"], ("resident_tasks",)),
    (["score", "--model", "MODEL", "--prompt", "\udcff", "--response", "y"], ("prompt",)),
    (["score", "--model", "MODEL", "--prompt", "x", "--response", "y", "--output", "HERE"], ("HERE",)),
    (["score", "--model", "MODEL", "--prompt", "x", "--response", "y", "--output", "/dev/null/x"], ("/dev/null/x",)),
    (
        ["score", "--model", "MODEL", "--prompt", "x", "--response", "y", "--explain", "--output", "HERE/x"],
        ("--output",),
    ),
    (["score", "--model", "MODEL", "--prompt", "x", "--response", "y", "--explain", "maybe"], ("explain",)),
    (["score", "--model", "MODEL", "--prompt", "word " * 9000, "--response", "y " * 9000], ("max_length",)),
    (["score", "--model", "MODEL", "--prompt", "x", "--response", "y", "--moddel", "z"], ("--moddel",)),
]
"""Arguments of `dmoerm` with a mistake, and what the message has to name. MODEL, ROWS, TABLE and HERE stand for paths."""


def recipes(material: Material, draw: random.Random, at: Path) -> Case:
    """A recipe of a program with one wrong setting, or one that is no YAML."""
    name = draw.choice(["train"] * 4 + ["label"] * 2 + ["best_of_n"] * 2 + ["ppo"] * 2 + ["prepare"])
    recipe, path = recipe_of(material, name) | {"output_dir": str(at / "run")}, at / "mine.yaml"
    start = {"best_of_n": example("bon_eval"), "ppo": example("ppo")}.get(name) or command(name)
    if name == "prepare":
        recipe["output"] = recipe.pop("output_dir") + ".jsonl"
    if draw.random() < 0.15:
        what = draw.choice([what for what in BROKEN_FILES if what not in HARMLESS])
        path.write_bytes(BROKEN_FILES[what](yaml.safe_dump(recipe).encode()))
        place: tuple = (path.name,)
    else:
        key, wrong, place = wrong_setting(draw, name, recipe)
        what = f"{key}: {wrong!r:.60}"
        path.write_text(yaml.safe_dump(recipe))

    def late() -> bool:
        return bool(list((at / "run").glob("*/phase1/history.json")) or list((at / "run").glob("router/history.json")))

    return Case(f"{name} {what}", start, (["--config", str(path)],), place, None, late if name == "train" else None)


def recipe_of(material: Material, name: str) -> dict[str, Any]:
    folder = material.folder
    if name == "train":
        few = {"max_steps": 2, "eval_steps": 1, "use_cpu": True, "disable_tqdm": True}
        return (
            material.train
            | dict.fromkeys(("router", "phase1", "phase2", "phase3", "baselines"), few)
            | {"ensemble_size": 0}
        )
    if name == "label":
        judge = {"kind": "function", "function": "dmoerm_trl.labelling.heuristics:content_richness"}
        return {"rows": str(folder / "unlabelled.jsonl"), "tasks": material.train["tasks"], "judge": judge}
    if name == "prepare":
        pairs = [
            {"chosen": f"\n\nHuman: Hi {i}\n\nAssistant: Yes", "rejected": f"\n\nHuman: Hi {i}\n\nAssistant: No"}
            for i in range(3)
        ]
        (folder / "hh.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        return {"dataset": "hh", "source": str(folder / "hh.jsonl"), "task": "chitchat"}
    models = {"policy": str(folder / "policy"), "prompts": str(folder / "prompts.jsonl")}
    if name == "best_of_n":
        lines = [json.dumps({"prompt": "Hello?", "response": "word " * length}) for length in range(1, 11)]
        (folder / "responses.jsonl").write_text("\n".join(lines))
        scorers = {"reward_models": {"length": "length"}, "gold": "length"}
        return {"responses": str(folder / "responses.jsonl"), "n": 10, **scorers}
    return models | {
        "reward_model": str(folder / "reward_model"), "max_prompt_length": 60, "response_length": 4, "total_episodes": 4,
        "per_device_train_batch_size": 2, "num_ppo_epochs": 1, "num_sample_generations": 0, "monitor_prompts": 2,
        "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no",
    }  # fmt: skip


def commands(material: Material, draw: random.Random, at: Path) -> Case:
    words, place = draw.choice(COMMANDS)
    known = {
        "MODEL": material.folder / "reward_model",
        "ROWS": material.folder / "rows.jsonl",
        "TABLE": material.train["tasks"],
        "HERE": at,
    }
    words = [str(known.get(word, word)) for word in words]
    place = tuple(str(known.get(text, text)) for text in place)
    return Case(
        " ".join(words).replace(str(at), "HERE").replace(str(material.folder), "")[:80], dmoerm, (words,), place
    )
