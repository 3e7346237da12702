"""The root of errors that are for people: their message says what is wrong and what to do."""


class FusionError(Exception):
    """Shown without a trace by the command line."""
