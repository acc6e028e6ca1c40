import pytest
import torch

from masklr.products import null_factors, null_product_singular_values, product_core, product_widths


def test_null_of_a_product_is_the_spectrum_of_gaussian_factors():
    first, second = null_factors([30, 5, 40])
    assert first.shape == (5, 30)
    assert abs(torch.cat([first.flatten(), second.flatten()]).std() - 1) < 5 / (2 * 350) ** 0.5
    expected = torch.linalg.svdvals(second @ first)[:5]
    torch.testing.assert_close(null_product_singular_values([30, 5, 40]), expected, rtol=1e-9, atol=0)


def test_null_is_the_same_whatever_was_drawn_before_and_draws_nothing_global():
    state = torch.get_rng_state()
    sigma = null_product_singular_values([9, 8, 7])
    assert torch.equal(state, torch.get_rng_state())
    sigma.zero_()  # what is returned is a copy
    assert null_product_singular_values([9, 8, 7]).min() > 0
    assert not torch.equal(null_product_singular_values([9, 8, 7]), null_product_singular_values([9, 8, 7], seed=1))


@pytest.mark.parametrize("widths", [[3], [3, 0]])
def test_null_of_no_chain_raises(widths):
    with pytest.raises(ValueError, match="Expected two or more `widths`"):
        null_product_singular_values(widths)


def test_factors_that_do_not_fit_raise():
    with pytest.raises(ValueError, match="got 4 columns after 3 rows"):
        product_core([torch.ones(3, 2), torch.ones(2, 4)])
    with pytest.raises(ValueError, match="at least one"):
        product_widths([])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_core_of_any_type_is_of_the_values_in_float64(dtype):
    factors = [torch.randn(3, 20).to(dtype), torch.randn(20, 3).to(dtype)]
    expected = torch.linalg.svdvals(factors[1].double() @ factors[0].double())[:3]
    torch.testing.assert_close(torch.linalg.svdvals(product_core(factors)), expected, rtol=1e-12, atol=0)
