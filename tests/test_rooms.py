"""The order of the rooms: what a room may import, and that no two modules import each other."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "dropit_fx"

# From below to above: a room imports from rooms below it. Rooms of one line stand side by side.
ORDER = (
    ("private_names", "logs", "words", "yaml_files"),
    ("private_table",),
    ("private",),
    ("private_hooks", "private_inductor"),
    ("kernels", "measure"),
    ("schedule",),
    ("ops",),
    ("codecs",),
    ("config", "presets"),
    ("runtime",),
    ("pointwise",),
    ("capture",),
    ("passes",),
    ("report",),
    ("api", "compile", "eager"),
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
    rooms = [path for path in PACKAGE.iterdir() if (path / "__init__.py").exists()]
    for path in rooms:
        said = ast.get_docstring(ast.parse((path / "__init__.py").read_text())) or ""
        assert len(said.splitlines()) > 1, f"{path.name}/__init__.py says too little"


def test_names_of_before_are_the_modules_of_the_rooms() -> None:
    """In a process of its own: here other tests may have imported them."""
    code = f"import dropit_fx; print(*[getattr(dropit_fx, n).__name__ for n in {ALIASES}])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    named = [name.rpartition(".") for name in done.stdout.split()]
    assert [name for _, _, name in named] == list(ALIASES)
    assert {package.removeprefix("dropit_fx.") for package, _, _ in named} <= set(LEVEL)
