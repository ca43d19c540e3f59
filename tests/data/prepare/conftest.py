import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dmoerm_trl.data.preference_row import PreferenceRow
from dmoerm_trl.data.prepare.audit import PartAudit
from dmoerm_trl.data.prepare.preparation import Preparation
from dmoerm_trl.data.prepare.reading import open_set
from dmoerm_trl.data.prepare.sets import SETS


@pytest.fixture
def write(tmp_path) -> Callable[..., str]:
    """Writes examples as a JSONL file and returns its path."""

    def write(examples: list[dict], name: str = "source.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def prepare(write) -> Callable[..., tuple[list[PreferenceRow], PartAudit]]:
    """The rows of examples of a set, read from a file of them, and their audit."""

    def prepare(name: str, examples: list[dict], options: dict | None = None, split: str = "train", **settings):
        preference_set = SETS[name].with_options(options or {})
        preparation, audit = Preparation(preference_set, **settings), PartAudit()
        dataset = open_set(write(examples), streaming=preference_set.consecutive)
        return list(preparation.rows(dataset, audit, split=split, source="set")), audit

    return prepare


@pytest.fixture(autouse=True)
def no_cache_outside(tmp_path, monkeypatch) -> None:
    """What `datasets` writes when it reads a file by index stays in the test's folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path(tmp_path / "cache"))
