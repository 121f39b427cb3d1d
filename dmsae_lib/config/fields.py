"""The kinds of values that settings have, beside plain numbers and texts."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, Field, PlainSerializer, ValidationInfo

from dmsae_lib.config.packaged import PACKAGED

EMBEDDED = Path(__file__).parents[1] / "embedded"  # language models that come with the package, a folder each
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Item = TypeVar("Item")


def one_of(names: Collection[str]) -> AfterValidator:
    """Accepts what is in the open list ``names`` at the time."""

    def known(name: str) -> str:
        if name not in names:
            raise ValueError(f"is {name!r}, but must be one of {', '.join(names)}")
        return name

    return AfterValidator(known)


def _each_once(values: list) -> list:
    if twice := [value for n, value in enumerate(values) if value in values[:n]]:
        raise ValueError(f"names {twice[0]} twice: it stands for a set, so name each once")
    return values


def _increasing(sizes: list[int]) -> list[int]:
    if any(b <= a for a, b in zip(sizes, sizes[1:])):
        raise ValueError(f"is {sizes}: the sizes must increase")
    return sizes


class _Place(str):
    """The full path of something local, which knows how the configuration wrote it."""

    written: str


def _place(value: str, info: ValidationInfo) -> str:
    """What ``value`` names below the context's ``base``; as it is where nothing lies there (a Hub name)."""
    base = (info.context or {}).get("base")
    if base is None or value in ("", "embedded", *PACKAGED) or (EMBEDDED / value / "config.json").is_file():
        return value
    place = _Place(os.path.normpath(os.path.join(base, os.path.expanduser(value))))
    if not os.path.exists(place):
        if os.path.exists(value):
            where = f"paths are relative to {base}, where there is no such thing"
            raise ValueError(f"is {value}: {where}; write its full path")
        return value
    # a copy of the YAML in the run's folder means the same
    place.written = value if info.context["inside"] else str(place)
    return place


def _written(place: str) -> str:
    return getattr(place, "written", place)


EachOnce = Annotated[list[Item], AfterValidator(_each_once)]
OneAtLeast = Annotated[EachOnce[Item], Field(min_length=1)]
Sizes = Annotated[list[Positive], AfterValidator(_increasing)]  # nested, the innermost first
# a path, or the name of something elsewhere
Local = Annotated[str, AfterValidator(_place), PlainSerializer(_written)]
