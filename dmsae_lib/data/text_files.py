"""Text files as people have them: what is readable is read in one stated way, anything else is named by file,
line and byte.

UTF-8, or what the byte-order mark at a file's start says. Byte-order marks at the start of a file, a line of
JSON or a document are taken off; half a surrogate pair, which is no character, becomes U+FFFD, the
replacement character.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from dmsae_lib.store.artifacts import UserError

BETWEEN = re.compile(r"\n\s*\n|<\|endoftext\|>")  # what separates documents in a .txt file
MARK = "\ufeff"
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",  # first: UTF-16's begins UTF-32's
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
HALVES = re.compile("[\ud800-\udfff]")


def clean(text: str) -> str:
    """``text`` as tokenizers take it: no byte-order mark at its start, U+FFFD for each half of a surrogate
    pair."""
    return HALVES.sub("\ufffd", text.lstrip(MARK))


def file_texts(file: Path, field: str, setting: str, remedy: str = "mend the line") -> Iterator[str]:
    """The documents of a .txt file, between blank lines or end marks, or of a file of JSON lines, in
    ``field`` of each.

    Raises UserError, which begins with ``setting``, for a file that cannot be read, and names file, line and
    byte of what is not UTF-8, and file and line, with the ``remedy``, of what is not a JSON object with that
    field.
    """
    try:
        with _opened(file) as handle:
            if file.suffix == ".txt":
                yield from filter(str.strip, map(clean, BETWEEN.split(handle.read())))
            else:
                yield from map(clean, _json_lines(handle, field, setting, remedy))
    except UnicodeDecodeError as error:
        line, byte, reason = _misplaced(file)
        raise UserError(
            f"{setting}: {file} is not UTF-8 text ({reason} at byte {byte}, in line {line}); convert it, or "
            "mend that "
            "line."
        ) from error
    except OSError as error:
        raise UserError(
            f"{setting}: {file} cannot be read ({error.strerror}); see to its permissions."
        ) from error


def _opened(file: Path) -> TextIO:
    with open(file, "rb") as handle:
        start = handle.read(4)
    named = next((name for mark, name in MARKS.items() if start.startswith(mark)), None)
    if (
        not named and b"\0" in start
    ):  # ASCII's characters in UTF-16 or UTF-32, which decode as UTF-8 all the same
        raise UnicodeDecodeError("utf-8", start, start.index(b"\0"), start.index(b"\0") + 1, "a null byte")
    # With a mark the encoding is certain and a fault is local; without one a fault says that it is another
    # encoding.
    return open(file, encoding=named or "utf-8-sig", errors="replace" if named else "strict")


def _json_lines(handle: TextIO, field: str, setting: str, remedy: str) -> Iterator[str]:
    for number, line in enumerate(handle, 1):
        line = line.strip().lstrip(MARK)  # files put together from several have marks inside
        if not line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            raise UserError(
                f"{setting}: line {number} of {handle.name} is not a JSON object with the text field "
                f"{field!r}; {remedy}."
            )
        yield row[field]


def _misplaced(file: Path) -> tuple[int, int, str]:
    """Line from 1 and byte from 0 of the first fault in a file that is not UTF-8, and what it is: a text
    file's own decoder counts from the start of its buffer."""
    before = 0
    with open(file, "rb") as handle:
        for number, line in enumerate(handle, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return number, before + error.start, error.reason
            if b"\0" in line:
                return number, before + line.index(b"\0"), "a null byte, as in UTF-16 without its mark"
            before += len(line)
    raise UserError(f"{file} changed while it was read: start again.")
