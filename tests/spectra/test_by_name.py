import pytest
import torch

from masklr.spectra import (
    MEASURES,
    measures,
    participation_ratio,
    stable_rank,
)
from tests.spectra.examples import PRINTED


def test_measures_by_name_are_the_functions_in_the_order_asked_for():
    names = [*reversed(MEASURES), "energy_rank_80", "energy_rank_100"]
    values = measures(torch.arange(1.0, 101.0) ** -1.5, names)
    assert list(values) == names
    assert values["stable_rank"] == stable_rank(torch.arange(1.0, 101.0) ** -1.5).item()
    eigenvalues = torch.arange(1, 101, dtype=torch.float64) ** -3
    assert values["participation_ratio"] == pytest.approx(participation_ratio(eigenvalues).item(), rel=1e-6)
    assert values["energy_rank_100"] == 100


def test_measures_of_zeros_are_norms_only():
    assert measures(torch.zeros(4), ["stable_rank", "frobenius_norm", "effective_rank"]) == {"frobenius_norm": 0.0}


def test_measures_leave_out_the_power_law_of_a_spectrum_that_has_none():
    one = torch.tensor([1.0, 1e-8, 0.0])
    assert measures(one, ["stable_rank", "alpha_req", "hill_alpha"]) == {"stable_rank": pytest.approx(1)}
    assert measures(torch.ones(6), ["alpha_req", "hill_alpha"]) == {"alpha_req": pytest.approx(0, abs=1e-12)}
    assert list(measures(torch.tensor([1.0, 0.5]), ["alpha_req", "hill_alpha"])) == ["alpha_req", "hill_alpha"]


@pytest.mark.parametrize(("name", "nearest"), [("efective_rank", "effective_rank"), ("energy_rank_0", "energy_rank_9")])
def test_unknown_measure_raises_with_the_nearest_name(name, nearest):
    with pytest.raises(ValueError, match=f"such as {nearest}.*, got '{name}'"):
        measures(PRINTED, [name])
