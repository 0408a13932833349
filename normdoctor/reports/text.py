"""Text from strangers' files made safe to print."""


def printable(text: str) -> str:
    """`text` without control characters, which could rewrite the terminal; they come as escapes.

    >>> printable("bn1\\x1b[2J")
    'bn1\\\\x1b[2J'
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
