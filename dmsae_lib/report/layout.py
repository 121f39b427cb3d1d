"""How a summary is laid out as text: rounded numbers, JSON that people can read, rows of tables."""

import json
from typing import Any

Row = dict[str, Any]
DIGITS = 6  # significant digits kept: beyond float32's own precision there is nothing to read
WIDTH = 160  # columns of summary.json


def readable(value: Any) -> Any:
    """``value`` with every float rounded to six significant digits."""
    if isinstance(value, dict):
        return {key: readable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [readable(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def laid_out(value: Any, indent: int = 0, used: int = 0) -> str:
    """JSON text that people can read: whatever fits within WIDTH columns stands on one line."""
    line = json.dumps(value, allow_nan=False)
    if used + len(line) <= WIDTH or not isinstance(value, dict | list):
        return line
    if isinstance(value, dict):
        items = [f"{json.dumps(k)}: {laid_out(v, indent + 1, indent + len(k) + 5)}" for k, v in value.items()]
    else:
        items = [laid_out(item, indent + 1, indent + 1) for item in value]
    pad = " " * (indent + 1)
    return "\n".join([line[0], ",\n".join(pad + item for item in items), pad[1:] + line[-1]])


def flat(row: Row, prefix: str = "") -> Row:
    """Nested dictionaries as dotted columns; lists as text."""
    columns: Row = {}
    for key, value in row.items():
        columns |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return columns


def thinned(rows: list[dict[str, str]], points: int) -> list[dict[str, str]]:
    """About ``points`` of the rows of a history, evenly spaced, the last one included, at six digits."""
    step = max(1, len(rows) // points)
    return [
        {key: f"{float(text):.{DIGITS}g}" for key, text in row.items()} for row in rows[::-1][::step][::-1]
    ]
