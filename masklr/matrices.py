"""Which matrices of a model are measured, and under which names.

Every weight of a linear, convolutional or embedding layer is seen as a matrix without being copied; fused projections
are split; products of several weights are measured without being formed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, takewhile
from typing import Literal

from jaxtyping import Shaped
from torch import Tensor, nn

from masklr.layer_weights import EMBEDDINGS, Weight, joined, layer_weights, outermost_modules
from masklr.names import captures, matching
from masklr.products import product_core, product_widths

#: Attributes by which attentions tell their number of heads; names of their separate projections and of the output's.
HEADS = ("num_heads", "num_attention_heads", "n_heads")
PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"))
OUTPUTS = ("proj", "out_proj", "o_proj")


@dataclass(frozen=True, eq=False)
class Product:
    """A product of matrices that is not formed.

    Attributes:
        factors: The matrices, the first one applied first.
        kind: Of a head's queries and keys, of its values and output, or of a chain of layers.
    """

    factors: tuple[Weight, ...]
    kind: Literal["qk", "ov", "product"]

    @property
    def widths(self) -> list[int]:
        """Widths between the factors, the input's first."""
        return product_widths([factor.shape for factor in self.factors])

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the product."""
        return self.widths[-1], self.widths[0]

    def value(self) -> Tensor:
        """A matrix in float64 with the product's non-zero singular values; see `masklr.products.product_core`."""
        return product_core([factor.value() for factor in self.factors])


def measured_matrices(
    model: nn.Module,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    attention_products: bool = False,
    products: Sequence[Sequence[str]] = (),
) -> dict[str, Shaped[Tensor, "rows cols"]]:
    """Weight matrices of a model by name, as detached views of its parameters.

    * Linear layer: its weight (out, in), under the layer's name in `named_modules()`.
    * Convolution: one row a filter, (out, in / groups * kernel). A depthwise one is the matrix of its filters too: the
      blocks of its block-diagonal matrix are vectors, whose rank says nothing. A transposed convolution is measured as
      the convolution that it is the adjoint of, (in, out / groups * kernel).
    * Embedding: one row an entry, (entries, width).
    * Fused projection `qkv` of an attention: three matrices `...qkv.q`, `...qkv.k`, `...qkv.v`. The input projection of
      `nn.MultiheadAttention`: `...in_proj.q`, `...in_proj.k`, `...in_proj.v`.
    * A layer with a method `effective_weight()`: what that returns, and nothing inside the layer.
    * A parameter of any other module, such as `pos_embed` or a table of relative positions, only if a pattern in
      `include` ends in its name: axes of length 1 are left out, one row an entry of the first that remains.
    * With `attention_products`, for each head of an attention: `...qk.{head}`, W_Q^T W_K, the form by which tokens are
      compared, and `...ov.{head}`, W_O W_V, the map from a token to what it gives. Biases, position encodings and
      normalizations of queries and keys are not part of them. Found are fused `qkv`, `nn.MultiheadAttention`, and
      separate `q_proj`, `k_proj`, `v_proj` (or query, key, value; q, k, v) with `proj`, `out_proj` or `o_proj`; keys
      and values may be shared by groups of heads.
    * With `products`, the product of the weights of layers that follow one another, such as `blocks.0.mlp.fc2*fc1`.
      Biases and activations in between are left out.

    Weights that several layers share are returned once, under the first name. The prefix `_orig_mod.` of compiled
    modules is left out of names. If the model is itself such a layer, the name is `weight`.

    Args:
        model: Any module.
        include: Patterns of names (see `masklr.names.matching`) to keep, those of products too. None keeps all.
        exclude: Patterns of names to leave out.
        attention_products: Whether the products of each head of each attention are measured.
        products: Chains of patterns, the first layer first, such as `[["blocks.*.mlp.fc1", "blocks.*.mlp.fc2"]]`; a
            wildcard stands for the same in all patterns of a chain.

    Returns:
        Matrices in the order of `named_modules()`, then products. They share memory with the parameters (a convolution
        stored channels-last is copied, as is an effective weight or one that is gathered from shards): writing to one
        changes the model. Of a product, a small matrix with the same non-zero singular values, in float64.

    Raises:
        ValueError: A pattern matches nothing, no matrix or none of the products asked for is left, or the layers of a
            chain do not fit.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 5), nn.Flatten(), nn.Linear(8, 2))
        >>> {name: tuple(matrix.shape) for name, matrix in measured_matrices(model).items()}
        {'0': (8, 75), '2': (2, 8)}
        >>> model = nn.Sequential(nn.Linear(50, 3), nn.Linear(3, 40))
        >>> measured_matrices(model, products=[["0", "1"]])["1*0"].shape  # the product is (40, 50), of rank 3
        torch.Size([3, 3])
    """
    named = named_matrices(
        model, include=include, exclude=exclude, attention_products=attention_products, products=products
    )
    return {name: matrix.value() for name, matrix in named.items()}


