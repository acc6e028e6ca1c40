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


# Holes between blocks that stay, of more pages than the program has otherwise.
HOLES = """
import torch
from masklr.allocator import give_back_freed_memory, keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1])

torch.set_num_threads(1)
keep_freed_memory()
blocks = [torch.ones(2_500_000) for _ in range(20)]
del blocks[::2]
before = resident()
print(before, give_back_freed_memory(), resident(), all(block.eq(1).all() for block in blocks))
"""


@pytest.mark.skipif(not has_glibc(), reason="the C library is not glibc")
def test_holes_are_given_back_and_what_is_in_use_stays():
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    before, given, after, sound = done.stdout.split()
    assert given == "True"
    assert sound == "True"
    assert int(before) - int(after) > 9 * 10_000_000 / os.sysconf("SC_PAGE_SIZE")
