"""Read YAML files strictly: one mapping, no duplicate key, and no aliases that expand to huge values."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import yaml

MOST = 100_000
"""Maximum number of values of a file with its aliases expanded."""


class YamlFile(NamedTuple):
    """Content of a file, and the line (from 1) of each of its outermost keys."""

    content: dict[str, Any]
    lines: dict[str, int]


def read_yaml(path: str | os.PathLike) -> YamlFile:
    """
    Read a YAML file in UTF-8 whose outermost level is a mapping.

    Raises:
        ValueError: If it is not one, has a duplicate key, or holds more than [`MOST`] values. The message names the file and
            the line.
        OSError: If the file cannot be read.
    """
    path, need = Path(path), "need one YAML mapping of `key: value`"
    try:
        text = path.read_text(encoding="utf-8-sig")
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if not isinstance(node, yaml.MappingNode):
                found = "an empty file" if node is None else f"{node.value!r:.60}" if node.id == "scalar" else "a list"
                raise ValueError(f"{path}: got {found}, {need}.")
            content = loader.construct_document(node)
        finally:
            loader.dispose()
        _check_size(content, MOST)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: got bytes that are not UTF-8 ({error}), {need} in UTF-8: save it as such."
        ) from error
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ValueError(f"{path}{line}: got broken YAML ({error.problem}), {need}: fix the line.") from error
    except (yaml.YAMLError, RecursionError, OverflowError) as error:
        what = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: got broken YAML ({what}), {need}: fix the file.") from error
    if other := [key for key in content if not isinstance(key, str)]:
        raise ValueError(f"{path}: got the key {other[0]!r:.60}, {need}, whose keys are text: put it in quotes.")
    return YamlFile(content, {key.value: key.start_mark.line + 1 for key, _ in node.value})


class _Loader(yaml.SafeLoader):
    """Safe loader that refuses a duplicate key in a mapping instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge" and key.id == "scalar"]
        seen: dict[str, int] = {}
        for key in keys:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands in line {seen[key.value]} already", key.start_mark
                )
            seen[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _check_size(value: Any, most: int) -> int:
    """Return how many more values are allowed after those of `value`."""
    most -= 1
    if most < 0:
        raise yaml.YAMLError(f"more than {MOST:,} values when its aliases are expanded")
    for part in (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ():
        most = _check_size(part, most)
    return most
