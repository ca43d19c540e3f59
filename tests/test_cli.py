import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from models import make_backbone, make_dmoerm, make_tokenizer

from dmoerm_trl import __version__
from dmoerm_trl.cli import COMMANDS, main
from dmoerm_trl.console import run


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_help_lists_every_command(argv, capsys):
    assert main(argv) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert dict(lines) == COMMANDS


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(option):
    program = (
        "import sys; from dmoerm_trl.cli import main; main(sys.argv[1:]);"
        "print({'torch', 'transformers', 'trl', 'peft', 'datasets', 'numpy', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program, option], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dmoerm {__version__}\n"


def test_unknown_command_exits_2_and_lists_the_commands(capsys):
    assert main(["trian", "--help"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"got command 'trian', need one of {', '.join(COMMANDS)}." in printed.err
    assert all(what in printed.err for what in COMMANDS.values())


def test_a_command_gets_the_arguments_after_its_name(monkeypatch):
    received = []
    monkeypatch.setitem(sys.modules, "dmoerm_trl.scripts.world", SimpleNamespace(main=received.append))
    assert main(["world", "--seed", "3", "--help"]) == 0
    assert received == [["--seed", "3", "--help"]]


def test_a_misspelt_command_is_guessed(capsys):
    assert main(["scroe"]) == 2
    assert "Did you mean score?" in capsys.readouterr().err


def test_as_a_program_it_ends_with_a_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["dmoerm", "world", "--output", "w.jsonl", "--rows_per_task", "-3"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "dmoerm: error: got rows_per_task=-3, rows_of_others=60 and labelled_rows_per_task=0, need at least 0"
    )


def test_ordinary_commands_say_nothing_of_the_libraries(tmp_path, tokenizer, dmoerm):
    dmoerm.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "dmoerm_trl.cli", "score", "--model", str(tmp_path / "model"), "--prompt", "Hi"]
    done = subprocess.run([*command, "--response", "Well."], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert json.loads(done.stdout)["response"] == "Well."


# What users do wrong: a line or two that name it, whatever the command.


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, rows, a recipe, and what is no such thing."""
    folder = tmp_path_factory.mktemp("commands")
    tokenizer = make_tokenizer()
    for name, make in (("model", make_dmoerm), ("base", make_backbone)):
        make(tokenizer).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "tasks.yaml").write_text("tasks:\n  maths: [logic]\noverall: [logic]\n")
    row = {"prompt": "Hi?", "responses": ["a", "b"], "ranks": [1, 2], "task": "maths"}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    recipe = {"output_dir": "run", "base_model": "base", "train_data": "rows.jsonl", "tasks": "tasks.yaml"}
    (folder / "train.yaml").write_text("".join(f"{key}: {value}\n" for key, value in recipe.items()))
    for name, more in (("misspelt", "lora_rnak: 3"), ("quoted", "trust_remote_code: 'true'"), ("list", "seed: [1]")):
        (folder / f"{name}.yaml").write_text((folder / "train.yaml").read_text() + more)
    (folder / "doubled.yaml").write_text((folder / "train.yaml").read_text() + "seed: 1\nseed: 2\n")
    (folder / "broken.yaml").write_text("a: [1\n")
    (folder / "empty.yaml").touch()
    (folder / "file").write_text("hello")
    (folder / "folder").mkdir()
    return folder


SCORE = "score --model model --prompt a --response b"
ROWS = "score --model model --tasks tasks.yaml --rows"
LABEL = "label --rows rows.jsonl --tasks tasks.yaml --output_dir"
PREPARE = "prepare --dataset rows --source rows.jsonl --output"
JUDGE = """--judge {"kind":"reward_model","model":"model"}"""
WRONG = {
    "score": "required: --model",
    "score --model": "expected one argument",
    f"{SCORE} --max_lenght 3": "did you mean --max_length?",
    f"{SCORE} --max_length abc": "invalid int value: 'abc'",
    f"{SCORE} --max_length 0": "max_length=0, need at least 1",
    f"{SCORE} --max_length 3": "raise max_length",
    f"{SCORE} --dtype float99": "invalid choice: 'float99'",
    f"{SCORE} --explain perhaps": "perhaps",
    f"{SCORE} --load_in_4bit --load_in_8bit": "need one of them",
    f"{SCORE} --rows rows.jsonl": "need either --prompt and --response, or --rows",
    f"{SCORE} --explain --output x": "need one of them",
    f"{SCORE} stray": "got 'stray'",
    f"{SCORE} --config nowhere.yaml": "nowhere.yaml: No such file or directory",
    f"{SCORE} --config folder": "folder: Is a directory",
    f"{SCORE} --config empty.yaml": "empty.yaml: got an empty file",
    f"{SCORE} --config broken.yaml": "broken.yaml, line 2: got broken YAML",
    "score --model model --prompt a": "need either",
    "score --model base --prompt a --response b": "base: got a model of type 'qwen2', need a DMoERM",
    "score --model file --prompt a --response b": "file: got a file, need a DMoERM",
    "score --model folder --prompt a --response b": "folder: got a folder without config.json",
    "score --model no/such/folder --prompt a --response b": "no/such/folder: got a folder that is not there",
    "score --model some/model --prompt a --response b": "some/model: got no folder, and a hub name that",
    f"{ROWS} nowhere.jsonl": "nowhere.jsonl",
    f"{ROWS} rows.jsonl --output rows.jsonl": "rows.jsonl: got an output file that is an input too",
    f"{ROWS} rows.jsonl --output folder": "folder: got a file that cannot be written (it is a folder)",
    f"{ROWS} rows.jsonl --output file/scores.jsonl": "file/scores.jsonl: got a file that cannot be written",
    "score --model model --tasks nowhere.yaml --rows rows.jsonl": "nowhere.yaml",
    "world": "required: --output",
    "world --output folder": "folder: got a file that cannot be written",
    "world --output w --rows_per_task 0 --rows_of_others 0": "need at least 0, and a row",
    "train": "required: --output_dir",
    "train --config misspelt.yaml": "line 5: got the key 'lora_rnak'",
    "train --config quoted.yaml": "line 5: got trust_remote_code 'true', need true or false",
    "train --config list.yaml": "line 5: got seed [1], need a whole number",
    "train --config doubled.yaml": "line 6: got broken YAML (the key 'seed' stands in line 5 already)",
    "train --config train.yaml --base_model nowhere/at/all": "nowhere/at/all: got a folder that is not there",
    "train --config train.yaml --base_model file": "file: got a file, need a base model",
    "train --config train.yaml --tasks nowhere.yaml": "nowhere.yaml",
    "train --config train.yaml --phase1 {": "`phase1` of the recipe: got '{', need JSON",
    "eval --config train.yaml": "the training is not finished",
    "eval --config train.yaml --judges [1]": "`judges`: got a list, need name -> `kind`",
    "eval --config train.yaml --resamples few": "invalid int value: 'few'",
    f"{LABEL} lab": "`judge`: got None",
    f"{LABEL} lab --judge 3": "`judge`: got 3",
    f"{LABEL} lab {JUDGE} --max_cals 3": "did you mean --max_calls?",
    LABEL + """ lab --judge {"kind":"reward_model","model":"folder"}""": "folder: got a folder without config.json",
    f"{PREPARE} rows.jsonl": "rows.jsonl: got an output file that is an input too",
    f"{PREPARE} folder": "folder: got a file that cannot be written",
    f"{PREPARE} out.jsonl --columns 3": "`columns`: got '3', need names and values",
    f"{PREPARE} out.jsonl --tokenizer folder": "folder: got a folder without a tokenizer",
    f"{PREPARE} out.jsonl --router base": "base: got a model of type 'qwen2', need a DMoERM",
}


@pytest.mark.parametrize("command", WRONG)
def test_what_is_wrong_is_a_line_or_two(folder, command, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as ended:
        run(main, command.split(" "))
    assert ended.value.code in (1, 2)
    shown = capsys.readouterr().err
    assert WRONG[command] in shown
    assert shown.count("\n") <= 2 and "Traceback" not in shown and shown.startswith("dmoerm")
    assert (folder / "rows.jsonl").read_text().startswith('{"prompt": "Hi?"')
    assert not {"run", "lab", "out.jsonl"} & {path.name for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_script(command):
    assert find_spec(f"dmoerm_trl.scripts.{command.replace('-', '_')}") is not None
