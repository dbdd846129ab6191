"""What ends a command in one line: a user's mistake, or a failure that is nobody's mistake."""

from __future__ import annotations


class UserError(ValueError):
    """A user's mistake; the message names key, value, rule and remedy in one line (exit code 2)."""


class RunFailure(RuntimeError):
    """Something broke: a damaged checkpoint, an undecodable image, a diverged run (exit code 1).

    The message names what broke and the remedy in one line.
    """
