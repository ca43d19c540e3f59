"""The public names: each has types, and a docstring whose example runs as it stands, in a folder where `make demo` was run."""

import inspect
import json
import re
import shutil
import textwrap

import pytest
from models import PROMPTS, RESPONSES, make_dmoerm, make_policy, make_single, make_tokenizer

import dmoerm_trl

EXAMPLE = re.compile(r"^([ \t]*)```python\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What the demo leaves in `runs/demo`, with tiny models."""
    folder, tokenizer = tmp_path_factory.mktemp("home") / "runs" / "demo", make_tokenizer()
    dmoerm = make_dmoerm(tokenizer)
    models = {"base": make_policy(tokenizer), "model": dmoerm, "router": dmoerm.model.router}
    models |= {f"ensemble/{member}": make_single(tokenizer) for member in range(2)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "data").mkdir()
    with (folder / "data" / "test.jsonl").open("w", encoding="utf-8") as file:
        for number in range(80):
            task = ("chitchat", "roleplay")[number % 2]
            row = {
                "prompt": f"{PROMPTS['chitchat']} {number}",
                "responses": RESPONSES,
                "ranks": [1, 2, 3],
                "task": task,
            }
            file.write(json.dumps(row | {"capability_ranks": {"empathy ability": [1, 2, 3]}}) + "\n")
    return folder.parents[1]


@pytest.mark.parametrize("name", dmoerm_trl.__all__)
def test_the_example_of_a_public_name_runs(name, demo, tmp_path, monkeypatch):
    if name == "ppo_trainer" or name == "ppo_config":
        pytest.importorskip("trl.experimental.ppo", reason="this TRL has no PPO")
    found = EXAMPLE.search(inspect.getdoc(getattr(dmoerm_trl, name)))
    assert found, f"{name} has no example in its docstring"
    assert f"{name}" in found[2] and "from dmoerm_trl import" in found[2]
    shutil.copytree(demo, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    exec(compile(textwrap.dedent(found[2]), f"<example of {name}>", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("name", dmoerm_trl.__all__)
def test_a_public_name_has_types(name):
    public = getattr(dmoerm_trl, name)
    if inspect.isclass(public) and "__init__" not in vars(public):
        return
    signature = inspect.signature(public.__init__ if inspect.isclass(public) else public)
    for parameter in signature.parameters.values():
        if parameter.name not in ("self", "args", "kwargs"):
            assert parameter.annotation is not parameter.empty, f"{name}: {parameter.name} has no type"
    if not inspect.isclass(public):
        assert signature.return_annotation is not signature.empty, f"{name}: no type of what is returned"
