"""What ends a command in one line: a mistake, a failure that is nobody's, or a wish to stop."""

from __future__ import annotations


class UserError(ValueError):
    """A user's mistake; the message names key, value, rule and remedy in one line (exit code 2)."""


class RunFailure(RuntimeError):
    """Something broke: a damaged checkpoint, an undecodable image, a diverged run (exit code 1).

    The message names what broke and the remedy in one line.
    """


class Stopped(Exception):
    """A run saved and ended early, as a signal or a limit wished (exit code STOPPED).

    The message says after which step, where it is saved, and the command that goes on.
    """


# EX_TEMPFAIL of sysexits.h: the same command, given again, goes on.
STOPPED = 75
