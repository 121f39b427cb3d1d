"""From what a user wrote to checked settings: YAML, overrides, notebook parameters."""

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from dmsae_lib.store.artifacts import UserError

Model = TypeVar("Model", bound=BaseModel)
KINDS = {str: "text", int: "a whole number", bool: "true or false", list: "a list of text"}
SAID = {  # where pydantic's own words do not tell what to write
    "string_pattern_mismatch": "must be letters, digits, '_' and '-', a letter or digit first",
    "too_short": "needs one entry at least",
}
# One override: what is in quotes stays together, and so does whatever stands before the next ` section.key=`.
OVERRIDE = re.compile(r"""(?:(?<!\w)(?:"[^"]*"|'[^']*')|(?!\s+[A-Za-z_][\w.]*=).)+""", re.DOTALL)


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error, where PyYAML takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        if twice := [key for n, key in enumerate(keys) if key in keys[:n]]:
            raise yaml.YAMLError(f"the key {twice[0]} is there twice: keep one of the two")
        return super().construct_mapping(node, deep)


def split_overrides(text: str) -> list[str]:
    """``"training.k=32 model.name=my model"`` as a list of two overrides."""
    return [found.strip() for found in OVERRIDE.findall(text) if found.strip()]


def expect(kind: type, **parameters: Any) -> None:
    """Raises UserError unless every parameter of a notebook is of ``kind``; items of a list must be text.

    papermill itself makes a number of ``2024_01`` and hands on as text what should be a list.
    """
    for name, value in parameters.items():
        held = list if type(value) is tuple else type(value)
        if held is not kind or kind is list and not all(isinstance(item, str) for item in value):
            raise UserError(
                f"The parameter {name} is {value!r}, but must be {KINDS[kind]}: papermill takes text by -r, "
                f"all else by -y, as in -r run 2024_01 and -y 'overrides: [\"training.k=32\"]'."
            )


def read_tree(path: Path, overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """The settings in a YAML file, with ``section.key=value`` overrides applied. Raises UserError."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    # a date that is none, bytes that are no text, bottomless nesting
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no settings: it must be a YAML mapping.")
    tree.setdefault("name", path.stem)
    for override in overrides:
        _apply(tree, override)
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"Override {override!r} is not of the form section.key=value.")
    *path, last = key.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise UserError(f"Override {override!r}: {part} is not a section of the configuration.")
    try:
        tree[last] = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())[:80]
        mend = f"the value is not valid YAML ({said}); mend it, or put it in quotes"
        raise UserError(f"Override {override!r}: {mend}.") from error


def validated(model: type[Model], tree: dict[str, Any], where: str, context: dict[str, Any]) -> Model:
    """``tree`` as a ``model``; raises UserError, one sentence that begins with ``where``."""
    try:
        return model.model_validate(tree, context=context)
    except ValidationError as error:
        raise UserError(_one_sentence(model, error, where)) from error


def _known_keys(model: type[BaseModel], location: tuple) -> list[str]:
    for part in location:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        for kind in (annotation, *get_args(annotation)):  # a section, or a list of them
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                model = kind
    return list(model.model_fields)


def _one_sentence(model: type[BaseModel], error: ValidationError, where: str) -> str:
    found = error.errors()  # an unknown key first: it is often the missing one, misspelt
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _known_keys(model, first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known there: {', '.join(known)}."
        return f"{where}: unknown key {key}; {hint}"
    if first["type"] == "missing":
        return f"{where}: the key {key} is missing; add it."
    if first["type"] == "value_error":
        return f"{where}: {key}{' ' if key else ''}{first['ctx']['error']}."
    but = SAID.get(first["type"], first["msg"][0].lower() + first["msg"][1:])
    return f"{where}: {key} is {first['input']!r}, but {but}."
