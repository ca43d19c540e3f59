"""Malformed folders of models, and of trainings that are to go on."""

import json
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

import yaml
from fuzz_case import Case, Material, lines_of
from fuzz_settings import recipe_of
from kills import command

PROMPT, RESPONSE = "Hello there, how are you today?", "All is well, thank you!"


def models(material: Material, draw: random.Random, at: Path) -> Case:
    good = material.folder / "scores.jsonl"
    arguments = ["--prompt", PROMPT, "--response", RESPONSE, "--output"]
    if not good.exists():
        material.result_of(
            "scores", command("score"), ["--model", str(material.folder / "reward_model"), *arguments, str(good)]
        )
    model, out = at / "mine", at / "out.jsonl"
    shutil.copytree(material.folder / "reward_model", model)
    what = draw.choice([change_config] * 3 + [change_weights] * 3 + [change_tokenizer] * 2 + [change_template] * 3)(
        draw, model
    )

    def right(said: str) -> str:
        return "right" if lines_of(out) == lines_of(good) else "wrong"

    place = (("mine", "template", what.split(":")[0].split()[-1]),)
    return Case(what, command("score"), (["--model", str(model), *arguments, str(out)],), place, right)


def resume(material: Material, draw: random.Random, at: Path) -> Case:
    """A training that was stopped within the experts, with a file gone or broken."""
    unbroken, stopped = material.folder / "unbroken", material.folder / "stopped"
    recipe = recipe_of(material, "train") | {"router": {"max_steps": 2, "use_cpu": True}}
    path = at / "mine.yaml"
    for run in (unbroken, stopped):
        if not run.exists():
            path.write_text(yaml.safe_dump(recipe | {"output_dir": str(run)}))
            material.result_of(run.name, train_until if run is stopped else command("train"), ["--config", str(path)])
    run = at / "run"
    shutil.copytree(stopped, run)
    path.write_text(yaml.safe_dump(recipe | {"output_dir": str(run)}))
    files = [
        file for file in sorted(run.rglob("*")) if file.is_file() and file.name not in ("README.md", "report.txt")
    ]
    file, how = draw.choice(files), draw.choice(["gone", "empty", "cut off", "noise"])
    if draw.random() < 0.4:
        file = draw.choice([file for file in files if "checkpoint-" in str(file)])
    if draw.random() < 0.1:
        file = draw.choice(list((run / "data").glob("*.jsonl")))
        file.write_text(file.read_text().replace("four", "five").replace("well", "bad"))
        how = "edited"
    content = file.read_bytes()
    changes = {
        "gone": None,
        "empty": b"",
        "cut off": content[: len(content) // 2],
        "noise": draw.randbytes(len(content)),
        "edited": content,
    }
    file.unlink() if changes[how] is None else file.write_bytes(changes[how])
    final = [file.relative_to(unbroken) for file in unbroken.rglob("*.safetensors")]

    def right(said: str) -> str:
        same = all((run / one).exists() and (run / one).read_bytes() == (unbroken / one).read_bytes() for one in final)
        return "right" if same else "wrong"

    place = ((file.name, str(file.parent.relative_to(run)), file.parent.name),)
    return Case(f"{file.relative_to(run)}: {how}", command("train"), (["--config", str(path)],), place, right)


def train_until(arguments: list[str]) -> None:
    """Trains until the experts' first checkpoint is there, and stops as a process that is killed."""
    from transformers import TrainerCallback, trainer_callback

    class Stop(TrainerCallback):
        def on_save(self, args: Any, *_: Any, **__: Any) -> None:
            if "experts" in args.output_dir:
                os._exit(0)

    create = trainer_callback.CallbackHandler.__init__

    def with_stop(self: Any, callbacks: list, *rest: Any, **options: Any) -> None:
        create(self, [*callbacks, Stop()], *rest, **options)

    trainer_callback.CallbackHandler.__init__ = with_stop
    command("train")(arguments)


def change_config(draw: random.Random, model: Path) -> str:
    """One value of config.json that is of no use: of another type, or a number that the weights do not fit."""
    path = model / "config.json"
    config = json.loads(path.read_text())
    numbers = {"lora_rank": [0, -1, 3], "lora_alpha": [0, -4], "num_labels": [2], "aggregator_hidden_size": [0, 5]}
    numbers |= {
        "backbone_config.hidden_size": [16, 0],
        "backbone_config.num_hidden_layers": [1, 3],
        "backbone_config.vocab_size": [10, 9999],
    }
    numbers |= {"router_config.num_hidden_layers": [1, 3], "lora_layers": [0, 1, 99, "bottom"], "activation": ["tanh"]}
    wrong = {
        "tasks": [[], {}, "x", None, [["chitchat", ["logic"]]]],
        "response_marker": [[], "x", [-1], [99999]],
        "lora_target_modules": [["nope"], "x"],
    }
    wrong |= {
        "model_type": ["qwen2", "x", 3],
        "end_of_turn": [[], "x", [-1], [99999]],
        "backbone_config": [None, {}, "x"],
        "router_config": [None, {}, 3],
    }
    key, values = draw.choice(list((numbers | wrong).items()))
    value, parent = draw.choice(values), config
    *outer, last = key.split(".")
    for name in outer:
        parent = parent[name]
    if draw.random() < 0.2:
        parent.pop(last, None)
        value = "gone"
    else:
        parent[last] = value
    path.write_text(json.dumps(config))
    return f"config.json {last}: {value!r}"


def change_weights(draw: random.Random, model: Path) -> str:
    import torch
    from safetensors.torch import load_file, save_file

    path = model / "model.safetensors"
    weights, content = load_file(path), path.read_bytes()
    name = draw.choice(sorted(weights))
    weight = weights[name]
    tensors = {
        "a weight gone": None,
        "NaN": torch.full_like(weight, math.nan),
        "infinity": torch.full_like(weight, math.inf),
        "whole numbers": weight.to(torch.int64),
        "another shape": weight.new_zeros(*(size + 1 for size in weight.shape))
        if weight.dim()
        else weight.new_zeros(3),
    }
    raw = {
        "cut off": content[: len(content) // 2],
        "empty": b"",
        "noise": draw.randbytes(5000),
        "a huge header": b"\xff" * 8 + content[8:],
        "JSON": b"{}",
        "gone": None,
    }
    what = draw.choice([*tensors, *raw, "renamed"])
    if what in raw:
        path.unlink() if raw[what] is None else path.write_bytes(raw[what])
        return f"model.safetensors: {what}"
    weights.pop(name)
    if what == "renamed":
        weights[f"{name}_old"] = weight
    elif tensors[what] is not None:
        weights[name] = tensors[what]
    save_file(weights, path, {"format": "pt"})
    return f"{name}: {what}"


def change_tokenizer(draw: random.Random, model: Path) -> str:
    path = model / draw.choice(["tokenizer.json", "tokenizer_config.json"])
    content, what = path.read_bytes(), draw.choice(["gone", "empty", "cut off", "an object", "a list", "noise"])
    made = {
        "gone": None,
        "empty": b"",
        "cut off": content[: len(content) // 2],
        "an object": b"{}",
        "a list": b"[1]",
        "noise": draw.randbytes(300),
    }[what]
    path.unlink() if made is None else path.write_bytes(made)
    return f"{path.name}: {what}"


TEMPLATES = {
    "gone": None,
    "empty": "",
    "a syntax error": "{% for m in messages %}{{ m.content }}",
    "an endless loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% for m in messages %}{% endfor %}{% endfor %}{% endfor %}",
    "a huge range": "{% for a in range(10000000000) %}{{ messages[0].content }}{% endfor %}",
    "endless calls": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "no prompt": "<|im_start|>user\nhello<|im_end|>\n{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "no responses": "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "always an error": "{{ raise_exception('not today') }}",
    "an unknown function": "{{ nothing(messages) }}",
    "another format": "{% for m in messages %}[{{ m.role }}] {{ m.content }} [end]\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}",
    "text cut to 5 letters": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[:5] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "bytes": "\udcff",
    "a forbidden attribute": "{{ messages.__class__.__mro__ }}{{ messages[0].content }}",
}


def change_template(draw: random.Random, model: Path) -> str:
    what = draw.choice(list(TEMPLATES))
    path = model / "chat_template.jinja"
    if TEMPLATES[what] is None:
        path.unlink()
    else:
        path.write_bytes(TEMPLATES[what].encode(errors="surrogateescape"))
    return f"chat_template.jinja: {what}"
