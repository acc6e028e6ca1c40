"""Memory that is freed and used again."""

import os
import subprocess
import sys

import pytest

# Page faults of allocating 40 MB and writing to it, again and again; the fewest, as the heap first finds its shape.
PROGRAM = """
import resource, torch
from masklr.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
print(min(faults() for _ in range(30)), keep_freed_memory(), min(faults() for _ in range(30)))
"""


def run(**environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**clean, **environment}, capture_output=True, text=True, check=True
    )
    before, taken, after = done.stdout.split()
    return int(before), taken == "True", int(after)


def has_glibc():
    return sys.platform == "linux" and os.confstr("CS_GNU_LIBC_VERSION") is not None


@pytest.mark.skipif(not has_glibc(), reason="the C library is not glibc")
def test_memory_that_was_freed_is_not_asked_for_again():
    before, taken, after = run()
    assert taken
    assert after < 100 < before


@pytest.mark.parametrize("variable", [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}])
def test_settings_of_the_users_own_are_obeyed(variable):
    before, taken, after = run(**variable)
    assert not taken
    assert min(before, after) > 100
