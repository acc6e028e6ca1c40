"""Which processes live, and that those of one run end together. Imports nothing but Python's own.

`python -m masklr.processes PID:START ...` watches processes; `callbacks/peers.py` starts it.
"""

import os
import signal
import sys
import time
from pathlib import Path

_GRACE = 5.0  # seconds: those that can notice by themselves say why they end


def start_of(pid: int) -> str | None:
    """When a process began, in the kernel's clock; None for one that has ended, or where the kernel does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # A zombie has ended, but nobody has asked for its exit code, as in a container without an init process.
        return None if fields[0] == "Z" else fields[19]
    except (OSError, IndexError):
        return None


def watch(starts: dict[int, str], grace: float = _GRACE) -> None:
    """Wait until one of some processes has ended, then kill those that live on after a while.

    Args:
        starts: What `start_of` says of each, by number: a number can be given again to another process.
        grace: Seconds between the first end and the kill.
    """
    while all(start_of(pid) == start for pid, start in starts.items()):
        time.sleep(0.2)
    time.sleep(grace)
    for pid, start in starts.items():
        if start_of(pid) == start:
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    watch({int(pid): start for pid, _, start in (argument.partition(":") for argument in sys.argv[1:])})