def named_matrices(
    model: nn.Module,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    attention_products: bool = False,
    products: Sequence[Sequence[str]] = (),
) -> dict[str, Weight | Product]:
    """The matrices of `measured_matrices`, not yet read: one at a time is gathered, and gradients are found.

    Args:
        model: Any module.
        include: Patterns of names to keep.
        exclude: Patterns of names to leave out.
        attention_products: Whether the products of each head of each attention are measured.
        products: Chains of patterns, the first layer first.

    Returns:
        Matrices in the order of `named_modules()`, then products.

    Raises:
        ValueError: As `measured_matrices` does.
    """
    modules = list(outermost_modules(model))
    weights, repeated = layer_weights(modules, {pattern.rpartition(".")[2] for pattern in include or ()})
    combined: dict[str, Weight | Product] = {}
    if attention_products:
        combined |= _attention_products(modules, weights, repeated)
        if not combined:
            raise ValueError("Expected an attention for `attention_products`, got a model in which none was found.")
    combined |= _product_maps(weights, products)
    once: dict[str, Weight | Product] = {name: weight for name, weight in weights.items() if name not in repeated}
    selected = _selected(once | combined, include, exclude)
    if combined and not combined.keys() & selected.keys():
        raise ValueError(f"Expected `include` to keep a product that was asked for, got {include} and {exclude}.")
    return selected


# ------------------------------------------------------------------------------------------------ products of heads


def _attention_products(
    modules: list[tuple[str, nn.Module]], weights: Mapping[str, Weight], repeated: set[str]
) -> dict[str, Product]:
    """For each head, W_Q^T W_K and W_O W_V, by name."""
    products: dict[str, Product] = {}
    for name, module in modules:
        num_heads = next((getattr(module, a) for a in HEADS if isinstance(getattr(module, a, None), int)), None)
        names = None if num_heads is None else _projections(name, weights)
        if num_heads is None or names is None or repeated.issuperset(names):
            continue
        q, k, v, o = (weights[projection] for projection in names)
        pairs = {"qk": (k, q.part(lambda matrix: matrix.T)), "ov": (v, o)}
        for kind in ("qk", "ov"):
            per_head = _per_head(*pairs[kind], num_heads)
            products |= {joined(name, f"{kind}.{h}"): Product(factors, kind) for h, factors in enumerate(per_head)}
    return products


def _projections(name: str, weights: Mapping[str, Weight]) -> tuple[str, str, str, str] | None:
    """Names of the matrices of queries, keys, values and output of an attention; None if one is not to be found."""
    inputs = [tuple(joined(name, f"{fused}.{part}") for part in "qkv") for fused in ("qkv", "in_proj")]
    inputs += [tuple(joined(name, projection) for projection in names) for names in PROJECTIONS]
    found = [names for names in inputs if all(projection in weights for projection in names)]
    outputs = [joined(name, output) for output in OUTPUTS if joined(name, output) in weights]
    return (*found[0], outputs[0]) if found and outputs else None  # type: ignore[return-value]


def _per_head(first: Weight, last: Weight, num_heads: int) -> Iterator[tuple[Weight, Weight]]:
    """Rows of the first matrix and columns of the last that make a head; groups of heads may share their rows.

    Nothing if sizes do not fit.
    """
    head_dim, rest = divmod(last.shape[1], num_heads)
    groups = first.shape[0] // head_dim if head_dim else 0
    if rest or not groups or first.shape[0] % head_dim or num_heads % groups:
        return
    for head in range(num_heads):
        group = head * groups // num_heads
        rows, cols = partial(_rows, group * head_dim, head_dim), partial(_columns, head * head_dim, head_dim)
        yield first.part(rows), last.part(cols)


