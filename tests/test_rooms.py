"""The order of the rooms: what a room may import, and that no two modules import each other."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "dropit_fx"

# From below to above: a room imports from rooms below it. Rooms of one line stand side by side.
ORDER = (
    ("private_lookup", "logs", "words", "yaml_files"),
    ("private_names",),
    ("private",),
    ("private_hooks", "private_inductor"),
    ("holders",),
    ("kernels", "measure", "loss"),
    ("schedule",),
    ("ops",),
    ("codecs",),
    ("rules",),
    ("config", "presets"),
    ("schema",),
    ("runtime",),
    ("pointwise",),
    ("capture",),
    ("passes",),
    ("rewriting",),
    ("planner",),
    ("report",),
    ("api", "auto_plan", "compile", "eager", "selective"),
    ("check",),
    ("bench", "integrations"),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
ALIASES = ("backend", "graph_module", "packed_call", "partition")  # names of before
MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix().removesuffix("/__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent != PACKAGE or path.stem not in (*ALIASES, "__init__")
} | {f"passes/{p.stem}".removesuffix("/__init__"): p for p in (PACKAGE / "passes").glob("*.py")}


def imports(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """The modules of the package that these nodes import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, *parts = name.split(".")
            if first == "dropit_fx":
                found = ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]
                yield from [module for module in found if module in MODULES][:1]


ROOMS = [path for path in sorted(PACKAGE.iterdir()) if (path / "__init__.py").exists()]
TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}


def room(module: str) -> str:
    return module.partition("/")[0]


def test_every_module_has_its_room() -> None:
    assert {room(module) for module in MODULES} <= set(LEVEL)
    assert len(MODULES) > 80


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_from_rooms_below_it(module: str) -> None:
    for name in imports(ast.walk(TREES[module])):
        same = room(name) == room(module)
        assert same or LEVEL[room(name)] < LEVEL[room(module)], f"{module} imports {name}"


def test_no_two_modules_import_each_other() -> None:
    """When they are loaded: a method may import what draws its object."""
    loaded = {module: set(imports(tree.body)) - {module} for module, tree in TREES.items()}
    TopologicalSorter(loaded).prepare()  # raises CycleError, which names them


def test_every_room_says_what_it_is_for() -> None:
    for path in ROOMS:
        said = ast.get_docstring(ast.parse((path / "__init__.py").read_text())) or ""
        assert len(said.splitlines()) > 1, f"{path.name}/__init__.py says too little"


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.name)
def test_the_tests_of_a_room_stand_in_its_folder(path: Path) -> None:
    assert [*(PACKAGE.parent / "tests" / path.name).glob("test_*.py")]


def bound(tree: ast.Module) -> set[str]:
    """The names that a module has."""
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and type(n.ctx) is ast.Store}
    made = (ast.FunctionDef, ast.ClassDef)
    imported = (
        a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names
    )
    return names | {n.name for n in tree.body if isinstance(n, made)} | {*imported}


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.name)
def test_what_others_import_from_a_room_is_what_it_says(path: Path) -> None:
    said = ast.get_docstring(ast.parse((path / "__init__.py").read_text())) or ""
    named = set(re.findall(r"``([\w.]+)``", said))
    inside = {module: tree for module, tree in TREES.items() if room(module) == path.name}
    others = [tree for module, tree in TREES.items() if module not in inside]
    asked = {n for tree in others for n in imports(ast.walk(tree)) if n in inside and "/" in n}
    assert {module.split("/")[1] for module in asked} <= named
    parts = {part for module in MODULES for part in module.split("/")}
    assert named <= parts | {name for tree in inside.values() for name in bound(tree)}


def test_names_of_before_are_the_modules_of_the_rooms() -> None:
    """In a process of its own: here other tests may have imported them."""
    code = f"import dropit_fx; print(*[getattr(dropit_fx, n).__name__ for n in {ALIASES}])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    named = [name.rpartition(".") for name in done.stdout.split()]
    assert [name for _, _, name in named] == list(ALIASES)
    assert {package.removeprefix("dropit_fx.") for package, _, _ in named} <= set(LEVEL)
