"""The one-way rule of the library: a room imports only from floors below, and nothing goes in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dmsae_lib

FOLDER = Path(dmsae_lib.__file__).parent
FLOORS = [
    ["store"],
    ["config"],
    ["data"],
    ["sae", "embedded"],
    ["interop"],
    ["distill", "saebench"],
    ["report"],
    ["figures"],
    ["atlas"],
    ["command"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """``room.module`` (``room`` for its own ``__init__``) and its file."""
    parts = {path: path.relative_to(FOLDER).with_suffix("").parts for path in FOLDER.rglob("*.py")}
    return {
        ".".join(p for p in names if p != "__init__"): path for path, names in parts.items() if len(names) > 1
    }


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The library's modules that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        inside = [name.removeprefix("dmsae_lib.") for name in names if name.startswith("dmsae_lib.")]
        # `from package import module` is an import of the module, not of the package that holds it
        deepest = [
            name
            for name in inside
            if not any(other.startswith(f"{name}.") and other in known for other in inside)
        ]
        found |= {name for name in deepest if name in known}
    return found


def test_every_module_is_in_a_room_on_a_floor():
    loose = [path.name for path in FOLDER.glob("*.py") if path.name != "__init__.py"]
    assert not loose
    assert {name.split(".")[0] for name in modules()} == set(FLOOR)


@pytest.mark.parametrize("room", FLOOR)
def test_imports_go_down(room):
    known = modules()
    wrong = [
        f"{name} imports {other}"
        for name, path in known.items()
        if name.split(".")[0] == room
        for other in imports(path, known)
        if (there := other.split(".")[0]) != room and FLOOR[there] >= FLOOR[room]
    ]
    assert not wrong


def test_nothing_goes_round_in_a_circle():
    known = modules()
    list(TopologicalSorter({name: imports(path, known) for name, path in known.items()}).static_order())
