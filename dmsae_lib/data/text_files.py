"""Text files as people have them: read in one stated way, or named by file, line and byte.

UTF-8, or what the byte-order mark at a file's start says. Byte-order marks at the start of a file, a line of
JSON or a document are taken off; half a surrogate pair, which is no character, becomes U+FFFD, the
replacement character.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

from dmsae_lib.store.artifacts import UserError

BETWEEN = re.compile(r"\n\s*\n|<\|endoftext\|>")  # what separates documents in a .txt file
MARK = "\ufeff"
MARKS = {  # UTF-32's first: UTF-16's begins one of them
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
HALVES = re.compile("[\ud800-\udfff]")


def clean(text: str) -> str:
    """``text`` as tokenizers take it: no byte-order mark at its start, U+FFFD for half a surrogate pair."""
    return HALVES.sub("\ufffd", text.lstrip(MARK))


def file_texts(file: Path, field: str, setting: str, remedy: str = "mend the line") -> Iterator[str]:
    """The documents of a .txt file, between blank lines or end marks, or ``field`` of each line of JSON.

    Raises UserError, which begins with ``setting``, for a file that cannot be read, with file, line and byte
    of what is not UTF-8, and with file, line and ``remedy`` for a line that is no JSON object with the field.
    """
    try:
        lines = _lines(file, setting)
        if file.suffix == ".txt":
            yield from filter(str.strip, map(clean, BETWEEN.split("".join(lines))))
            return
        for number, line in enumerate(lines, 1):
            if line := line.strip().lstrip(MARK):  # files put together from several have marks inside
                yield clean(_field(line, field, f"{setting}: line {number} of {file}", remedy))
    except OSError as error:
        raise UserError(
            f"{setting}: {file} cannot be read ({error.strerror}); see to its permissions."
        ) from error


def _field(line: str, field: str, place: str, remedy: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        raise UserError(f"{place} is not a JSON object with the text field {field!r}; {remedy}.")
    return row[field]


def _lines(file: Path, setting: str) -> Iterator[str]:
    """The lines of a file, each ended by a newline, whatever ends it there."""

    def no_text(why: str, byte: int, line: int) -> UserError:
        where = f"{setting}: {file} is not UTF-8 text ({why} at byte {byte}, in line {line})"
        return UserError(f"{where}; convert it, or mend that line.")

    with open(file, "rb") as handle:
        start = handle.peek(4)[:4]
        for mark, encoding in MARKS.items():
            if start.startswith(mark):  # the encoding is certain, so a fault is local
                yield from io.TextIOWrapper(handle, encoding, errors="replace")
                return
        if b"\0" in start:  # plain English in UTF-16 or UTF-32 is UTF-8, too
            raise no_text("a null byte, as in UTF-16 without its mark", start.index(b"\0"), 1)
        before = 0
        for number, line in enumerate(handle, 1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise no_text(error.reason, before + error.start, number) from error
            yield from io.StringIO(text, newline=None)
            before += len(line)
