"""Time a training step of the masked autoencoder beside transformers' ViTMAEForPreTraining, at the same sizes.

    pip install 'masklr[bench]' && python scripts/bench_mae.py

Both sides run in one process, alternating, on the same images, with the same optimizer; the medians and the median of
the step-by-step ratios are printed. Exits with 1 if masklr is slower in float32 or in bf16.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from masklr.models import MaskedAutoencoder


def masklr_model(width: int, depth: int, heads: int, decoder_depth: int, image: int, patch: int) -> nn.Module:
    """Masklr's side."""
    return MaskedAutoencoder(
        image_size=image,
        patch_size=patch,
        encoder_args={"embed_dim": width, "depth": depth, "num_heads": heads},
        decoder_dim=width,
        decoder_depth=decoder_depth,
        decoder_heads=heads,
    )


def transformers_model(width: int, depth: int, heads: int, decoder_depth: int, image: int, patch: int) -> nn.Module:
    """The peer's side."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    return ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=image,
            patch_size=patch,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            decoder_hidden_size=width,
            decoder_num_hidden_layers=decoder_depth,
            decoder_num_attention_heads=heads,
            decoder_intermediate_size=4 * width,
            mask_ratio=0.75,
            norm_pix_loss=True,
        )
    )


def training_step(model: nn.Module, images: Tensor, bf16: bool) -> Callable[[], None]:
    """One step: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()

    def step() -> None:
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = model(images).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if images.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def seconds(step: Callable[[], None]) -> float:
    """Wall-clock time of a call."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def main() -> int:
    """Print the table; 1 if masklr is slower anywhere."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each side")
    parser.add_argument("--batch", type=int, default=256, help="images a step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    sizes = {"width": 192, "depth": 12, "heads": 3, "decoder_depth": 4, "image": 32, "patch": 4}
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{sizes}, batch {options.batch}, {options.steps} steps")
    print(f"{name}, {platform.machine()}, torch {torch.__version__}")
    print(f"{'':10}{'masklr, s':>12}{'transformers, s':>18}{'times faster':>20}{'images/s':>12}")
    slower = False
    for precision in ("float32", "bfloat16"):
        steps = []
        for make in (masklr_model, transformers_model):
            torch.manual_seed(0)
            images = torch.randn(options.batch, 3, sizes["image"], sizes["image"], device=device)
            steps.append(training_step(make(**sizes).to(device), images, bf16=precision == "bfloat16"))
        for step in steps * 2:
            step()
        pairs = [tuple(seconds(step) for step in steps) for _ in range(options.steps)]
        ours, peer = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratios = sorted(theirs / mine for mine, theirs in pairs)
        # The interval of a median from order statistics: normal approximation of the binomial of 1/2.
        reach = 0.98 * len(ratios) ** 0.5
        low = ratios[max(0, int(len(ratios) / 2 - reach))]
        high = ratios[min(len(ratios) - 1, int(len(ratios) / 2 + reach))]
        slower |= ours > peer or statistics.median(ratios) < 1
        shown = f"{statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}]"
        print(f"{precision:10}{ours:12.3f}{peer:18.3f}{shown:>20}{options.batch / ours:12.0f}")
    print("masklr is slower" if slower else "masklr is not slower in either")
    return int(slower)


if __name__ == "__main__":
    sys.exit(main())
