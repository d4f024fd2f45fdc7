"""The one exception whose message is meant for the user."""

from __future__ import annotations


class LwaError(Exception):
    """A problem that the user can fix.

    The message names the cause and the fix. The command line prints the message without a traceback.
    """


def one_line(error: object) -> str:
    """Return what an error says on one line, for messages that name it."""
    return " ".join(str(error).split())
