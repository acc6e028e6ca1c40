#!/usr/bin/env python
"""Time a training step of the masked autoencoder beside those of transformers and lightly, at three shapes.

    pip install 'masklr[bench]' && python scripts/bench_mae.py
    python scripts/bench_mae.py --shapes b --sides 'masklr bf16' 'transformers bf16' --steps 9

A step is forward, backward and AdamW, masks drawn anew. All sides of a shape run in turns, warm, on the same images,
each library in a process of its own with the default allocator; on CPUs masklr's keeps freed memory, but for what the
first step leaves, as `masklr fit` does there (not with `--plain`). Seconds are medians, ratios are taken round by
round. GFLOP are those of the matrix products; their share of the peak is that of two 2,048 x 2,048 matrices (8,192 on a
GPU) multiplied between the rounds, in the same precision. The floor of masklr's sides is what their matrix products
take alone, of the step's real sizes and strides, into memory that is at hand: the rest of a step is all else. Peak
memory is what weights, optimizer and steps add to a process of their own that has imported all it needs (Linux; on a
GPU, what torch's allocator counts).
Sides in bf16 run under autocast, with float32 weights. On a CPU that has no products in bf16 (no AVX-512, AMX or their
like) a peer's step in bf16 takes minutes: a side whose first step takes more than 30 seconds takes two in all, where
its memory is measured, and the second stands for every round (`*`). The peak in bf16 is float32's there, and attention,
one operator, is no part of masklr's floor.

Exits with 1 if a line falls short: in bf16 masklr is to lead the fastest peer by a factor (shapes a and b 1.6, c 1.3),
in fp32 not to be slower (beyond the interval), in neither to need more memory than the thriftiest peer, and a cross
decoder that predicts a quarter of the masked patches is to be 1.6 times as fast as the full one. Needs an idle machine.
"""

import argparse
import multiprocessing
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from masklr.models.float32_products import has_bf16_products


@dataclass(frozen=True)
class Shape:
    """Sizes of a masked autoencoder, and of its batch."""

    image: int
    patch: int
    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    batch: int
    lead: float  # least factor by which masklr in bf16 leads the fastest peer


SHAPES = {
    "a": Shape(32, 2, 192, 12, 3, 192, 4, 3, batch=128, lead=1.6),
    "b": Shape(32, 4, 192, 12, 3, 192, 4, 3, batch=256, lead=1.6),
    "c": Shape(224, 16, 768, 12, 12, 512, 8, 16, batch=16, lead=1.3),
}
CROSS_LEAD = 1.6
SLOW = 30.0  # seconds of a side's first step beyond which it takes a second one and no more
# Side: what makes its model, whether it runs in bf16, whether compiled. Sides of one maker share its model.
SIDES = {
    "masklr fp32": ("masklr", False, False),
    "masklr bf16": ("masklr", True, False),
    "masklr bf16 compiled": ("masklr", True, True),
    "masklr bf16 cross": ("cross", True, False),
    "transformers fp32": ("transformers", False, False),
    "transformers bf16": ("transformers", True, False),
    "lightly fp32": ("lightly", False, False),
    "lightly bf16": ("lightly", True, False),
}
PEERS = ("transformers", "lightly")


class Masklr(nn.Module):
    """masklr's model; masks are drawn outside, as `masklr.tasks.Pretraining` does, which keeps graphs whole."""

    def __init__(self, shape: Shape, **options: Any) -> None:
        super().__init__()
        from masklr.models import MaskedAutoencoder

        self.mae = MaskedAutoencoder(
            image_size=shape.image,
            patch_size=shape.patch,
            encoder_args={"embed_dim": shape.width, "depth": shape.depth, "num_heads": shape.heads},
            decoder_dim=shape.decoder_width,
            decoder_depth=shape.decoder_depth,
            decoder_heads=shape.decoder_heads,
            **options,
        )

    def forward(self, images: Tensor) -> Tensor:
        """The loss."""
        return self.mae(images, self.mae.draw_split(len(images), device=images.device)).loss


