"""Who imports whom: no circles, between modules or between folders, and arrows that point one way."""

import ast
import functools
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tilebook"


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in PACKAGE.rglob("*.py")}


def _imports(tree: ast.AST, lazy: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """What is imported with the module, and with `lazy` what its functions import; not what type checkers alone see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
            continue
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        checked = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not checked and (lazy or not function):
            yield from _imports(node, lazy)


@functools.cache
def imported(module: str, lazy: bool) -> set[str]:
    """The modules of the package that a module imports by name."""
    found = set()
    for node in _imports(ast.parse(MODULES[module].read_text(encoding="utf-8")), lazy):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif node.module is not None:
            assert node.level == 0, f"{module} imports relatively"
            found |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in MODULES else node.module for a in node.names
            }
    return {name for name in found if name in MODULES and name != module}


def room(module: str) -> str:
    """The folder that a module is in; a module right in the package is a room of its own, and so is a kernel family."""
    folder = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    if folder.startswith("tilebook.kernels."):
        return ".".join(folder.split(".")[:3])
    return module if folder == "tilebook" else folder


def rooms() -> dict[str, set[str]]:
    """Who imports whom, by folder, functions' imports included. The package's own lazy exports do not count."""
    edges: dict[str, set[str]] = {room(module): set() for module in MODULES}
    for module in MODULES:
        edges[room(module)] |= {room(other) for other in imported(module, lazy=True)} - {room(module)}
    return edges


def circle(edges: dict[str, set[str]]) -> list[str]:
    """One that is there, or none."""
    try:
        list(graphlib.TopologicalSorter(edges).static_order())
    except graphlib.CycleError as found:
        return list(found.args[1])
    return []


def test_no_modules_import_each_other():
    assert circle({module: imported(module, lazy=False) for module in MODULES}) == []


def test_no_folders_import_each_other():
    assert circle(rooms()) == []


def inside(name: str, *folders: str) -> bool:
    return any(name == folder or name.startswith(f"{folder}.") for folder in folders)


@pytest.mark.parametrize(
    ("what", "who"),
    [
        ("tilebook.cli", ["tilebook.cli", "tilebook.__main__"]),
        ("tilebook.report", ["tilebook.report", "tilebook.cli", "tilebook.revocation", "tilebook.scripted"]),
        (
            "tilebook.tuner",
            [
                "tilebook.tuner",
                "tilebook.dispatch",
                "tilebook.report",
                "tilebook.recheck",
                "tilebook.scripted",
                "tilebook.cli",
            ],
        ),
        ("tilebook.tuner.sweeps", ["tilebook.tuner.sweeps", "tilebook.cli"]),
        ("tilebook.tuner.cluster", ["tilebook.tuner.cluster", "tilebook.cli"]),
        (
            "tilebook.foreign",
            [
                "tilebook.foreign",
                "tilebook.autoload",
                "tilebook.inventory",
                "tilebook.report",
                "tilebook.scripted",
                "tilebook.cli",
            ],
        ),
    ],
)
def test_only_the_layers_above_know_a_layer(what, who):
    knowing = {name for name, others in rooms().items() if any(inside(other, what) for other in others)}
    assert {name for name in knowing if not inside(name, *who)} == set()


@pytest.mark.parametrize(
    ("who", "what"),
    [
        ("tilebook.registry", ["tilebook.registry", "tilebook.errors"]),
        ("tilebook.tuner.judge", ["tilebook.tuner.judge", "tilebook.op", "tilebook.errors", "tilebook.replay"]),
    ],
)
def test_a_layer_knows_no_more_than_it_must(who, what):
    known = {other for name, others in rooms().items() if inside(name, who) for other in others}
    assert {name for name in known if not inside(name, *what)} == set()


def test_dispatch_knows_of_the_tuner_how_candidates_compile_and_are_judged_and_only_where_it_probes():
    known = {module: imported(module, lazy=True) for module in MODULES if inside(module, "tilebook.dispatch")}
    above = {name: {each for each in others if inside(each, "tilebook.tuner")} for name, others in known.items()}
    assert {name: others for name, others in above.items() if others} == {
        "tilebook.dispatch.probing": {
            "tilebook.tuner.process.compile", "tilebook.tuner.judge.stats", "tilebook.tuner.judge.verify"
        },
        "tilebook.dispatch.settling": {"tilebook.tuner.judge.stats"},
    }  # fmt: skip


def test_kernels_know_neither_tuner_nor_registry():
    known = {other for name, others in rooms().items() if inside(name, "tilebook.kernels") for other in others}
    above = ("tilebook.tuner", "tilebook.registry", "tilebook.report", "tilebook.cli")
    assert not [name for name in known if inside(name, *above)]


def test_functions_of_kernels_have_no_more_than_twenty_parameters():
    many = {}
    for file in sorted((PACKAGE / "kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
                if count > 20:
                    many[f"{file.name}:{node.name}"] = count
    assert many == {}
