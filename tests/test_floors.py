"""The one-way rule of the library: a module imports only from floors below its own."""

import ast
import re
from pathlib import Path

import dmsae_lib

FOLDER = Path(dmsae_lib.__file__).parent
BEHIND_MAKE = {"plan", "run_notebook", "run_lock", "manage"}
WITHIN = {("config", "artifacts"), ("config", "settings"), ("config_file", "artifacts"), ("base_model", "corpus"),
          ("corpus", "text_files"), ("language_model", "model_checks")}  # pairs on one floor, named in order there


def floors() -> dict[str, int]:
    """Module: floor, from the package's docstring; `and its parts` are the modules whose names begin likewise."""
    found = {}
    for number, text in re.findall(r"^(\d)\. (.*(?:\n   .*)*)", dmsae_lib.__doc__, flags=re.M):
        for name in re.findall(r"``(\w+)``", text):
            for path in FOLDER.glob("*.py"):
                if path.stem == name or re.search(rf"``{name}`` and its (parts|stages)", text) and path.stem.startswith(name):
                    found[path.stem] = int(number)
    return found | {name: found["plots"] for name in ("plot_style", "schematic")}


def imports(path: Path) -> set[str]:
    """Modules of the library that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "dmsae_lib":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dmsae_lib."):
            found.add(node.module.split(".")[1])
    return found


def test_every_module_has_a_floor():
    modules = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    assert modules - BEHIND_MAKE == set(floors())


def test_imports_go_down():
    level = floors()
    top, wrong = max(level.values()), []
    for name, floor in level.items():
        for other in imports(FOLDER / f"{name}.py"):
            inside = floor == top and level.get(other) == top or name.startswith(other.split("_")[0]) or (name, other) in WITHIN
            if other in BEHIND_MAKE or level[other] > floor or (level[other] == floor and not inside):
                wrong.append(f"{name} imports {other}")
    assert not wrong
