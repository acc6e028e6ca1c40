import math

import numpy as np
import pytest
import torch

from masklr.spectra import (
    alpha_req,
    hill_alpha,
)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0])
def test_alpha_req_recovers_the_exponent_and_fits_only_its_range(alpha):
    eigenvalues = torch.arange(1, 200, dtype=torch.float64) ** -alpha
    assert alpha_req(eigenvalues).item() == pytest.approx(alpha)
    bent = eigenvalues.clone()
    bent[50:] *= 1e-3
    assert alpha_req(torch.cat([bent, torch.zeros(9)]).flip(0), first=3, last=50).item() == pytest.approx(alpha)
    slope = np.polyfit(np.log(np.arange(1, 200)), np.log(bent.numpy()), 1)[0]
    assert alpha_req(bent).item() == pytest.approx(-slope)


def test_alpha_req_needs_two_eigenvalues():
    for eigenvalues in ([1.0, 0.0], [1.0, 1e-13]):
        with pytest.raises(ValueError, match="two eigenvalues above `rtol`"):
            alpha_req(torch.tensor(eigenvalues))
    with pytest.raises(ValueError, match=r"Expected `rtol` in \[0, 1\), got 1"):
        alpha_req(torch.ones(3), rtol=1.0)


@pytest.mark.parametrize("measure", [alpha_req, hill_alpha])
def test_power_laws_leave_out_what_rounding_spoils_unless_told(measure):
    eigenvalues = torch.arange(1, 101, dtype=torch.float64) ** -1.5
    noise = torch.logspace(-12.1, -16, 100, dtype=torch.float64)
    assert measure(torch.cat([noise, eigenvalues])) == measure(eigenvalues)
    assert abs(measure(torch.cat([noise, eigenvalues]), rtol=0.0) - measure(eigenvalues)) > 0.5


def test_hill_alpha_of_pareto_draws_is_the_density_exponent():
    draws = torch.from_numpy(np.random.default_rng(0).pareto(1.5, 200_000) + 1)
    assert hill_alpha(draws, k=100_000).item() == pytest.approx(2.5, abs=5 * 1.5 / math.sqrt(100_000))


def test_hill_alpha_without_a_tail_raises():
    with pytest.raises(ValueError, match="Expected `k`"):
        hill_alpha(torch.tensor([2.0, 1.0]), k=2)
    with pytest.raises(ValueError, match="got 3 equal ones"):
        hill_alpha(torch.ones(4))
    with pytest.raises(ValueError, match="got 3 equal ones"):
        hill_alpha(1 + torch.tensor([3e-16, 0, 2e-16, 0], dtype=torch.float64))
