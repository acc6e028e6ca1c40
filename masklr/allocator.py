"""What the C library does with freed memory. Imports nothing but Python's own."""

import ctypes
import os
import sys

# Numbers of glibc's <malloc.h>, part of its binary interface.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next allocations, instead of giving it back to the system.

    A training step on CPUs frees its activations and allocates as much again in the next. In between, glibc gives them
    back by default, and the system hands out every page anew, zeroed: up to a fifth of the step. With this the process
    stays as large as it once was. Whoever has set glibc's own variables (`MALLOC_...`, `GLIBC_TUNABLES`) is obeyed.

    Returns:
        Whether the C library took it; those other than glibc have no such setting.
    """
    given = any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get(
        "GLIBC_TUNABLES", ""
    )
    if given or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Never trim the heap; and no allocation outside of it, which would be given back when freed.
    return mallopt is not None and bool(mallopt(_M_TRIM_THRESHOLD, -1)) and bool(mallopt(_M_MMAP_MAX, 0))


def give_back_freed_memory() -> bool:
    """Give freed memory back to the system once, wherever in the heap it lies; see `keep_freed_memory`.

    What stays afterwards is what is in use. Worth it when allocations change their pattern, as they do after the first
    step of a training run: the optimizer's state, made at its end, lies in holes that activations had left, so that
    those of the second step find no room there and the heap grows by as much again.

    Returns:
        Whether any was given back; C libraries other than glibc cannot.
    """
    if sys.platform != "linux":
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(0))
