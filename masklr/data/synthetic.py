"""Samples whose second moments are exactly the given ones, so that population formulas hold on a finite set."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from masklr.data.loading import ImageData, SplitName
from masklr.data.splits import Images, Split


class Synthetic(ImageData):
    r"""Linear targets of inputs with a given second moment; what theory says of the population is true of this set.

    .. math:: y = M x + \mathrm{noise} \cdot e

    The N samples are made such that :math:`X^\top X / N = C`, :math:`E^\top E / N = I` and :math:`X^\top E = 0` up to
    rounding in float64, so that the mean of any squared loss of a linear network over them is that of the population:
    there is no sampling error. Nothing is held out: training, validation and test are the same N samples, shuffled in
    training. A batch is (x, y, positions); x (B, n) and y (B, m) are float32, or float64 under a trainer of precision
    `64-true`.

    Exactly one of `spectrum`, `target` and `autoencode` says what M is, at most one of `input_spectrum`,
    `autocorrelation` and `covariance` what C is; without any of these C is the identity. Files are .npy, .npz (with one
    array), .pt (a tensor) or .csv.

    Attributes:
        second_moment: C (n, n), float64, not centered.
        target_matrix: M (m, n), float64.
        irreducible: Smallest loss of any function of x, summed over outputs: noise^2 * m.

    Args:
        spectrum: Singular values of M, 0 or more; further ones are 0.
        target: File of the matrix M, (outputs, inputs).
        autoencode: Whether the targets are the inputs, M = I.
        input_spectrum: Eigenvalues of C, 0 or more.
        autocorrelation: rho of C_ij = rho^|i-j|, in (-1, 1).
        covariance: File of the matrix C.
        num_inputs: Number of inputs n; None takes it from the other arguments.
        num_outputs: Number of outputs m; None takes it from the other arguments.
        rotate: Whether singular vectors of `spectrum` and eigenvectors of `input_spectrum` are random; otherwise these
            matrices are diagonal.
        noise: Standard deviation of each output's noise, 0 or more.
        num_samples: Number of samples N, at least n, and n + m with noise.
        batch_size: Samples in one optimizer step, over all ranks and accumulated batches.
        seed: Seed of the samples, of the random vectors and of the order of training samples.

    Raises:
        ValueError: Arguments that exclude each other, sizes that do not agree, a matrix that is not finite.
        FileNotFoundError: A file that is not there.

    Example:
        >>> data = Synthetic(spectrum=[4.0, 3.0, 2.0, 1.0], num_inputs=6, autocorrelation=0.9)
        >>> data.target_matrix.shape
        torch.Size([4, 6])
    """

    def __init__(
        self,
        spectrum: list[float] | None = None,
        target: str | None = None,
        autoencode: bool = False,
        input_spectrum: list[float] | None = None,
        autocorrelation: float | None = None,
        covariance: str | None = None,
        num_inputs: int | None = None,
        num_outputs: int | None = None,
        rotate: bool = False,
        noise: float = 0.0,
        num_samples: int = 1024,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, val_fraction=0.0, seed=seed)
        _check_choice({"spectrum": spectrum, "target": target, "autoencode": autoencode or None}, exactly=True)
        inputs_given = {"input_spectrum": input_spectrum, "autocorrelation": autocorrelation, "covariance": covariance}
        _check_choice(inputs_given, exactly=False)
        if rotate and spectrum is None and input_spectrum is None:
            raise ValueError("Expected `rotate` only beside `spectrum` or `input_spectrum`, whose vectors are free.")
        if not 0 <= noise < math.inf:
            raise ValueError(f"Expected `noise` of 0 or more, got {noise}.")
        target_matrix = None if target is None else matrix_file("target", target)
        second_moment = None if covariance is None else _covariance_file(covariance)
        inputs = _agreed_size(
            {
                "num_inputs": num_inputs,
                "target": None if target_matrix is None else target_matrix.shape[1],
                "input_spectrum": None if input_spectrum is None else len(input_spectrum),
                "covariance": None if second_moment is None else len(second_moment),
            },
            default=None if spectrum is None else len(spectrum),
        )
        outputs = _agreed_size(
            {
                "num_outputs": num_outputs,
                "target": None if target_matrix is None else target_matrix.shape[0],
                "autoencode": inputs if autoencode else None,
            },
            default=None if spectrum is None else len(spectrum),
        )
        needed = inputs + (outputs if noise else 0)
        if num_samples < needed:
            of_what = "inputs and outputs" if noise else "inputs"
            raise ValueError(f"Expected `num_samples` of at least {needed}, as many as {of_what}, got {num_samples}.")
        generator = torch.Generator().manual_seed(seed)
        if target_matrix is None:
            target_matrix = torch.eye(inputs, dtype=torch.float64)
            if spectrum is not None:
                target_matrix = _with_singular_values(spectrum, outputs, inputs, generator if rotate else None)
        if second_moment is None:
            second_moment = torch.eye(inputs, dtype=torch.float64)
            if input_spectrum is not None:
                second_moment = _with_eigenvalues(input_spectrum, generator if rotate else None)
            elif autocorrelation is not None:
                second_moment = _autoregressive(autocorrelation, inputs)
        self.target_matrix: Tensor = target_matrix
        self.second_moment: Tensor = second_moment
        self.noise, self.num_samples, self.irreducible = noise, num_samples, noise**2 * outputs

    def setup(self, stage: str | None = None) -> None:
        """Make the samples, once, in the trainer's precision."""
        super().setup(stage)
        double = self.trainer is not None and self.trainer.precision == "64-true"
        for split in self.splits.values():
            assert isinstance(split.images, Samples)
            split.images.dtype = torch.float64 if double else torch.float32

    def training_images(self) -> "Samples":  # type: ignore[override]
        """All samples."""
        outputs, inputs = self.target_matrix.shape
        columns = inputs + (outputs if self.noise else 0)
        generator = torch.Generator().manual_seed(self.seed + 1)
        draws = torch.randn(self.num_samples, columns, dtype=torch.float64, generator=generator)
        orthonormal = torch.linalg.qr(draws).Q * math.sqrt(self.num_samples)
        x = orthonormal[:, :inputs] @ _square_root(self.second_moment)
        y = x @ self.target_matrix.T
        if self.noise:
            y = y + self.noise * orthonormal[:, inputs:]
        return Samples(x, y)

    def _open(self, name: SplitName) -> None:
        if "train" not in self._opened:
            self._opened["train"] = self.training_images()  # type: ignore[assignment]
        self.splits[name] = Split(self._opened["train"], np.arange(self.num_samples))

    def _describe(self, opened: list[Images]) -> None:
        """There are no classes and no image sizes."""


