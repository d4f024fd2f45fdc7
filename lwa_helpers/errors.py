"""The one exception whose message is meant for the user."""

from __future__ import annotations


class LwaError(Exception):
    """A problem that the user can mend: the message names the cause and the fix; the command line prints it alone."""
