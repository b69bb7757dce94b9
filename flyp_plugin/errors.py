"""Errors that a user can fix, and how a command ends: with one line on stderr and an exit status.

    InputError          Error: what is wrong, where, how to fix it     1
    a full disk         Error: the file and the system's reason        1
    out of memory       Error: of the GPU or not, and what needs less  1
    Ctrl-C              Interrupted.                                   130
    SIGTERM             Terminated.                                    143
    `flyp ... | head`   nothing: nobody reads stdout any more          141

Anything else is a bug and keeps its traceback. `run` is what every entry point calls.
"""

import errno
import os
import re
import select
import signal
import sys
from collections.abc import Callable
from typing import Any

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota or a file's size limit is reached
# C0, C1, line separators and bidirectional controls: a terminal or a log would obey them
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
# torch says so of a GPU, with errors of several types; cuBLAS, which allocates memory itself; and torch of a CPU
OUT_OF_MEMORY = re.compile("(out of memory|CUBLAS_STATUS_ALLOC_FAILED)|DefaultCPUAllocator")


class InputError(ValueError):
    """A mistake in the user's input. Its text is one sentence: what is wrong, where, and how to fix it."""


class Terminated(SystemExit):
    """SIGTERM arrived. Like Ctrl-C it unwinds the stack, so that `finally` and `with` clean up."""


def escape_control_chars(text: str) -> str:
    """`text` from a file, safe to print: control characters are replaced by their escapes."""
    return CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


def run(main: Callable[[], int | None]) -> None:
    """Run a command and exit the process, as the table above says."""
    pid, swallowed = os.getpid(), []

    def terminate(number: int, frame: object) -> None:
        if os.getpid() != pid:  # a forked worker ends at once, without its parent's clean-up
            os._exit(143)
        # else, where the same signal ends workers: "RuntimeError: DataLoader worker (pid 1157) is killed by signal"
        signal.signal(signal.SIGCHLD, lambda *_: None)
        raise Terminated(143)

    def resend(unraisable: Any) -> None:
        # A signal during a fork is raised in a callback after it, and lost. Of 25 processes that start workers, 7 said
        # "Exception ignored in: <function _releaseLock>" (logging's) and continued.
        number = {Terminated: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}.get(unraisable.exc_type)
        if number is None:
            return sys.__unraisablehook__(unraisable)
        swallowed.append(unraisable.exc_type())
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
        signal.setitimer(signal.ITIMER_REAL, 0.1)

    sys.unraisablehook = resend
    signal.signal(signal.SIGTERM, terminate)
    try:
        status = main()
        sys.stdout.flush()
    except BaseException as error:
        # a swallowed signal comes first: before it is raised again, the workers that it has ended may be missed
        line, status = _line_and_status(swallowed[0] if swallowed else error)
        if status is None:
            raise
        # else after Ctrl-C "Exception ignored in: _MultiProcessingDataLoaderIter.__del__", of one that was half built
        sys.unraisablehook = lambda _: None
        sys.stderr.write(line and f"{line}\n")
    finally:  # from here on a signal ends the process at once, and workers may end unnoticed
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, lambda *_: None)
    sys.exit(status)


def _line_and_status(error: BaseException) -> tuple[str, int | None]:
    """What to print and return for an error that is not a bug; the status of a bug, and of sys.exit(), is None."""
    cause = None if type(error) is SystemExit else error
    while cause:  # on top of a signal there may be the errors of what it interrupted
        if isinstance(cause, (Terminated, KeyboardInterrupt)):
            return ("Terminated.", 143) if isinstance(cause, Terminated) else ("Interrupted.", 130)
        cause = cause.__context__
    if isinstance(error, InputError):
        return f"Error: {error}", 1
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f"Error: cannot write {error.filename or 'a file'} ({error.strerror}); free some space.", 1
    found = OUT_OF_MEMORY.search(str(error)) if isinstance(error, RuntimeError) else None
    if found or isinstance(error, MemoryError):
        size = re.search(r"ried to allocate ([\d.]+ \wi?B)", str(error))
        what = f"out of {'GPU ' if found and found[1] else ''}memory{f' ({size[1]} more needed)' if size else ''}"
        less = (
            "a smaller --batch-size or fewer --workers, or in training --grad-checkpointing or --accum-freq"
        )
        return f"Error: {what}; use {less}.", 1
    if isinstance(error, BrokenPipeError):
        stdout = select.poll()
        stdout.register(sys.stdout.fileno(), 0)  # POLLERR and POLLHUP are always reported
        if stdout.poll(0):  # else it is the pipe to a worker
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python reports it at exit
            return "", 141
    return "", None
