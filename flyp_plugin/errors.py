"""Mistakes that a user can fix, and how the command line tells of them. Not for bugs: those keep their traceback."""

import errno
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

# Of an OSError: the disk, a quota or a file's limit is reached
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# C0, C1, line separators and what turns the direction of text: a terminal or a log would obey them
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

_swallowed: list[KeyboardInterrupt] = []  # signals that could not be raised where they came


class InputError(ValueError):
    """A mistake in what the user gave. Its text is one sentence: what is wrong, where, and how to fix it."""


def escape_control_chars(text: str) -> str:
    """`text` out of a file, for a message: control characters as escapes."""
    return CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


class Terminated(KeyboardInterrupt):
    """SIGTERM has come. What tidies up after Ctrl-C does so after this, too."""


def run(main: Callable[[], int | None]) -> None:
    """Run a command and leave the process: an InputError is one line and status 1, Ctrl-C one line and 130.

    SIGTERM is one line too, and 143.
    """
    try:
        _raise_on_sigterm()
        status = main() or 0
        sys.stdout.flush()
    except SystemExit:
        raise
    except BaseException as error:
        _raise_no_more()
        told = _told(_swallowed[0] if _swallowed else error)
        if told is None:
            raise
        line, status = told
        if line:
            print(line, file=sys.stderr)
        else:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    _raise_no_more()
    sys.exit(status)


def _raise_on_sigterm() -> None:
    pid = os.getpid()

    def handler(number: int, frame: object) -> None:
        if os.getpid() == pid:
            raise Terminated
        signal.signal(number, signal.SIG_DFL)  # a forked process ends as if there were no handler
        os.kill(os.getpid(), number)

    def again(unraisable: Any) -> None:
        """A signal that came where nothing can be raised, as in what runs after a fork, comes once more."""
        error = unraisable.exc_value
        if os.getpid() != pid or not isinstance(error, KeyboardInterrupt):
            return sys.__unraisablehook__(unraisable)
        _swallowed.append(error)
        number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        timer = threading.Timer(0.1, _resend, [number])
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGTERM, handler)
    sys.unraisablehook = again


def _resend(number: int) -> None:
    if signal.getsignal(number) != signal.SIG_DFL:
        os.kill(os.getpid(), number)


def _raise_no_more() -> None:
    """From here on one more signal ends the process at once, and a DataLoader's worker that has ended is no news."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)


def _told(error: BaseException) -> tuple[str, int] | None:
    """The line and the exit status for what is no bug."""
    cause: BaseException | None = error
    while cause:  # a signal may have others on top of it, as of a DataLoader whose workers it has ended
        if isinstance(cause, KeyboardInterrupt):
            return ("Terminated.", 143) if isinstance(cause, Terminated) else ("Interrupted.", 130)
        cause = cause.__context__
    if isinstance(error, InputError):
        return f"Error: {error}", 1
    if isinstance(error, BrokenPipeError) and _nobody_reads_stdout():  # `flyp ... | head`
        return "", 141
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        where = error.filename or "a file"
        return f"Error: {where} could not be written ({error.strerror}); make room, and try again.", 1
    return None


def _nobody_reads_stdout() -> bool:
    """Whether stdout is a broken pipe. Others may break too, as one to a worker: those are not to end in silence."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # an error and a hang-up are told of always
    return bool(poll.poll(0))
