"""Tables in Markdown, and the widths and the escaping of their cells."""

import re
import unicodedata
from collections.abc import Collection, Sequence

from .messages import one_line


def escape(text: str) -> str:
    """Escape a text for one line of Markdown or one table cell, so that it is shown verbatim, without HTML or links."""
    escaped = re.sub(r"[\\`*|]|(?<=\])\(", r"\\\g<0>", text)
    return one_line(escaped).replace("<", "&lt;").replace(">", "&gt;")


def display_width(text: str) -> int:
    """Count the terminal columns that `text` takes; a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def pad(text: str, width: int) -> str:
    """Fill `text` with spaces to `width` terminal columns."""
    return text + " " * (width - display_width(text))


def column_widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """Return the display width of the widest cell of each column."""
    return [max(map(display_width, column)) for column in zip(*rows, strict=True)]


def markdown_table(
    rows: Sequence[Sequence[str]],
    left: Collection[int] = (),
    *,
    padded: bool = True,
    widths: Sequence[int] | None = None,
) -> str:
    """
    Render a Markdown table, without a line break at its end.

    Args:
        rows (`Sequence[Sequence[str]]`): The cells, which are not escaped here. The first row is the header.
        left (`Collection[int]`, *optional*): Indices of the left-aligned columns; the others are right-aligned.
        padded (`bool`, *optional*, defaults to `True`): Whether to pad the cells, so that the columns line up in a terminal.
        widths (`Sequence[int]`, *optional*, defaults to [`column_widths`]): Widths to pad to, for tables that line up with
            each other.
    """
    if padded:
        widths = column_widths(rows) if widths is None else widths
        rows = [[pad(text, width) for text, width in zip(row, widths, strict=True)] for row in rows]
    else:
        widths = [3 if index in left else 4 for index in range(len(rows[0]))]
    rule = ["-" * width if index in left else "-" * (width - 1) + ":" for index, width in enumerate(widths)]
    header, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *body))
