"""Second moments of what layers are given on held-out data, to weight product maps by."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from masklr.matrices import Product
from masklr.moments import Moments, SecondMoment
from masklr.products import null_factors, product_core
from masklr.spectra import singular_values


class InputMoments:
    """Sums x x^T over everything that the first layers of product maps are given, in float64, over all processes.

    Args:
        products: Product maps by name.
        device: Where sums are kept.

    Raises:
        ValueError: The first layer is a part of `nn.MultiheadAttention`, which hides what its parts are given.
    """

    def __init__(self, products: Mapping[str, Product], device: torch.device) -> None:
        self.products = dict(products)
        # One layer may be the first of several maps.
        self._layers: dict[nn.Module, str] = {}
        self._moments: dict[nn.Module, SecondMoment] = {}
        for name, product in products.items():
            layer = product.factors[0].layer
            if isinstance(layer, nn.MultiheadAttention):
                raise ValueError(f"Expected a first layer of {name!r} with one input, got an nn.MultiheadAttention.")
            self._layers.setdefault(layer, name)
            self._moments.setdefault(layer, SecondMoment(product.widths[0]).to(device))

    def add(self, pl_module: pl.LightningModule, images: Any) -> None:
        """Add what the layers are given when the module is called on a batch. Call it under `evaluation`.

        Raises:
            ValueError: A layer did not run.
        """
        with self._collecting() as counts:
            pl_module(images)
        if silent := [self._layers[layer] for layer, count in counts.items() if not count]:
            raise ValueError(
                f"Layer of {silent[0]!r} did not run in `forward` of {type(pl_module).__name__}: nothing to weight by."
            )

    @contextmanager
    def _collecting(self) -> Iterator[dict[nn.Module, int]]:
        counts = dict.fromkeys(self._layers, 0)

        def collect(layer: nn.Module, args: tuple[Any, ...]) -> None:
            counts[layer] += 1
            self._moments[layer].update(_vectors(args[0], layer))

        handles = [layer.register_forward_pre_hook(collect) for layer in self._layers]
        try:
            yield counts
        finally:
            for handle in handles:
                handle.remove()

    def moments(self) -> dict[str, Moments]:
        """Moments by the name of the product, summed over all processes.

        Raises:
            ValueError: There was no sample, or one was not finite; the sentence names the product.
        """
        found: dict[nn.Module, Moments] = {}
        for layer, moment in self._moments.items():
            try:
                found[layer] = moment.compute()
            except ValueError as error:
                raise ValueError(f"{error} (input of the product {self._layers[layer]!r})") from error
        return {name: found[product.factors[0].layer] for name, product in self.products.items()}


def weighted_singular_values(product: Product, moments: Moments) -> tuple[Tensor, Tensor]:
    r"""Spectrum of a product map on the inputs that it gets, and that of a random one of the same sizes.

    .. math:: \sigma(W_L \cdots W_1 C^{1/2}), \qquad C = \tfrac{1}{N} \sum_i x_i x_i^T

    Args:
        product: The map.
        moments: Moments of its inputs, not centered.

    Returns:
        Singular values of the map and of its null.
    """
    C = moments.gram / moments.count
    eigenvalues, vectors = torch.linalg.eigh(C.cpu())
    root = vectors * eigenvalues.clamp(min=0).sqrt()  # C^(1/2) up to a rotation, which no singular value sees

    def spectrum(factors: list[Tensor]) -> Tensor:
        first = factors[0].double()
        return singular_values(product_core([first @ root.to(first.device), *factors[1:]]))

    return spectrum([factor.value() for factor in product.factors]), spectrum(null_factors(product.widths))


def _vectors(x: Tensor, layer: nn.Module) -> Tensor:
    """Inputs of a linear layer, or of a 1 x 1 convolution at every pixel, as rows."""
    weight = getattr(layer, "weight", None)
    is_convolution = weight is not None and weight.ndim > 2
    return (x.movedim(1, -1) if is_convolution else x).flatten(0, -2)
