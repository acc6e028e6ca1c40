"""The theory table: what it trains is what theory is about, and it says so when a row falls short."""

import importlib.machinery
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def modules():
    """(theory_table, theory_rows, theory_predictions), loaded as the script loads them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        loader = importlib.machinery.SourceFileLoader("theory_table", str(SCRIPTS / "theory_table"))
        table = importlib.util.module_from_spec(importlib.util.spec_from_loader("theory_table", loader))
        patch.setitem(sys.modules, "theory_table", table)
        loader.exec_module(table)
        import theory_predictions
        import theory_rows

        yield table, theory_rows, theory_predictions
        for name in ("theory_rows", "theory_predictions", "theory_figure"):
            sys.modules.pop(name, None)


MASKED = [
    "dropout",
    "dropout_autoencoder",
    "dropconnect_last",
    "dropconnect_first_correlated",
    "groups_wide",
    "deep_dropout",
    "weight_decay_dropout",
    "mae_all",
    "mae_all_exact",
    "mae_masked",
    "mae_masked_exact",
    "mae_bottleneck_exact",
]


def test_a_row_that_holds_is_printed_and_drawn_and_exits_with_0(modules, tmp_path, capsys):
    figure = tmp_path / "table.pdf"
    arguments = ["--rows", "weight_decay_dropout", "--seeds", "1", "--steps", "1500", "--figure", str(figure)]
    assert modules[0].main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("weight_decay_dropout (weight decay and dropout, p = 0.5, mu = 0.3; 1500 steps")
    assert lines[1].endswith(": holds")
    assert lines[2].split() == ["predicted", "2.800", "1.800", "0.800", "0.000", "3", "13.4200"]
    assert lines[3].split()[0] == "measured"
    assert lines[4].split()[0] == "error"
    assert lines[5].split() == ["p", "=", "0", "3.700", "2.700", "1.700", "0.700", "4", "5.6400"]
    assert lines[6].startswith("1 of 1 rows hold; ")
    assert figure.read_bytes().startswith(b"%PDF")


def test_a_row_that_falls_short_exits_with_1_and_says_in_what(modules, tmp_path, capsys):
    arguments = ["--rows", "dropout", "--seeds", "2", "--steps", "50", "--figure", str(tmp_path / "table.png")]
    assert modules[0].main(arguments) == 1
    out = capsys.readouterr().out
    assert "FALLS SHORT: a singular value is off by" in out
    assert "0 of 1 rows hold" in out
    assert (tmp_path / "table.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rows", "dropuot"], "Expected `--rows` of the theory table, got 'dropuot'; did you mean dropout"),
        (["--steps", "0"], "Expected `--steps` of at least 1, got 0."),
        (["--seeds", "0"], "Expected `--seeds` of at least 1, got 0."),
    ],
)
def test_a_wrong_option_is_one_sentence_and_exit_code_2(modules, capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stopped:
        modules[0].main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"theory_table: error: {sentence}")


def judged(modules, spectrum=(2.0, 1.0, 0.0), objective=10.0, bound=None):
    """What is said of one seed, where theory says (2, 1, 0), rank 2 and 10."""
    table, _, predictions = modules
    predicted = predictions.Prediction(torch.tensor([2.0, 1.0, 0.0]).double(), 2, 10.0, bound)
    good = torch.tensor([2.0, 1.0, 0.0]).double()
    spectra = torch.stack([good, torch.tensor(spectrum).double()])
    ranks = [predictions.rank(sigma) for sigma in spectra]
    return table.shortfalls(predicted, table.Measurement(spectra, ranks, torch.tensor([10.0, objective]).double()))


def test_every_seed_is_held_to_every_bound(modules):
    assert judged(modules, spectrum=(2.05, 0.95, 0.0), objective=10.04) == []
    assert judged(modules, spectrum=(2.0, 1.07, 0.0)) == ["a singular value is off by 3.5%"]
    assert judged(modules, spectrum=(2.0, 1.0, 0.03)) == ["rank is [2, 3]"]
    assert judged(modules, objective=10.06) == ["the objective is off by 0.60%"]
    assert judged(modules, bound=9.9) == []
    assert judged(modules, objective=9.96, bound=9.98) == ["the objective 9.9600 is below its bound"]
    assert judged(modules, bound=10.01) == ["the objective 10.0000 is below its bound"]


@pytest.mark.parametrize("name", MASKED)
def test_the_sampled_loss_has_the_exact_objective_as_its_mean(modules, name):
    _, rows, predictions = modules
    row = rows.Row.read(name)
    row = replace(row, weight_decay=0.0, schedule=replace(row.schedule, draws=400))
    # Not the small initial weights: the loss must depend on all of them.
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(W.shape, generator=generator, dtype=torch.float64) for W in row.initial_weights(0)]
    draws = rows.draw(row, [generator], steps=50)
    both = [torch.stack([W, W]) for W in weights]
    losses = torch.stack([rows.losses(row, both, draws, step) for step in range(50)])
    error = losses[:, 0].mean() - predictions.objective(row, weights)
    assert error.abs() < 4 * losses[:, 0].std() / 50**0.5
    if not row.schedule.sample_inputs:
        expected = predictions.objective(row, weights, control=True).expand(50)
        torch.testing.assert_close(losses[:, 1], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["mae_all", "mae_all_exact", "mae_masked", "mae_masked_exact"])
def test_the_enumerated_loss_is_least_at_the_matrix_of_theory(modules, name):
    from masklr import theory

    _, rows, predictions = modules
    row = rows.Row.read(name)
    best = theory.linear_mae(
        row.C,
        row.model.input_p,
        row.model.patch_size,
        loss_on="masked" if row.loss_on_masked else "all",
        exact_count=row.model.exact_count,
    )
    W = best.W.clone().requires_grad_()
    loss = predictions.objective(row, [W])
    torch.testing.assert_close(loss.detach(), torch.as_tensor(best.loss), rtol=1e-10, atol=0)
    (gradient,) = torch.autograd.grad(loss, W)
    assert gradient.abs().max() < 1e-10


def test_the_minimum_for_correlated_inputs_is_one(modules):
    _, rows, predictions = modules
    row = rows.Row.read("dropconnect_first_correlated")
    sigma, value = predictions.dropconnect_first_minimum(row)
    # Descent on the exact objective of the two layers, which is not convex, knows nothing of nuclear norms.
    found, least = predictions.deep_dropout_minimum(row, starts=4)
    assert abs(least / value - 1) < 1e-8
    torch.testing.assert_close(found, sigma, rtol=0, atol=1e-3)


def test_a_seed_is_the_same_whatever_other_seeds_there_are(modules):
    _, rows, _ = modules
    row = rows.Row.read("groups")
    one, three = (rows.train(row, seeds, 20) for seeds in (1, 3))
    for alone, beside in zip(one.last(0), three.last(0), strict=True):
        torch.testing.assert_close(alone, beside, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(three.last(0)[0], three.last(1)[0])


def test_controls_are_not_masked(modules):
    _, rows, _ = modules
    row = rows.Row.read("dropout")
    draws = rows.draw(row, [torch.Generator().manual_seed(0)], steps=2)
    (units,) = draws.units
    assert units.shape == (2, 2, row.schedule.draws, 1, 4)
    assert set(units[:, 0].unique().tolist()) == {0.0, 4.0}
    assert (units[:, 1] == 1).all()
