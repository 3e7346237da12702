"""The root of errors that are for people: their message says what is wrong and what to do."""


class FusionError(Exception):
    """Shown without a trace by the command line."""

    def __reduce__(self) -> tuple[object, ...]:
        # Its way through processes: by default the message would be handed to __init__, whose
        # parameters are others in most subclasses.
        return _restore, (type(self), self.args, self.__dict__)


def _restore(
    kind: type[FusionError], arguments: tuple[object, ...], state: dict[str, object]
) -> FusionError:
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    error.__dict__.update(state)
    return error


def printable(text: str) -> str:
    """Text for a terminal: control characters (escape sequences in a file's name) become boxes."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
