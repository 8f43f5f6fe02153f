"""The one error type that is meant for the user: its message is complete without a traceback."""


class GvendiError(ValueError):
    """An input or a setting that cannot be used; the message names it, what was wanted and the remedy."""