class Transformers(nn.Module):
    """The model of Hugging Face transformers."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        config = ViTMAEConfig(
            image_size=shape.image,
            patch_size=shape.patch,
            hidden_size=shape.width,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads,
            intermediate_size=4 * shape.width,
            decoder_hidden_size=shape.decoder_width,
            decoder_num_hidden_layers=shape.decoder_depth,
            decoder_num_attention_heads=shape.decoder_heads,
            decoder_intermediate_size=4 * shape.decoder_width,
            mask_ratio=0.75,
            norm_pix_loss=True,
        )
        self.mae = ViTMAEForPreTraining(config)

    def forward(self, images: Tensor) -> Tensor:
        """The loss."""
        return self.mae(images).loss


class Lightly(nn.Module):
    """The masked autoencoder of lightly's documentation, of its modules around timm, with its pixels normalized too."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        import timm
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

        vit: Any = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=shape.image,
            patch_size=shape.patch,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.heads,
            num_classes=0,
        )
        self.patch = shape.patch
        self.encoder = MaskedVisionTransformerTIMM(vit=vit)
        self.decoder = MAEDecoderTIMM(
            num_patches=vit.patch_embed.num_patches,
            patch_size=shape.patch,
            embed_dim=shape.width,
            decoder_embed_dim=shape.decoder_width,
            decoder_depth=shape.decoder_depth,
            decoder_num_heads=shape.decoder_heads,
        )

    def forward(self, images: Tensor) -> Tensor:
        """The loss."""
        from lightly.models import utils

        size = (len(images), self.encoder.sequence_length)
        keep, masked = utils.random_token_mask(size, mask_ratio=0.75, device=images.device)
        encoded = self.decoder.embed(self.encoder.encode(images, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, size)
        tokens = utils.set_at_index(tokens, keep, encoded.type_as(tokens))
        predicted = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), masked))
        target = utils.normalize_mean_var(utils.get_at_index(utils.patchify(images, self.patch), masked - 1))
        return nn.functional.mse_loss(predicted, target)


MAKERS: dict[str, Callable[[Shape], nn.Module]] = {
    "masklr": Masklr,
    "cross": lambda shape: Masklr(shape, decoder="cross", prediction_ratio=0.25),
    "transformers": Transformers,
    "lightly": Lightly,
}


