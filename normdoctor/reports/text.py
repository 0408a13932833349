"""Text from strangers' files made safe to print."""

from __future__ import annotations

import html
import re

MARKDOWN = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
"""What Markdown gives a meaning; an underscore has none between letters."""

LINKING = re.compile(r"[@#](?=\w)|:(?=//|[\w+-]+:)|\bGH-(?=\d)|\bwww(?=\.)", re.IGNORECASE)
"""What GitHub turns into mentions, issue links, web links and emoji, however it is escaped."""

PLAIN_CODE = re.compile(r"[^`|\\\s](?:[^`|\\]*[^`|\\\s])?")

APART = "&#8203;"
"""A zero-width space: only a character in between stops GitHub's links, which it makes of the finished text."""


def printable(text: str) -> str:
    """`text` without control characters, which could rewrite the terminal; they come as escapes.

    >>> printable("bn1\\x1b[2J")
    'bn1\\\\x1b[2J'
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def markdown_text(text: str) -> str:
    """`text` as it reads in Markdown, in a line or a table's cell: no markup, HTML, mention or link in it works.

    >>> markdown_text("running_mean of *a|b* by @me")
    'running_mean of &#42;a&#124;b&#42; by @&#8203;me'
    """
    escaped = html.escape(printable(text), quote=False)
    escaped = LINKING.sub(lambda found: found[0] + APART, escaped)
    return MARKDOWN.sub(lambda found: f"&#{ord(found[0])};", escaped)


def markdown_code(text: str) -> str:
    """`text` as code in Markdown, in a line or a table's cell.

    >>> markdown_code("layer1.0.bn1"), markdown_code("a|b")
    ('`layer1.0.bn1`', '<code>a&#124;b</code>')
    """
    text = printable(text)
    return f"`{text}`" if PLAIN_CODE.fullmatch(text) else html_code(text)


def html_code(text: str) -> str:
    """`text` as code in HTML, with no Markdown in it."""
    return (
        f"<code>{MARKDOWN.sub(lambda found: f'&#{ord(found[0])};', html.escape(printable(text), quote=False))}</code>"
    )


def shortened(text: str, room: int) -> str:
    """At most `room` characters. The end of a name or path tells it apart, so the beginning gives way.

    >>> shortened("backbone.layer1.0.bn1", 11)
    '…yer1.0.bn1'
    """
    return text if len(text) <= room else "…" + text[-(room - 1) :]
