"""Options from the command line and from a YAML file, checked alike."""

import os
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoerm_trl.arguments import Parser, fit


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Options:
    name: str = field(metadata={"help": "A name."})
    count: int = 3
    share: float = 0.5
    trust: bool = False
    modules: list[str] = field(default_factory=lambda: ["q"])
    limit: int | None = None
    kind: Literal["grpo", "rloo"] = "grpo"
    weights: dict[str, float] | None = None
    either: dict[str, Any] | str | None = None


def parse(tmp_path, content: str, *argv: str) -> Options:
    path = tmp_path / "recipe.yaml"
    path.write_text(content, encoding="utf-8")
    (options,) = Parser((Options,), prog="program").parse(["--config", str(path), *argv])
    return options


@pytest.mark.parametrize(
    ("content", "name", "value"),
    [
        ("count: 4", "count", 4),
        ("count: '4'", "count", 4),
        ("share: 1e-7", "share", 1e-7),  # text, as YAML reads it
        ("share: 1", "share", 1.0),
        ("trust: yes", "trust", True),
        ("modules: q_proj", "modules", ["q_proj"]),
        ("modules: [q_proj, 3]", "modules", ["q_proj", "3"]),
        ("limit:", "limit", None),
        ("limit: 7", "limit", 7),
        ("kind: rloo", "kind", "rloo"),
        ("weights: {logic: 1}", "weights", {"logic": 1.0}),
        ("either: {a: [1]}", "either", {"a": [1]}),
        ("either: folder", "either", "folder"),
        ("name: 12", "name", "12"),
        ("name: caf\u00e9 \u5e7d\u9ed8", "name", "caf\u00e9 \u5e7d\u9ed8"),
    ],
)
def test_values_of_a_file(tmp_path, content, name, value):
    options = parse(tmp_path, content if content.startswith("name") else f"name: x\n{content}")
    assert getattr(options, name) == value and type(getattr(options, name)) is type(value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("count: many", "line 2: got count 'many', need a whole number"),
        ("count: 1.5", "line 2: got count 1.5, need a whole number"),
        ("count: true", "line 2: got count True, need a whole number"),
        ("count: [4]", r"line 2: got count \[4\], need a whole number"),
        ("count:", "line 2: got count None, need a whole number"),
        ("share: high", "line 2: got share 'high', need a number"),
        ("trust: 'true'", "line 2: got trust 'true', need true or false, without quotes"),
        ("trust: 1", "line 2: got trust 1, need true or false"),
        ("trust: [no]", "line 2: got trust .False., need true or false"),
        ("modules: {a: 1}", "line 2: got modules .*, need a list"),
        ("modules: [[a]]", "line 2: got modules .*, need text"),
        ("limit: x", "line 2: got limit 'x', need a whole number, or nothing"),
        ("kind: ppo", "line 2: got kind 'ppo', need one of 'grpo', 'rloo'"),
        ("weights: 3", "line 2: got weights 3, need `key: value` pairs"),
        ("weights: {logic: high}", "line 2: got weights .*, need a number"),
        ("either: [1]", "line 2: got either .*, need `key: value` pairs, or text"),
        ("cuont: 3", "line 2: got the key 'cuont', .*has no --cuont: did you mean count?"),
        ("zork: 3", "line 2: got the key 'zork', need one that `program --help` lists"),
        ("count: 3\ncount: 4", "line 3: got broken YAML .the key 'count' stands in line 2 already"),
        ("count: {a: 1, a: 2}", "line 2: got broken YAML .the key 'a' stands in line 2 already"),
        ("count: [", "line 2: got broken YAML"),
        ("count: !!python/object/apply:os.getcwd []", "line 2: got broken YAML .could not determine a constructor"),
        ("env: 3", "line 2: `env`: got 3, need names and values"),
        ("7: 8", "got the key 7, need .*text"),
        ("---\na: 1", "got broken YAML"),
        ("name: [" + "[" * 3000, "got broken YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(tmp_path, content, says):
    with pytest.raises(ValueError, match=rf"recipe\.yaml.*{says}") as error:
        parse(tmp_path, f"name: x\n{content}")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("content", ["", "- a", "a", "# nothing"])
def test_a_file_that_is_no_mapping_is_an_error(tmp_path, content):
    with pytest.raises(ValueError, match="recipe.yaml: got .*, need one YAML mapping"):
        parse(tmp_path, content)


def test_aliases_that_unfold_to_too_much_are_an_error(tmp_path):
    content = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    for before, now in ("ab", "bc", "cd", "de", "ef"):
        content += f"{now}: &{now} [{', '.join([f'*{before}'] * 10)}]\n"
    with pytest.raises(ValueError, match="more than 100,000 values"):
        parse(tmp_path, content)
    with pytest.raises(ValueError, match="recursion"):
        parse(tmp_path, "name: &a [*a]\n")


def test_aliases_and_merges_are_read(tmp_path):
    options = parse(tmp_path, "name: x\nweights: &w {logic: 1}\neither: {<<: *w, more: 2}\n")
    assert options.either == {"logic": 1, "more": 2}


def test_the_command_line_overrides_the_file(tmp_path):
    options = parse(tmp_path, "name: x\ncount: 4\nmodules: [a]\n", "--count", "5", "--modules", "b", "c", "--trust")
    assert (options.count, options.modules, options.trust) == (5, ["b", "c"], True)
    assert parse(tmp_path, "name: x\n", '--weights={"logic": 2}').weights == {"logic": 2}


def test_a_file_by_an_equals_sign_and_by_default(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: from the file\nenv: {DMOERM_TEST_VARIABLE: 3}\n")
    parser = Parser((Options,), prog="program")
    assert parser.parse([f"--config={path}"])[0].name == "from the file"
    parser = Parser((Options,), prog="program")
    parser.set_defaults(config=str(path))
    assert parser.parse([])[0].name == "from the file"
    assert os.environ.pop("DMOERM_TEST_VARIABLE") == "3"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--cuont", "3"], "got '--cuont', which is not an option: did you mean --count?"),
        (["--coun", "3"], "got '--coun', which is not an option: did you mean --count?"),
        (["stray"], "got 'stray', which is not an option."),
        (["--count", "x"], "argument --count: invalid int value: 'x'."),
        (["--count"], "argument --count: expected one argument."),
        (["--trust", "perhaps"], "expected one of yes/no"),
        (["--kind", "ppo"], "invalid choice: 'ppo'"),
        (["--weights", "{"], "need JSON"),
        (["--weights", "3"], "need a JSON object"),
        (["--config"], "argument --config: expected one argument."),
    ],
)
def test_what_is_wrong_on_the_command_line_ends_with_status_2_and_a_line(argv, says, capsys):
    with pytest.raises(SystemExit) as ended:
        Parser((Options,), prog="program").parse(["--name", "x", *argv])
    assert ended.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("program: error: ") and says in first
    assert second == "`program --help` lists the options."


def test_a_missing_option_is_named(capsys):
    with pytest.raises(SystemExit):
        Parser((Options,), prog="program").parse([])
    assert "required: --name" in capsys.readouterr().err


@pytest.mark.parametrize("blank", ["", "  "])
def test_what_has_to_be_given_cannot_be_empty(blank, tmp_path, capsys):
    with pytest.raises(SystemExit):
        Parser((Options,), prog="program").parse(["--name", blank])
    assert capsys.readouterr().err.startswith(f"program: error: got name {blank!r}, need one that is not empty.")
    with pytest.raises(SystemExit):
        parse(tmp_path, f"name: {blank!r}")


def test_another_parsers_options_are_passed_over(tmp_path):
    (tmp_path / "r.yaml").write_text("kind: rloo\nlearning_rate: 1\n")
    argv = ["--config", str(tmp_path / "r.yaml"), "--name", "x", "--max_steps", "3"]
    assert Parser((Options,), prog="program").parse(argv, pass_over_unknown=True)[0].kind == "rloo"


YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
HINTS = [bool, int, float, str, list[str], list[int], list, dict[str, float], dict[str, Any], int | None, float | None,
         bool | None, str | None, dict[str, Any] | str | None, list[str] | str | None, Literal["a", 1], Colour, Colour | str]  # fmt: skip


def is_of(value: Any, hint: Any) -> bool:
    simple = {bool: bool, int: int, float: float, str: str}
    if hint in simple:
        return type(value) is simple[hint]
    if getattr(hint, "__origin__", hint) is list:
        inner = getattr(hint, "__args__", (None,))[0]
        return isinstance(value, list) and all(inner is None or is_of(one, inner) for one in value)
    if getattr(hint, "__origin__", None) is dict:
        return isinstance(value, dict) and (hint.__args__[1] is Any or all(is_of(v, float) for v in value.values()))
    if hint is Literal["a", 1]:
        return value in ("a", 1) and not isinstance(value, (bool, float))
    if hint is Colour:
        return value in ("red", "blue")
    return value is None if hint is type(None) else any(is_of(value, one) for one in hint.__args__)


@given(YAML_VALUES, st.sampled_from(HINTS))
def test_a_value_fits_or_is_refused_with_what_is_needed(value, hint):
    try:
        found = fit(value, hint)
    except ValueError as error:
        assert str(error)
    else:
        assert is_of(found, hint)
