"""Cards in short, as HTML that a notebook shows: all in attributes, nothing is loaded and nothing runs."""

from html import escape

from dmsae_lib.atlas.text import visible
from dmsae_lib.report.layout import Row

SHADE = "255, 127, 14"  # red, green, blue of an activation, as transparent as it is weak


def _tokens(atlas: Row, card: Row, context: Row) -> str:
    row, start, parts = atlas["text"][context["row"]], context["start"], []
    for position, value in enumerate(context["values"], start=start):
        text = escape(visible(atlas["tokens"][row[position]]))
        weight = "; font-weight: bold" if position == context["at"] else ""
        shade = f"background: rgba({SHADE}, {value / (card['max'] or 1):.2f}){weight}"
        parts.append(f'<span style="{shade}" title="{value}">{text}</span>')
    return f"<div>{context['tenth']}/10 &nbsp; <bdi>{''.join(parts)}</bdi></div>"


def _words(pairs: list[list]) -> str:
    return " ".join(f"<code>{escape(visible(text))}</code>" for text, *_ in pairs[:6])


def compact_cards(atlas: Row, cards: list[Row]) -> str:
    """``cards`` of ``atlas`` (atlas.json) with one context of every other tenth each."""
    parts = []
    for card in cards:
        first: dict[int, Row] = {}
        for context in card["contexts"]:
            first.setdefault(context["tenth"], context)
        shown = [first[tenth] for tenth in (10, 8, 6, 4, 2) if tenth in first]
        cycles = ", ".join(str(one["cycle"]) for one in card["history"]) or "none"
        about = f"{card['share']:.1%} of the attribution, fires on {card['frequency']:.1%} of the tokens"
        if card["ablation"]:
            about += f", without it {card['ablation']['change']:+.4f} nats"
        about += f"; selected in cycles {cycles}"
        effects = f"raises {_words(card['logits']['raises'])}<br>lowers {_words(card['logits']['lowers'])}"
        body = "".join(_tokens(atlas, card, context) for context in shown)
        parts.append(f"<h4>{escape(card['id'])}</h4><p>{about}<br>{effects}</p>{body}")
    return "\n".join(parts)
