"""Text from the web made inert and visible."""


def visible(text: str) -> str:
    """``text`` with a mark in place of each character that would not be seen, or would move others.

    That is what Unicode does not call printable: control characters, marks of direction, joiners, unusual
    spaces, half surrogate pairs. A line's end and a tab are shown as signs, the others by their number.
    """
    signs = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
    return "".join(c if c.isprintable() else signs.get(c, f"⟨U+{ord(c):04X}⟩") for c in text)
