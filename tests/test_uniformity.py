"""The processes of one test import this file: nothing heavy at its head."""

import pytest
import torch
from torch import distributed as dist

from masklr.uniformity import of_all_processes, uniformity
from tests.two_processes import in_two_processes


def by_pairs(features, temperature=0.1):
    total = 0.0
    for a in features:
        for b in features:
            total += (torch.dot(a, b) / (a.norm() * b.norm()) / temperature) ** 2
    return total / len(features) ** 2


@pytest.mark.parametrize("axes", [1, 2, 5])
@pytest.mark.parametrize("dim", [6, 40])
def test_features_spread_evenly_over_k_orthonormal_axes_give_100_over_k(axes, dim):
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(dim, axes, dtype=torch.float64))[0].T
    features = (basis.repeat(4, 1) * torch.linspace(-3, 5, 4 * axes)[:, None]).float()
    assert uniformity(features).item() == pytest.approx(100 / axes, rel=1e-5)
    assert uniformity(features, temperature=0.5).item() == pytest.approx(4 / axes, rel=1e-5)


@pytest.mark.parametrize(("samples", "dim"), [(7, 4), (4, 7)])
def test_value_and_gradient_are_those_of_the_sum_over_pairs(samples, dim):
    torch.manual_seed(0)
    features = torch.randn(samples, dim, requires_grad=True)
    ours, theirs = uniformity(features), by_pairs(features)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0.0)
    pairs = zip(torch.autograd.grad(ours, features), torch.autograd.grad(theirs, features), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_it_is_computed_in_float32_under_autocast():
    torch.manual_seed(0)
    features = torch.randn(8, 16)
    exact = uniformity(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = uniformity(features)
    assert found.dtype == torch.float32
    assert torch.equal(found, exact)


def test_weight_of_the_term_is_in_the_loss_and_in_its_gradient(make_task, make_digits, make_trainer, tmp_path):
    data = make_digits(32)
    data.setup("fit")
    batch = next(iter(data.unaugmented_train_dataloader()))
    found = {}
    for weight in (0.0, 0.5):
        task = make_task(uniformity_weight=weight)
        logged = {}
        task.log = lambda key, value, logged=logged, **_: logged.update({key: value.detach().clone()})
        torch.manual_seed(3)
        loss = task.training_step(batch, 0)
        loss.backward()
        found[weight] = loss.item(), logged, task.model.encoder.norm.weight.grad.clone()
    torch.manual_seed(3)
    task = make_task()
    images = task.prepared(batch[0])
    visible, _ = task.model.draw_split(len(images))
    term = uniformity(task.model.encode(images, visible)[:, 1:].mean(1))
    term.backward()
    assert found[0.0][1].keys() == {"train/loss"}
    assert found[0.5][1]["train/uniformity"].item() == pytest.approx(term.item(), rel=1e-5)
    assert found[0.5][0] == pytest.approx(found[0.0][0] + 0.5 * term.item(), rel=1e-5)
    assert found[0.5][1]["train/loss"].item() == found[0.5][0]
    torch.testing.assert_close(found[0.5][2], found[0.0][2] + 0.5 * task.model.encoder.norm.weight.grad)


def test_term_is_minimized_by_training(make_task, make_digits, make_trainer, tmp_path, read_metrics):
    from masklr.callbacks import StepSeed
    from masklr.optim import Optim

    spread = {}
    for weight in (1e-9, 0.05):
        task = make_task(optim=Optim(base_lr=0.02, warmup=0.0), uniformity_weight=weight)
        folder = tmp_path / str(weight)
        make_trainer(folder, max_steps=25, val_check_interval=25, callbacks=[StepSeed(0)]).fit(task, make_digits())
        spread[weight] = list(read_metrics(folder)["train/uniformity"].values())
    assert spread[0.05][-1] < 0.6 * spread[1e-9][-1]


def test_negative_weight_raises(make_task):
    with pytest.raises(ValueError, match=r"Expected `uniformity_weight` of 0 or more, got -0\.1"):
        make_task(uniformity_weight=-0.1)


def value_in_one_of_two(rank, features, folder):
    """The term, and its gradient in a shared weight as data-parallel training averages it, by one of two processes."""
    dist.init_process_group("gloo", rank=rank, world_size=2)
    weight = torch.ones(5, requires_grad=True)
    value = uniformity(of_all_processes(features[rank * 4 : rank * 4 + 4] * weight))
    value.backward()
    dist.all_reduce(weight.grad)
    torch.save((value.detach(), weight.grad / 2), folder / f"{rank}.pt")


def test_two_processes_compute_the_term_of_the_whole_batch_and_its_gradient(tmp_path):
    torch.manual_seed(0)
    features, weight = torch.randn(8, 5), torch.ones(5, requires_grad=True)
    value = uniformity(of_all_processes(features * weight))
    value.backward()
    in_two_processes(value_in_one_of_two, features, tmp_path)
    for rank in range(2):
        found, grad = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found, value.detach())
        torch.testing.assert_close(grad, weight.grad)
