"""All masks of a few units, random problems, and minimizers that know nothing of the closed forms."""

import itertools

import numpy as np
import pytest
import scipy.optimize
import torch


@pytest.fixture(scope="session")
def every_keep():
    """All 2^count masks, one a row of zeros and ones, and their probabilities."""

    def masks(count, p):
        keep = torch.tensor(list(itertools.product([0.0, 1.0], repeat=count)), dtype=torch.float64)
        p = torch.as_tensor(p, dtype=torch.float64).expand(count)
        return keep, torch.where(keep > 0, 1 - p, p).prod(1)

    return masks


@pytest.fixture(scope="session")
def draw():
    """Standard normal numbers in float64; the same for the same sizes and seed."""

    def numbers(*sizes, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*sizes, dtype=torch.float64, generator=generator)

    return numbers


@pytest.fixture(scope="session")
def second_moment(draw):
    """A second moment that is neither diagonal nor scaled to one, of any rank."""

    def moment(size, seed=0, rank=None):
        factor = draw(size, rank or size + 1, seed=seed)
        return factor @ factor.T

    return moment


@pytest.fixture(scope="session")
def roots():
    """C^(1/2) of a second moment C."""

    def root(C):
        eigenvalues, vectors = torch.linalg.eigh(C)
        return (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T

    return root


@pytest.fixture(scope="session")
def minimum():
    """The lowest value that L-BFGS finds from several random starts, and the tensors where it is."""

    def lowest(objective, shapes, seeds=3, scale=1.0):
        sizes = [int(np.prod(shape)) for shape in shapes]

        def tensors(x):
            parts = torch.split(x, sizes)
            return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

        def value_and_gradient(x):
            variable = torch.from_numpy(x).requires_grad_()
            value = objective(*tensors(variable))
            value.backward()
            return value.item(), variable.grad.numpy()

        options = {"gtol": 1e-9, "ftol": 0, "maxcor": 30, "maxiter": 3000, "maxfun": 4000}
        best = None
        for seed in range(seeds):
            start = np.random.default_rng(seed).standard_normal(sum(sizes)) * scale
            found = scipy.optimize.minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", options=options)
            best = found if best is None or found.fun < best.fun else best
        return best.fun, tensors(torch.from_numpy(best.x))

    return lowest


@pytest.fixture
def unchecked(monkeypatch):
    """Leaves out the checks of annotations, as for users: a wrong shape then meets the function's own sentence."""
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