class Steps:
    """Training steps of one model, in either precision, and what is measured of them."""

    def __init__(self, maker: str, shape: Shape, device: torch.device, kept: bool = False) -> None:
        torch.manual_seed(0)
        self.to_give_back = kept  # after the first step
        self.model = MAKERS[maker](shape).to(device).train()
        self.compiled: Any = None
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.images = torch.randn(shape.batch, 3, shape.image, shape.image, device=device)

    def step(self, bf16: bool, compiled: bool = False) -> None:
        """Forward, backward, AdamW."""
        if compiled and self.compiled is None:
            self.compiled = torch.compile(self.model)
        model = self.compiled if compiled else self.model
        with torch.autocast(self.images.device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = model(self.images)
        loss.backward()
        self.optimizer.step()
        if self.to_give_back:  # gradients are still there in a fit
            from masklr.allocator import give_back_freed_memory

            give_back_freed_memory()
            self.to_give_back = False
        self.optimizer.zero_grad(set_to_none=True)
        if self.images.device.type == "cuda":
            torch.cuda.synchronize()

    def time(self, bf16: bool, compiled: bool) -> float:
        """Seconds of a step."""
        return seconds(lambda: self.step(bf16, compiled))

    def floor(self, bf16: bool) -> float:
        """Seconds that the matrix products of a step take alone."""
        with Products() as recorded:
            self.step(bf16)
        return recorded.floor(self.images.device)

    def gflop(self) -> float:
        """Matrix products of a step, in 10^9 operations; attention counted as the products that define it.

        So are the projections of mask tokens, of which a step on CPUs computes one for each patch alone (2 %).
        """
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
            self.step(bf16=False)
        return counted.get_total_flops() / 1e9


class Products(TorchDispatchMode):
    """Counts the matrix products that run under it, by function, sizes, strides and type of both factors."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "addmm_", "baddbmm", "_linear_pointwise"):
            a, b = args[1:3] if name in ("addmm", "addmm_", "baddbmm") else args[:2]
            if name == "_linear_pointwise":
                a, b = a.flatten(0, -2), b.t()
            key = tuple((tuple(x.shape), x.stride(), x.dtype) for x in (a, b))
            self.counts[torch.mm if a.dim() == 2 else torch.bmm, *key] += 1
        return func(*args, **(kwargs or {}))

    def floor(self, device: torch.device) -> float:
        """Seconds that all of them take alone: the median of three of each, after one."""
        total = 0.0
        for (function, *factors), count in self.counts.items():
            a, b = (torch.empty_strided(*size, dtype=dtype, device=device).normal_() for *size, dtype in factors)
            out = function(a, b)

            def run(function=function, a=a, b=b, out=out) -> None:  # type: ignore[no-untyped-def]
                function(a, b, out=out)
                if device.type == "cuda":
                    torch.cuda.synchronize()

            total += count * statistics.median(seconds(run) for _ in range(3))
        return total


def seconds(run: Callable[[], None]) -> float:
    """Wall-clock time of a call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def product(device: torch.device, bf16: bool) -> Callable[[], None]:
    """One product of two square matrices."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device).to(torch.bfloat16 if bf16 else torch.float32)

    def run() -> None:
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()

    run()
    return run


def ratio_interval(above: list[float], below: list[float]) -> tuple[float, float, float]:
    """Median of the rounds' ratios, and its 95 % interval from order statistics (binomial of 1/2, approximated)."""
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    count, reach = len(ratios), 0.98 * len(ratios) ** 0.5
    low, high = ratios[max(0, int(count / 2 - reach))], ratios[min(count - 1, int(count / 2 + reach))]
    return statistics.median(ratios), low, high


def serve(pipe: Any, maker: str, name: str, device: torch.device, threads: int, plain: bool) -> None:
    """Do what is asked for through a pipe, in a process of one library's own."""
    torch.set_num_threads(threads)
    steps = Steps(maker, SHAPES[name], device, keep_memory(maker, device, plain))
    while (asked := pipe.recv()) is not None:
        method, *arguments = asked
        pipe.send(getattr(steps, method)(*arguments))


def keep_memory(maker: str, device: torch.device, plain: bool) -> bool:
    """Treat freed memory as `masklr fit` does; whether it is kept."""
    if maker in PEERS or device.type != "cpu" or plain:
        return False
    from masklr.allocator import keep_freed_memory

    return keep_freed_memory()


class Library:
    """The `Steps` of a library, in a process of its own."""

    def __init__(self, maker: str, name: str, device: torch.device, plain: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        arguments = (end, maker, name, device, torch.get_num_threads(), plain)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        end.close()

    def ask(self, method: str, *arguments: bool) -> float:
        """Call a method of the steps, and wait for its answer."""
        self.pipe.send((method, *arguments))
        return self.pipe.recv()

    def close(self) -> None:
        """End the process."""
        self.pipe.send(None)
        self.process.join()


def peak_memory(side: str, shape: Shape, device: torch.device, plain: bool) -> tuple[float, float]:
    """MiB that model, optimizer and three steps (two if slow) add at their peak to this process; the last's seconds."""
    maker, bf16, compiled = SIDES[side]
    kept = keep_memory(maker, device, plain)
    small = Shape(8, 4, 16, 1, 1, 16, 1, 1, batch=2, lead=0)
    Steps(maker, small, device).step(bf16)  # imports, and what libraries allocate once
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        # The kernel's high-water mark of resident memory, set back first. `ru_maxrss` is no use: a child inherits it.
        Path("/proc/self/clear_refs").write_text("5")
        before = resident_mark()
    steps = Steps(maker, shape, device, kept)
    first = steps.time(bf16, compiled)
    for _ in range(1 if first > SLOW and not compiled else 2):
        last = steps.time(bf16, compiled)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else resident_mark()
    return peak - before, last


def resident_mark() -> float:
    """The highest resident memory of this process so far, in MiB (Linux)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1024


def hardware(device: torch.device) -> str:
    """Name of the processor or GPU, and torch's version."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE))
        if "model name" in found:
            name = f"{found['model name']} (family {found['cpu family']}, model {found['model']})"
    return f"{torch.get_num_threads()} CPU threads, {name}, torch {torch.__version__}"


Judged = tuple[str, str, bool]


def judged_times(times: dict[str, list[float]], shape: Shape) -> list[Judged]:
    """What is compared, the measured factor, and whether it is within its limit."""
    lines = []
    for precision, limit in (("bf16", shape.lead), ("fp32", 1.0)):
        own = f"masklr {precision}"
        peers = [side for peer in PEERS if (side := f"{peer} {precision}") in times]
        if own in times and peers:
            fastest = min(peers, key=lambda side: statistics.median(times[side]))
            middle, low, high = ratio_interval(times[fastest], times[own])
            # In fp32 matrix products bound both sides: not to be slower is all that is asked.
            good = middle >= limit if precision == "bf16" else high >= limit
            lines.append((f"{own} against {fastest}", f"{middle:.2f} [{low:.2f}, {high:.2f}]  least {limit:.2f}", good))
    if {"masklr bf16", "masklr bf16 cross"} <= times.keys():
        middle, low, high = ratio_interval(times["masklr bf16"], times["masklr bf16 cross"])
        shown = f"{middle:.2f} [{low:.2f}, {high:.2f}]  least {CROSS_LEAD:.2f}"
        lines.append(("cross decoder against the full one", shown, middle >= CROSS_LEAD))
    return lines


def judged_memory(memory: dict[str, float]) -> list[Judged]:
    """Memory beside that of the thriftiest peer, and whether it is not more."""
    lines = []
    for precision in ("bf16", "fp32"):
        own = f"masklr {precision}"
        peers = [side for peer in PEERS if (side := f"{peer} {precision}") in memory]
        if own in memory and peers:
            least = min(peers, key=lambda side: memory[side])
            ratio = memory[own] / memory[least]
            lines.append((f"memory, {own} against {least}", f"{ratio:.2f}  most 1.00", ratio <= 1))
    return lines


def compare(name: str, options: argparse.Namespace, device: torch.device) -> bool:
    """Print the table of a shape; whether all its lines are within their limits."""
    shape = SHAPES[name]
    command = [sys.executable, __file__, "--device", str(device), "--shapes", name, "--memory-of"]
    plain = ["--plain"] if options.plain else []
    memory, slow = {}, {}
    for side in options.sides if options.memory else []:
        done = subprocess.run([*command, side, *plain], check=True, stdout=subprocess.PIPE, text=True)
        memory[side], last = (float(number) for number in done.stdout.split())
        if last > SLOW and not SIDES[side][2]:
            slow[side] = last
    libraries = {
        maker: Library(maker, name, device, options.plain) for maker in {SIDES[s][0]: 0 for s in options.sides}
    }
    gflop = {maker: library.ask("gflop") for maker, library in libraries.items()}
    own_bf16 = device.type != "cpu" or has_bf16_products()
    products = {bf16: product(device, bf16 and own_bf16) for bf16 in (False, True)}

    def one_round() -> tuple[dict[str, float], dict[bool, float]]:
        times = {}
        for side in options.sides:
            maker, bf16, compiled = SIDES[side]
            times[side] = slow.get(side) or libraries[maker].ask("time", bf16, compiled)
        return times, {bf16: min(seconds(run) for _ in range(3)) for bf16, run in products.items()}

    for _ in range(2):
        warm, _ = one_round()
    slow |= {side: time for side, time in warm.items() if time > SLOW and not SIDES[side][2]}
    rounds = [one_round() for _ in range(options.steps)]
    times = {side: [found[side] for found, _ in rounds] for side in options.sides}
    own = [side for side in options.sides if SIDES[side][0] not in PEERS]  # peers' attention is one operator
    floor = {side: libraries[SIDES[side][0]].ask("floor", SIDES[side][1]) for side in own}
    for library in libraries.values():
        library.close()
    size = 8192 if device.type == "cuda" else 2048
    peak = {bf16: 2e-9 * size**3 / statistics.median(found[bf16] for _, found in rounds) for bf16 in products}
    sizes = f"{shape.image} px, patch {shape.patch}, width {shape.width} x {shape.depth}"
    sizes += f", decoder {shape.decoder_width} x {shape.decoder_depth}, batch {shape.batch}"
    in_bf16 = f"{peak[True]:.0f} in bf16" if own_bf16 else "none in bf16"
    print(f"({name}) {sizes}; {options.steps} rounds; peak {peak[False]:.0f} GFLOP/s in fp32, {in_bf16}")
    print(f"{'':24}{'seconds':>10}{'images/s':>12}{'GFLOP':>10}{'% of peak':>12}{'floor, s':>10}{'MiB':>10}")
    for side in options.sides:
        maker, bf16, _ = SIDES[side]
        median = statistics.median(times[side])
        share = 100 * gflop[maker] / median / peak[bf16]
        named = f"{side} *" if side in slow else side
        line = f"{named:24}{median:10.3f}{shape.batch / median:12.1f}{gflop[maker]:10.0f}{share:12.0f}"
        line += f"{floor[side]:10.3f}" if side in floor else f"{'':10}"
        print(line + (f"{memory[side]:10.0f}" if side in memory else ""))
    lines = judged_times(times, shape) + judged_memory(memory)
    for what, shown, good in lines:
        print(f"  {what:52}{shown}{'' if good else '  falls short'}")
    sys.stdout.flush()
    return all(good for *_, good in lines)


def main() -> int:
    """Print the tables; 1 if a line falls short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="shapes to run")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="sides to run")
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each side")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the peak memory")
    parser.add_argument("--plain", action="store_true", help="masklr gives freed memory back, as glibc has it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"expected `--steps` of at least 1, got {options.steps}")
    device = torch.device(options.device)
    if options.memory_of:
        print(*peak_memory(options.memory_of, SHAPES[options.shapes[0]], device, options.plain))
        return 0
    print(hardware(device))
    good = [compare(name, options, device) for name in options.shapes]
    print("no line falls short" if all(good) else "lines fall short")
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