def _rows(start: int, count: int, matrix: Tensor) -> Tensor:
    return matrix[start : start + count]


def _columns(start: int, count: int, matrix: Tensor) -> Tensor:
    return matrix[:, start : start + count]


# ------------------------------------------------------------------------------------------------ products of layers


def _product_maps(weights: Mapping[str, Weight], chains: Sequence[Sequence[str]]) -> dict[str, Product]:
    """The products of the layers of each chain, by name."""
    products: dict[str, Product] = {}
    for patterns in chains:
        if isinstance(patterns, str) or len(patterns) < 2:
            raise ValueError(f"Expected `products` of lists of two or more patterns, got {patterns!r}.")
        for names in _expanded(weights, patterns):
            product = Product(tuple(_linear(name, weights[name]) for name in names), "product")
            for first, second in pairwise(names):
                rows, cols = weights[first].shape[0], weights[second].shape[1]
                if rows != cols:
                    raise ValueError(
                        "Expected `products` of layers that follow one another, "
                        f"got {first!r} with {rows} outputs before {second!r} with {cols} inputs."
                    )
            products[product_name(names)] = product
    return products


def _expanded(names: Mapping[str, Weight], patterns: Sequence[str]) -> list[list[str]]:
    """Chains of names; what a wildcard stands for is the same in all patterns that have one."""
    found = [{stands_for: n for n, stands_for in captures(names, p, "products").items()} for p in patterns]
    varying = next((i for i, by_capture in enumerate(found) if () not in by_capture), 0)
    chains = []
    for stands_for, name in found[varying].items():
        for pattern, by_capture in zip(patterns, found, strict=True):
            if () not in by_capture and by_capture.keys() != found[varying].keys():
                raise ValueError(
                    f"Expected patterns in `products` whose wildcards stand for the same, got {patterns[varying]!r} "
                    f"with {len(found[varying])} matches (such as {name!r}) and {pattern!r} with {len(by_capture)}."
                )
        chains.append([by_capture.get((), by_capture.get(stands_for, "")) for by_capture in found])
    return chains


def product_name(names: Sequence[str]) -> str:
    """Name of the product of a chain of layers: the last one first, as in the formula, after what all have in common.

    Args:
        names: Names of the layers, the first one applied first.

    Example:
        >>> product_name(["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"])
        'blocks.0.mlp.fc2*fc1'
    """
    parts = [name.split(".") for name in names]
    levels = zip(*(part[:-1] for part in parts), strict=False)
    common = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]
    return joined(".".join(common), "*".join(".".join(p[len(common) :]) for p in reversed(parts)))


def _linear(name: str, weight: Weight) -> Weight:
    """The weight of a layer that is a plain matrix applied to vectors, else an error."""
    layer, source = weight.layer, weight.source()
    is_kernel = source.ndim > 2 and source[0, 0].numel() > 1
    if is_kernel or getattr(layer, "transposed", False) or getattr(layer, "groups", 1) != 1:
        raise ValueError(
            f"Expected `products` of linear layers or 1 x 1 convolutions, got {name!r}, a {type(layer).__name__} whose "
            "matrix of filters is not the map that it applies."
        )
    if isinstance(layer, EMBEDDINGS):
        raise ValueError(f"Expected `products` of linear layers, got the embedding {name!r}.")
    return weight


# ------------------------------------------------------------------------------------------------ selection


def _selected(
    matrices: dict[str, Weight | Product], include: Sequence[str] | None, exclude: Sequence[str] | None
) -> dict[str, Weight | Product]:
    kept = list(matrices) if include is None else matching(matrices, include, "include")
    left_out = set(matching(matrices, exclude or (), "exclude"))
    selected = {name: matrices[name] for name in kept if name not in left_out}
    if not selected:
        raise ValueError(
            f"Expected a matrix to measure, got `include` {include} and `exclude` {exclude} of {len(matrices)}."
        )
    return selected