class Samples:
    """Inputs and targets in memory, in the place of images and labels.

    Args:
        x: Inputs (N, n), float64.
        y: Targets (N, m), float64.
    """

    num_skipped = 0

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y
        self.dtype = torch.float32

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, rows: np.ndarray, draws: Sequence[tuple[int, ...]] | None) -> tuple[Tensor, Tensor, None]:
        """See `Images.batch`."""
        index = torch.from_numpy(rows)
        return self.x[index].to(self.dtype), self.y[index].to(self.dtype), None


def matrix_file(argument: str, path: str) -> Tensor:
    """A finite float64 matrix from a .npy, .npz, .pt or .csv file.

    Args:
        argument: The argument that the path came by, for the error.
        path: The file; a .npz file has one array.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no finite matrix; the sentence names the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"`{argument}`: there is no file {path!r}.")
    try:
        values = _read(path)
        matrix = torch.as_tensor(values).double()
    except Exception as error:  # what these readers raise is not documented
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"`{argument}`: {path!r} cannot be read as a matrix: {reason}") from error
    if matrix.ndim != 2 or not matrix.numel():
        raise ValueError(f"Expected `{argument}` {path!r} to hold a matrix, got shape {tuple(matrix.shape)}.")
    if not matrix.isfinite().all():
        raise ValueError(f"Expected `{argument}` {path!r} to be finite, got {int((~matrix.isfinite()).sum())} values.")
    return matrix


def _read(path: str) -> Any:
    ending = Path(path).suffix
    if ending == ".npy":
        return np.load(path, allow_pickle=False)
    if ending == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            if len(arrays.files) != 1:
                raise ValueError(f"expected one array, got {len(arrays.files)}.")
            return arrays[arrays.files[0]]
    if ending == ".pt":
        return torch.load(path, weights_only=True, map_location="cpu")
    if ending == ".csv":
        return np.loadtxt(path, delimiter=",", ndmin=2)
    raise ValueError(f"expected a .npy, .npz, .pt or .csv file, got {ending!r}.")


def _covariance_file(path: str) -> Tensor:
    """A second moment from a file."""
    matrix = matrix_file("covariance", path)
    scale = matrix.abs().max().item()
    if matrix.shape[0] != matrix.shape[1] or not torch.allclose(matrix, matrix.T, rtol=0, atol=1e-10 * scale):
        raise ValueError(f"Expected `covariance` {path!r} to be symmetric; it is not.")
    matrix = (matrix + matrix.T) / 2
    smallest = torch.linalg.eigvalsh(matrix)[0].item()
    if smallest < -1e-10 * scale:
        raise ValueError(f"Expected `covariance` {path!r} without negative eigenvalues, got {smallest:.3g}.")
    return matrix


def _check_choice(given: dict[str, Any], exactly: bool) -> None:
    """Raise unless at most one of these arguments is given, or exactly one."""
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1 or (exactly and not names):
        *most, last = (f"`{name}`" for name in given)
        wanted = f"{'one' if exactly else 'at most one'} of {', '.join(most)} and {last}"
        raise ValueError(f"Expected {wanted}, got {' and '.join(names) or 'none'}.")


def _agreed_size(sizes: dict[str, int | None], default: int | None) -> int:
    """The size that all arguments agree on."""
    given = {name: size for name, size in sizes.items() if size is not None}
    first = next(iter(given), None)
    if first is None:
        if default is None:
            raise ValueError("Expected `num_inputs`, which no other argument gives, got None.")
        return default
    for name, size in given.items():
        if size != given[first]:
            raise ValueError(f"Expected `{first}` and `{name}` of one size, got {given[first]} and {size}.")
    if given[first] < 1:
        raise ValueError(f"Expected `{first}` of at least 1, got {given[first]}.")
    return given[first]


def _spectrum(argument: str, values: Sequence[float], limit: int) -> Tensor:
    if not values or not all(0 <= value < math.inf for value in values):
        raise ValueError(f"Expected `{argument}` of finite values of 0 or more, got {list(values)}.")
    if len(values) > limit:
        raise ValueError(f"Expected `{argument}` of at most {limit} values for these sizes, got {len(values)}.")
    return torch.tensor(values, dtype=torch.float64)


def _with_singular_values(
    spectrum: Sequence[float], outputs: int, inputs: int, generator: torch.Generator | None
) -> Tensor:
    sigma = _spectrum("spectrum", spectrum, min(outputs, inputs))
    matrix = torch.zeros(outputs, inputs, dtype=torch.float64)
    matrix.diagonal()[: len(sigma)] = sigma
    if generator is None:
        return matrix
    return _random_orthogonal(outputs, generator) @ matrix @ _random_orthogonal(inputs, generator).T


def _with_eigenvalues(spectrum: Sequence[float], generator: torch.Generator | None) -> Tensor:
    eigenvalues = _spectrum("input_spectrum", spectrum, len(spectrum))
    if generator is None:
        return eigenvalues.diag()
    vectors = _random_orthogonal(len(eigenvalues), generator)
    matrix = vectors * eigenvalues @ vectors.T
    return (matrix + matrix.T) / 2


def _autoregressive(rho: float, inputs: int) -> Tensor:
    if not -1 < rho < 1:
        raise ValueError(f"Expected `autocorrelation` in (-1, 1), got {rho}.")
    place = torch.arange(inputs, dtype=torch.float64)
    return torch.tensor(rho, dtype=torch.float64) ** (place - place[:, None]).abs()


def _random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q


def _square_root(matrix: Tensor) -> Tensor:
    """Symmetric square root of a positive semidefinite matrix."""
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    return vectors * eigenvalues.clamp(min=0).sqrt() @ vectors.T
