"""Mistakes that a user can mend, and how the command line tells of them. Not for bugs: those keep their traceback."""

import os
import re
import sys
from collections.abc import Callable

# C0, C1, line separators and what turns the direction of text: a terminal or a log would obey them
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class InputError(ValueError):
    """A mistake in what the user gave. Its text is one sentence: what is wrong, where, and how to mend it."""


def printable(text: str) -> str:
    """`text` out of a file, for a message: control characters as escapes."""
    return CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


def run(main: Callable[[], int | None]) -> None:
    """Run a command and leave the process: an InputError is one line and status 1, Ctrl-C one line and 130."""
    try:
        status = main() or 0
        sys.stdout.flush()
    except InputError as error:
        status = _say(f"Error: {error}", 1)
    except KeyboardInterrupt:
        status = _say("Interrupted.", 130)
    except BrokenPipeError:  # `flyp ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status)


def _say(line: str, status: int) -> int:
    print(line, file=sys.stderr)
    return status
