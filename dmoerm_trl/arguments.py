"""Parse the options of a program, which are dataclasses, from the command line and from a YAML file."""

import argparse
import json
import os
import reprlib
import sys
import types
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from enum import Enum
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from .yaml_file import read_yaml


class Parser(HfArgumentParser):
    """
    Transformers' parser of dataclasses that also reads a YAML file, as TRL's parser does: `--config FILE`. The command line
    overrides the file, and the file's key `env` sets environment variables.

    A mistake on the command line ends the program with status 2 and a one-line message. A mistake in the file raises a
    `ValueError` that names the file, the line and the key. `set_defaults(config=FILE)` sets the file that is read without
    `--config`.

    Args:
        dataclasses (`Iterable[type]`): The dataclasses whose fields are the options.
        prog (`str`): Name of the program in messages.
        options: Further arguments of `argparse.ArgumentParser`, such as `description`.

    Example:

    ```python
    from dataclasses import dataclass

    from dmoerm_trl import Parser

    @dataclass
    class Options:
        n: int = 1

    (options,) = Parser((Options,), prog="mine.py").parse(["--n", "3"])
    assert options.n == 3
    ```
    """

    def __init__(self, dataclasses: Iterable[type], *, prog: str, **options: Any):
        dataclasses = tuple(dataclasses)
        super().__init__(dataclasses, prog=prog, allow_abbrev=False, **options)
        self.hints = {
            field.name: get_type_hints(one)[field.name] for one in dataclasses for field in fields(one) if field.init
        }
        self.add_argument("--config", metavar="FILE", help="YAML file of these options.")
        for action in self._actions:
            if (get_origin(action.type) or action.type) is dict:
                action.type = _json_object

    def parse(self, argv: Sequence[str] | None = None, *, pass_over_unknown: bool = False) -> tuple[Any, ...]:
        """
        Parse the options.

        Args:
            argv (`Sequence[str]`, *optional*): The arguments; `sys.argv[1:]` by default.
            pass_over_unknown (`bool`): Whether to ignore options that no dataclass has, because another parser reads them.

        Returns:
            One instance of each dataclass.
        """
        argv = list(sys.argv[1:] if argv is None else argv)
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.error = self.error
        first.add_argument("--config", default=self.get_default("config"))
        known, _ = first.parse_known_args(argv)
        if known.config is not None:
            self.set_from_file(known.config, pass_over_unknown)
        *parsed, _, unknown = self.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown and not pass_over_unknown:
            options = [option for option in self._option_string_actions if option.startswith("--")]
            name = unknown[0].partition("=")[0]
            self.error(f"got {name!r}, which is not an option{_nearest(name, options)}")
        for one in parsed:
            self._check_not_blank(one)
        return tuple(parsed)

    def _check_not_blank(self, options: Any) -> None:
        """Refuse an empty value of a required option: an empty path would mean the current folder."""
        for field in fields(options):
            value = getattr(options, field.name)
            required = field.default is MISSING and field.default_factory is MISSING
            if required and isinstance(value, str) and not value.strip():
                self.error(f"got {field.name} {value!r}, need one that is not empty")

    def set_from_file(self, path: str | os.PathLike, pass_over_unknown: bool = False) -> None:
        """
        Set the defaults of the options from a YAML file.

        Raises:
            ValueError: If a key is unknown or a value has the wrong type.
        """
        content, lines = read_yaml(path)
        environment = content.pop("env", None) or {}
        if not isinstance(environment, dict):
            raise ValueError(
                f"{path}, line {lines['env']}: `env`: got {reprlib.repr(environment)}, need names and values."
            )
        os.environ.update({str(name): str(value) for name, value in environment.items()})
        values = {}
        for key, value in content.items():
            place = f"{path}, line {lines[key]}" if key in lines else str(path)
            if key not in self.hints:
                if pass_over_unknown:
                    continue
                nearest = _nearest(key, self.hints) or "."
                raise ValueError(
                    f"{place}: got the key {key!r}, need one that `{self.prog} --help` lists, and it has no --{key}{nearest}"
                )
            try:
                values[key] = fit(value, self.hints[key])
            except ValueError as error:
                raise ValueError(f"{place}: got {key} {reprlib.repr(value)}, need {error}.") from error
        self.set_defaults(**values)
        for action in self._actions:
            action.required = action.required and action.dest not in values

    def error(self, message: str) -> NoReturn:
        self.exit(
            2,
            f"{self.prog}: error: {message.rstrip('.?')}{'?' if message.endswith('?') else '.'}\n"
            f"`{self.prog} --help` lists the options.\n",
        )


def asks_for_help(argv: Sequence[str] | None) -> bool:
    """Return whether the arguments (`sys.argv[1:]` for None) ask for `--help`, which needs no heavy imports."""
    return not {"-h", "--help"}.isdisjoint(sys.argv[1:] if argv is None else argv)


def fit(value: Any, hint: Any) -> Any:
    """
    Convert a value of a YAML file to the annotated type of a field. Text that reads as a number becomes a number, because YAML
    reads 1e-7 as text. A number becomes text where text is needed, and a single value becomes a list of one.

    Raises:
        ValueError: If the value does not fit; the message says what is needed.
    """
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        needs = []
        exact = [one for one in arguments if type(value) is (get_origin(one) or one)]
        for one in (*exact, *arguments):
            try:
                return fit(value, one)
            except ValueError as error:
                needs.append(str(error))
        raise ValueError(", or ".join(dict.fromkeys(needs)))
    if origin is Literal or isinstance(origin, type) and issubclass(origin, Enum):
        choices = arguments if origin is Literal else [one.value for one in origin]
        if any(value == choice and type(value) is type(choice) for choice in choices):
            return value
        raise ValueError(f"one of {', '.join(map(repr, choices))}")
    if origin is list:
        if isinstance(value, dict) or value is None:
            raise ValueError("a list")
        return [
            fit(one, arguments[0]) if arguments else one for one in (value if isinstance(value, list) else [value])
        ]
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError("`key: value` pairs")
        return {key: fit(one, arguments[1]) for key, one in value.items()} if arguments else value
    if origin in _FITTING:
        need, types_, convert = _FITTING[origin]
        if isinstance(value, types_) and (not isinstance(value, bool) or origin is bool):
            try:
                return convert(value)
            except ValueError:
                pass
        raise ValueError(need)
    if origin is types.NoneType and value is not None:
        raise ValueError("nothing")
    return value


_FITTING: dict[type, tuple[str, tuple[type, ...], Any]] = {
    bool: ("true or false, without quotes", (bool,), bool),
    int: ("a whole number", (int, str), int),
    float: ("a number", (int, float, str), float),
    str: ("text", (str, int, float), str),
}
"""Type -> name of what is needed, the types of YAML values that can be converted, and the conversion."""


def _json_object(text: str) -> dict[str, Any]:
    """Parse an option that holds keys and values, written as JSON on the command line."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r:.80}, need JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"got {text!r:.80}, need a JSON object")
    return value


def _nearest(name: str, names: Iterable[str]) -> str:
    found = get_close_matches(name, list(names), n=1, cutoff=0.7)
    return f": did you mean {found[0]}?" if found else ""
