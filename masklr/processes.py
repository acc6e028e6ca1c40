"""Which processes live, and that those of one run end together. Imports nothing but Python's own.

`python -m masklr.processes TIMEOUT PID:START ...` watches processes; `callbacks/peers.py` starts it.
"""

import math
import os
import signal
import sys
import time
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


def watch(starts: dict[int, str], grace: float = _GRACE, timeout: float = math.inf) -> None:
    """Wait until one of some processes has ended, then kill the stopped ones, and after a while whatever lives on.

    Args:
        starts: What `start_of` says of each, by number: a number can be given again to another process.
        grace: Seconds between the first end and the kill.
        timeout: Seconds within which all have ended, too, when one is stopped while others are not: it is killed early
            enough that these can say why they end.
    """
    patience = max(timeout - 2 * grace, timeout / 2)
    stopped: dict[int, float] = {}  # since when
    while all(start_of(pid) == start for pid, start in starts.items()):
        time.sleep(0.2)
        now = time.monotonic()
        stopped = {pid: stopped.get(pid, now) for pid in starts if _status(pid)[0] == "T"}
        if len(stopped) == len(starts):  # all: whoever did that wants them to go on
            stopped = {}
        for pid, since in stopped.items():
            if now - since >= patience and start_of(pid) == starts[pid]:
                os.kill(pid, signal.SIGKILL)
    deadline, late = time.monotonic() + grace, False
    while not late and (left := [pid for pid, start in starts.items() if start_of(pid) == start]):
        time.sleep(min(0.2, grace))
        late = time.monotonic() >= deadline
        for pid in left:
            if (late or _status(pid)[0] == "T") and start_of(pid) == starts[pid]:
                os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    seconds, *watched = sys.argv[1:]
    watch({int(pid): start for pid, _, start in (text.partition(":") for text in watched)}, timeout=float(seconds))
