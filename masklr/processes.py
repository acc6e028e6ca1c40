"""Which processes live, and that those of one run end together. Imports nothing but Python's own.

`python -m masklr.processes TIMEOUT PID:START ...` watches processes, and SIGUSR1 tells it that their work is done;
`callbacks/peers.py` starts it.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

_GRACE = 5.0  # seconds: those that can notice by themselves say why they end


def start_of(pid: int) -> str | None:
    """When a process began, in the kernel's clock; None for one that has ended, or where the kernel does not say."""
    state, start = _status(pid)
    # A zombie has ended, but nobody has asked for its exit code, as in a container without an init process.
    return None if state == "Z" else start


def _status(pid: int) -> tuple[str | None, str | None]:
    """State (Z: zombie, T: stopped) and start of a process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return None, None


def watch(
    starts: dict[int, str],
    grace: float = _GRACE,
    timeout: float = math.inf,
    finishing: Callable[[], bool] = lambda: False,
) -> None:
    """Watch until all of some processes have ended; when one ends too early, or is stopped, end the others.

    Args:
        starts: What `start_of` says of each, by number: a number can be given again to another process.
        grace: Seconds between the first end and the kill of whatever lives on; what is stopped is killed at once.
        timeout: Seconds within which all have ended when one is stopped while others are not: it is killed early
            enough that these can say why they end.
        finishing: Whether their work is done, so that each may end when it likes.
    """
    patience = max(timeout - 2 * grace, timeout / 2)
    stopped: dict[int, float] = {}  # since when
    ended = math.inf  # when the first did
    while left := {pid: start for pid, start in starts.items() if start_of(pid) == start}:
        now = time.monotonic()
        if finishing():
            ended = math.inf
        elif len(left) < len(starts):
            ended = min(ended, now)
        stopped = {pid: stopped.get(pid, now) for pid in left if _status(pid)[0] == "T"}
        if len(stopped) == len(starts):  # all: whoever did that wants them to go on
            stopped = {}
        for pid, start in left.items():
            late = now - ended >= (0 if pid in stopped else grace) or now - stopped.get(pid, now) >= patience
            if late and start_of(pid) == start:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)


if __name__ == "__main__":
    done: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: done.append(number))
    seconds, *watched = sys.argv[1:]
    began = {int(pid): start for pid, _, start in (text.partition(":") for text in watched)}
    watch(began, timeout=float(seconds), finishing=lambda: bool(done))
