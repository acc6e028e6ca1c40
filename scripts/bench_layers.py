#!/usr/bin/env python
"""Time and peak memory of DropConnectLinear beside nn.Linear, and beside nn.Linear followed by nn.Dropout.

    python scripts/bench_layers.py

One forward and backward pass at the sizes of the first layer of an MLP of ViT-B (768 -> 3072 features, 64 images of 197
tokens), with the gradients of input, weight and bias. All sides run in one process, alternating; ratios are taken round
by round, and their median and its 95 % interval are printed. Peak memory is what a pass adds to a fresh process that
already holds layer, input and output gradient (on CUDA, what the allocator counts). Exits with 1 if a line is above its
limit.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from masklr.layers import DropConnectLinear

LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "plain": nn.Linear,
    "dropout": lambda width, wide: nn.Sequential(nn.Linear(width, wide), nn.Dropout(0.5)),
    "per batch": lambda width, wide: DropConnectLinear(width, wide, p=0.5, per="batch"),
    "per sample": lambda width, wide: DropConnectLinear(width, wide, p=0.5, per="sample"),
}
# float32; float32 parameters and input under autocast to bfloat16; parameters and input in bfloat16.
PRECISIONS = ("float32", "autocast", "bfloat16")
TIME_LIMITS = {
    ("per batch", "plain"): {"float32": 1.2, "autocast": 1.2, "bfloat16": 1.2},
    ("per sample", "plain"): {"float32": 2.0, "autocast": 2.7, "bfloat16": 2.7},
    ("per batch", "dropout"): {"float32": 1.0, "autocast": 1.0, "bfloat16": 1.0},
    ("per sample", "dropout"): {"float32": 1.0, "autocast": 1.0, "bfloat16": 1.0},
}
MEMORY_LIMIT = 1.25


def training_pass(side: str, precision: str, options: argparse.Namespace) -> Callable[[], None]:
    """One forward and backward pass of a side."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    gives = torch.float32 if precision == "float32" else torch.bfloat16
    layer = LAYERS[side](options.width, 4 * options.width).to(options.device, dtype).train()
    x = torch.randn(options.batch, options.tokens, options.width, device=options.device, dtype=dtype)
    grad = torch.randn(options.batch, options.tokens, 4 * options.width, device=options.device, dtype=gives)
    x.requires_grad_()

    def run() -> None:
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=precision == "autocast"):
            y = layer(x)
        y.backward(grad)
        layer.zero_grad(set_to_none=True)
        x.grad = None
        if x.device.type == "cuda":
            torch.cuda.synchronize()

    return run


def seconds(run: Callable[[], None]) -> float:
    """Wall-clock time of a call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """Median and its 95 % interval from order statistics: normal approximation of the binomial of 1/2."""
    ordered, reach = sorted(values), 0.98 * len(values) ** 0.5
    low = ordered[max(0, int(len(ordered) / 2 - reach))]
    high = ordered[min(len(ordered) - 1, int(len(ordered) / 2 + reach))]
    return statistics.median(ordered), low, high


def added_memory(run: Callable[[], None], device: torch.device) -> float:
    """Megabytes that a pass adds at its peak to what the process holds."""
    if device.type == "cuda":
        run()  # libraries allocate their workspaces once
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # The kernel's high-water mark of resident memory, set back first. `ru_maxrss` is no use: a child inherits it.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_mark()
    run()
    return resident_mark() - before


def resident_mark() -> float:
    """The highest resident memory of this process so far, in MiB (Linux)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1024


def memory_in_new_process(side: str, precision: str) -> float:
    """`added_memory` of a side in a process of its own, since a high-water mark does not go down."""
    command = [sys.executable, *sys.argv, "--memory-of", side, precision]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def judged(what: str, against: str, precision: str, ratio: float, limit: float, shown: str) -> bool:
    """Print one line of the table; whether it is within its limit."""
    good = ratio < limit if limit == 1 else ratio <= limit
    print(f"{precision:10}{what:12}{'/ ' + against:20}{shown:>22}{limit:8.2f}  {'' if good else 'above the limit'}")
    return good


def main() -> int:
    """Print the table; 1 if a line is above its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="timed passes of each side")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.memory_of:
        print(added_memory(training_pass(*options.memory_of, options), device))
        return 0
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{options.batch} x {options.tokens} tokens, {options.width} -> {4 * options.width}, {options.rounds} rounds")
    print(f"{name}, {platform.machine()}, torch {torch.__version__}")
    print(f"{'':10}{'':12}{'':20}{'ratio':>22}{'limit':>8}")
    good = True
    for precision in PRECISIONS:
        passes = {side: training_pass(side, precision, options) for side in LAYERS}
        for run in passes.values():
            run()
        rounds = [{side: seconds(run) for side, run in passes.items()} for _ in range(options.rounds)]
        for (side, against), limits in TIME_LIMITS.items():
            ratio, low, high = median_interval([times[side] / times[against] for times in rounds])
            shown = f"{ratio:.2f} [{low:.2f}, {high:.2f}]"
            good &= judged(side, against, precision, ratio, limits[precision], shown)
        medians = ", ".join(f"{side} {statistics.median(times[side] for times in rounds):.3f}" for side in LAYERS)
        print(f"{'':10}seconds: {medians}")
        memory = {side: memory_in_new_process(side, precision) for side in ("per batch", "per sample")}
        ratio = memory["per sample"] / memory["per batch"]
        shown = f"{ratio:.2f} ({memory['per sample']:.0f} MiB)"
        good &= judged("per sample", "per batch, memory", precision, ratio, MEMORY_LIMIT, shown)
    print("every line is within its limit" if good else "some lines are above their limits")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
