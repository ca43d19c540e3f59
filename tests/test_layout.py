"""The package's layout: imports run one way, the public names are what they say, and the examples are short."""

import ast
from pathlib import Path

import pytest

import dmoerm_trl

ROOT = Path(dmoerm_trl.__file__).parent
EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))

LAYERS = [
    {"tasks", "files", "messages", "console", "arguments", "yaml_file", "auto_classes", "markdown"},
    {"distributed"},
    {"modeling"},
    {"data"},
    {"generation"},
    {"scoring"},
    {"training"},
    {"evaluation"},
    {"labelling"},
    {"rl"},
    {"demo"},
    {"commands"},
    {"scripts"},
    {"cli"},
]
"""Folders and files of the package; each imports from its own layer and those before it."""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in ROOT.rglob("*.py")}


def imports_of(module: str, *, when_run: bool) -> set[str]:
    """
    The modules of the package that a module imports, but for those that a type checker alone reads.

    Args:
        when_run: Whether imports within functions count too.
    """
    path = MODULES[module]
    package = path.relative_to(ROOT).parent.parts
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not when_run:
                continue
            if isinstance(child, ast.ImportFrom):
                base = [] if not child.level else list(package[: len(package) - child.level + 1])
                name = child.module or ""
                if not child.level and name.split(".")[0] != "dmoerm_trl":
                    continue
                parts = base + name.removeprefix("dmoerm_trl").strip(".").split(".") if name else base
                target = ".".join(part for part in parts if part)
                inner = {f"{target}.{alias.name}".strip(".") for alias in child.names} & MODULES.keys()
                found.update(inner or {target} & MODULES.keys())
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found - {module, ""}


def layer(module: str) -> int:
    (found,) = (number for number, names in enumerate(LAYERS) if module.split(".")[0] in names)
    return found


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {""}))
def test_imports_run_one_way(module):
    upward = {other for other in imports_of(module, when_run=True) if layer(other) > layer(module)}
    assert not upward, f"{module} imports {sorted(upward)}, which stand above it"


def test_no_import_is_part_of_a_cycle():
    graph = {module: imports_of(module, when_run=False) for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a cycle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_what_is_read_of_a_module_that_imports_upward(monkeypatch, tmp_path):
    """The test's own eyes: relative and absolute imports, of modules and of names, within functions too."""
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "low.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nfrom ..rl import monitor\nif TYPE_CHECKING:\n    from ..cli import main\n"
        "def late():\n    from dmoerm_trl.scoring.batch import score_rows\n    from .rows import load_rows\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(MODULES, "data.low", path)
    assert imports_of("data.low", when_run=True) == {"rl.monitor", "scoring.batch", "data.rows"}
    assert imports_of("data.low", when_run=False) == {"rl.monitor"}


def test_type_checkers_see_the_public_names():
    stub = ast.parse((ROOT / "__init__.pyi").read_text(encoding="utf-8"))
    homes = {
        alias.asname: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert homes == {
        name: getattr(dmoerm_trl, name).__module__.removeprefix("dmoerm_trl.") for name in dmoerm_trl.__all__
    }
    assert (ROOT / "py.typed").is_file()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_and_imports_public_names_alone(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 41
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "dmoerm_trl":
            assert node.module == "dmoerm_trl"
            assert {alias.name for alias in node.names} <= set(dmoerm_trl.__all__)
