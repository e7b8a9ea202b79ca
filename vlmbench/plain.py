"""Text from elsewhere (model output, file names, headers) as text: shown in every format, acted upon in none."""

from __future__ import annotations

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for a formula at the start of a cell."""


def printable(text: object) -> str:
    """Without control characters: no escape code reaches a terminal, and a line stays one line."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(text))


def note(text: object) -> str:
    """A line of Markdown in which no tag, link or picture begins."""
    return printable(text).replace("<", "&lt;").replace("](", "]\\(")


def cell(text: object) -> str:
    """A cell of a Markdown table: no tag, no column, no link, picture or code begins in it."""
    shown = printable(text).replace("<", "&lt;")
    for char in "\\`|[]":
        shown = shown.replace(char, f"\\{char}")
    return shown


def code(text: object) -> str:
    """The text as code in a Markdown cell. A backtick would end it, and cannot be escaped there."""
    return "`" + printable(text).replace("`", "'").replace("|", "\\|") + "`"


def spreadsheet(value: object) -> object:
    """A CSV value: text that a spreadsheet would compute gets an apostrophe in front; numbers stay as they are."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_STARTS) else value
