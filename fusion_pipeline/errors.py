"""The root of errors that are for people: their message says what is wrong and what to do."""


class FusionError(Exception):
    """Shown without a trace by the command line."""


def printable(text: str) -> str:
    """Text for a terminal: control characters (escape sequences in a file's name) become boxes."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
