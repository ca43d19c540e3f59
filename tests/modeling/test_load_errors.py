"""Models that cannot be read: a line that names them and the way out."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import AutoTokenizer

from dmoerm_trl.modeling.load_errors import check_place, loading
from dmoerm_trl.modeling.modeling_dmoerm import DMoERMForSequenceClassification


def config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def without(pattern: str) -> Callable[[Path], None]:
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


@pytest.fixture
def folder(dmoerm, tokenizer, tmp_path) -> Path:
    dmoerm.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def read(name: str) -> None:
    with loading(name, "a DMoERM", "dmoerm"):
        DMoERMForSequenceClassification.from_pretrained(name)
        AutoTokenizer.from_pretrained(name)


BROKEN = {
    "no config": (without("config.json"), "got a folder without config.json, need a DMoERM, a folder as"),
    "config cut off": (write("config.json", b"{"), "config.json: got broken JSON .*: save the model again"),
    "config that is a list": (write("config.json", b"[]"), "config.json: got broken JSON"),
    "config that is not UTF-8": (write("config.json", b'{"a": "\xff"}'), "config.json: got broken JSON"),
    "another architecture": (config(model_type="qwen2"), "got a model of type 'qwen2', need a DMoERM.*another folder"),
    "no type": (config(model_type=None), "got a model of type None, need a DMoERM"),
    "no tasks": (config(tasks=None), "got a configuration without `tasks`"),
    "other tasks": (config(tasks={"a": ["b"]}), "got 45 missing keys .*: save it again"),
    "a base of an unknown type": (
        config(backbone_config={"model_type": "zork"}),
        "got the configuration of a backbone with model_type=.zork.",
    ),
    "no weights": (without("*.safetensors"), "cannot be read .*no file named model.safetensors.*: save it again"),
    "empty weights": (write("model.safetensors", b""), "cannot be read .*header too small.*: save it again"),
    "weights cut off": (lambda f: os.truncate(f / "model.safetensors", 20_000), "cannot be read .*invalid header"),
    "no tokenizer": (without("tokenizer*"), "got a folder without a tokenizer, need a DMoERM: .*in one folder"),
    "tokenizer cut off": (write("tokenizer.json", b"{"), "cannot be read .*: save it again"),
    "tokenizer of another kind": (write("tokenizer.json", b"{}"), "cannot be read"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder(folder, what):
    read(str(folder))
    breaks, says = BROKEN[what]
    breaks(folder)
    with pytest.raises(ValueError, match=f"^{folder}.*{says}") as error:
        read(str(folder))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "got the empty name '' of a model"),
        ("FOLDER/config.json", "got a file, need a DMoERM.*name its folder"),
        ("FOLDER/..", "got a folder without config.json.*: did you mean FOLDER/../model?"),
        ("/no/such", "^/no/such: got a folder that is not there, .*: fix the path"),
        ("./no", "got a folder that is not there"),
        ("a/b/c", "got a folder that is not there"),
        ("some/set", "some/set: got no folder, and a hub name that is not in the cache while .*need a DMoERM"),
        ("no such", "^no such: got neither a folder nor a hub name, need a DMoERM: fix the name"),
    ],
)
def test_a_name_that_is_no_folder(folder, name, says):
    with pytest.raises(ValueError, match=says.replace("FOLDER", str(folder))):
        read(name.replace("FOLDER", str(folder)))


def hub_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "a page of text")
    return error


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (LocalEntryNotFoundError, "not in the cache while .*: (unset it|check the network), or name a folder"),
        (RepositoryNotFoundError, "the hub does not know or does not show, .*hf auth login"),
    ],
)
def test_what_the_hub_says_stands_behind_the_librarys_error(kind, says):
    with (
        pytest.raises(ValueError, match=f"^some/model: got no folder, and a hub name that .*{says}"),
        loading("some/model"),
    ):
        try:
            raise hub_error(kind)
        except Exception as error:
            raise OSError("We couldn't connect") from error


def test_code_of_its_own_has_a_setting(folder):
    with pytest.raises(ValueError, match="brings code of its own, .*`trust_remote_code: true`"), loading(str(folder)):
        raise ValueError("please pass the argument trust_remote_code=True")


def test_a_tokenizer_needs_no_configuration(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="without config.json"):
        check_place(str(tmp_path / "tokenizer"))
    with loading(str(tmp_path / "tokenizer"), "a tokenizer", config=False):
        AutoTokenizer.from_pretrained(str(tmp_path / "tokenizer"))
    shutil.rmtree(tmp_path / "tokenizer")


def test_a_missing_package_is_said_by_its_own_error(folder):
    with pytest.raises(ImportError, match="pip install"), loading(str(folder)):
        raise ImportError("pip install vllm")
