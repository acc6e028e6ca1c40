"""Induced penalties against all masks one by one, exact Jacobians, and real draws."""

import itertools
import math

import pytest
import timm
import torch
from torch import nn

from masklr.callbacks.mask_sites import find_sites, masks_on
from masklr.callbacks.penalties import Penalties, estimate
from masklr.layers import (
    DropConnect,
    DropConnectConv2d,
    DropConnectLinear,
    Dropout,
    DropPath,
    GroupDropout,
    Groups,
    insert,
)
from masklr.theory import gauss_newton_penalty, mask_variance

P = 0.4


def batch(outputs=3, inputs=4, count=5, loss="squared", seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, generator=generator, dtype=torch.float64)
    if loss == "squared":
        return x, torch.randn(count, outputs, generator=generator, dtype=torch.float64)
    return x, torch.randint(outputs, (count,), generator=generator)


def network(*layers, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(*(layer() for layer in layers)).double().eval()


def enumerated(loss_of, size, p):
    """Mean over all 2^size masks of mean one."""
    total = 0.0
    for keep in itertools.product((0.0, 1.0), repeat=size):
        weight = math.prod((1 - p) if kept else p for kept in keep)
        total += weight * loss_of(torch.tensor(keep, dtype=torch.float64) / (1 - p)).item()
    return total


def squared(outputs, targets):
    return (outputs - targets).square().sum(1).mean()


LAST_LAYERS = {
    "units": (lambda: nn.Dropout(P), 6, lambda h, m: h * m),
    "groups": (lambda: GroupDropout(P, 2), 3, lambda h, m: h * m.repeat_interleave(2)),
    "paths": (lambda: insert(box := nn.Sequential(nn.Identity()), {"0": DropPath(P)}) and box, 1, lambda h, m: h * m),
}


@pytest.mark.parametrize("kind", LAST_LAYERS)
def test_closed_form_of_the_last_hidden_layer_is_the_mean_over_all_masks(kind):
    make, size, masked = LAST_LAYERS[kind]
    model = network(lambda: nn.Linear(4, 6), nn.GELU, make, lambda: nn.Linear(6, 3))
    x, y = batch()
    hidden = model[1](model[0](x))
    # Masks of single samples are independent: the mean over masks is a mean over each sample's own.
    exact = enumerated(lambda m: squared(model[3](masked(hidden, m)), y), size, P) - squared(model[3](hidden), y).item()
    penalties, sites = Penalties(model, [(x, y)], "squared"), find_sites(model)
    assert penalties.closed_form(sites) == pytest.approx(exact, rel=1e-10)
    assert penalties.gauss_newton(sites, draws=0)[sites[0].name] == pytest.approx(exact, rel=1e-10)
    assert penalties.full_curvature(sites, probes=400).mean == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_closed_form_of_dropconnect_on_the_last_layer_is_the_mean_over_all_masks(per):
    model = network(lambda: nn.Linear(4, 3), nn.Tanh, lambda: DropConnectLinear(3, 2, p=P, per=per))
    x, y = batch(outputs=2)
    hidden = model[1](model[0](x))

    def loss(m):
        return squared(nn.functional.linear(hidden, model[2].weight * m.view(2, 3), model[2].bias), y)

    exact = enumerated(loss, 6, P) - squared(model(x), y).item()
    assert Penalties(model, [(x, y)], "squared").closed_form(find_sites(model)) == pytest.approx(exact, rel=1e-10)


def test_closed_form_of_a_masked_convolution_is_the_mean_over_all_masks():
    model = network(lambda: DropConnectConv2d(1, 1, 3, stride=2, padding=1, p=P), nn.Flatten, lambda: nn.Linear(4, 2))
    x, y = torch.randn(3, 1, 4, 4, dtype=torch.float64), batch(outputs=2, count=3)[1]

    def loss(m):
        conv = model[0]
        out = nn.functional.conv2d(x, conv.weight * m.view(1, 1, 3, 3), conv.bias, stride=2, padding=1)
        return squared(model[2](out.flatten(1)), y)

    exact = enumerated(loss, 9, P) - squared(model(x), y).item()
    assert Penalties(model, [(x, y)], "squared").closed_form(find_sites(model)) == pytest.approx(exact, rel=1e-10)


def test_closed_form_stands_only_where_the_outputs_are_linear_in_the_mask():
    model = network(
        lambda: nn.Dropout(P), lambda: nn.Linear(4, 6), nn.ReLU, lambda: nn.Dropout(P), lambda: nn.Linear(6, 3)
    )
    first, last = find_sites(model)
    penalties = Penalties(model, [batch()], "squared")
    assert penalties.closed_form([first]) is None
    assert penalties.closed_form([first, last]) is None
    assert penalties.closed_form([last]) > 0
    # Two linear layers are linear in each mask, not in both together.
    model = network(lambda: nn.Dropout(P), lambda: nn.Linear(4, 6), lambda: nn.Dropout(P), lambda: nn.Linear(6, 3))
    penalties, (first, last) = Penalties(model, [batch()], "squared"), find_sites(model)
    assert penalties.closed_form([first]) > 0
    assert penalties.closed_form([first, last]) is None
    model = network(lambda: nn.Linear(4, 6), lambda: nn.Dropout(P), lambda: nn.Linear(6, 3))
    assert Penalties(model, [batch(loss="cross_entropy")]).closed_form(find_sites(model)) is None


def test_gauss_newton_is_the_formula_of_wei_for_every_layer_and_sampled_targets_have_it_as_mean():
    model = network(
        lambda: nn.Linear(4, 5),
        nn.GELU,
        lambda: nn.Dropout(P),
        lambda: nn.Linear(5, 6),
        nn.Tanh,
        lambda: nn.Dropout(0.1),
        lambda: nn.Linear(6, 3),
    )
    x, y = batch(loss="cross_entropy", count=40)
    sites = find_sites(model)
    penalties = Penalties(model, [(x[:25], y[:25]), (x[25:], y[25:])])
    found = penalties.gauss_newton(sites, draws=0)
    probabilities = model(x).softmax(1)
    hessian = torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None, :]
    for site, index, p in zip(sites, (2, 5), (P, 0.1), strict=True):
        hidden = model[:index](x)
        jacobian = torch.stack([torch.autograd.functional.jacobian(model[index:], h) for h in hidden])
        exact = gauss_newton_penalty(jacobian, hessian, hidden, p).item()
        assert found[site.name] == pytest.approx(exact, rel=1e-10)
    torch.manual_seed(0)
    sampled = [penalties.gauss_newton(sites)["2"] for _ in range(200)]
    mean, error = torch.tensor(sampled).mean(), torch.tensor(sampled).std() / 200**0.5
    assert abs(mean - found["2"]) < 4 * error
    assert error < 0.05 * found["2"]


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_full_curvature_is_half_the_variance_times_the_diagonal_of_the_hessian(loss):
    model = network(
        lambda: nn.Linear(4, 5),
        nn.GELU,
        lambda: nn.Dropout(P),
        lambda: nn.Linear(5, 6),
        nn.Tanh,
        lambda: nn.Linear(6, 3),
    )
    x, y = batch(loss=loss)
    penalties, sites = Penalties(model, [(x, y)], loss), find_sites(model)

    def loss_at(h):
        outputs = model[3:](h)
        return squared(outputs, y) if loss == "squared" else nn.functional.cross_entropy(outputs, y)

    hidden = model[:2](x)
    hessian = torch.autograd.functional.hessian(loss_at, hidden).reshape(25, 25)
    exact = 0.5 * mask_variance(P) * (hessian.diagonal() * hidden.flatten().square()).sum().item()
    torch.manual_seed(0)
    found = penalties.full_curvature(sites, probes=300)
    assert abs(found.mean - exact) < 2 * found.halfwidth
    scale = 0.5 * mask_variance(P) * (hessian.diagonal() * hidden.flatten().square()).abs().sum().item()
    assert found.halfwidth < 0.1 * scale


def test_weights_that_tokens_share_are_summed_over_tokens_before_squaring():
    torch.manual_seed(0)
    layer = DropConnectLinear(3, 2, p=P).double().eval()
    model = nn.Sequential(nn.Unflatten(1, (4, 3)), layer, nn.Flatten(), nn.Linear(8, 2).double())
    x, y = batch(inputs=12, outputs=2)
    (site,) = find_sites(model)

    def loss(m):
        hidden = nn.functional.linear(x.view(5, 4, 3), layer.weight * m.view(2, 3), layer.bias)
        return squared(model[3](hidden.flatten(1)), y)

    exact = enumerated(loss, 6, P) - squared(model(x), y).item()
    assert Penalties(model, [(x, y)], "squared").closed_form([site]) == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("groups", [1, 2])
def test_gauss_newton_of_a_masked_convolution_is_that_of_its_samples_gradients(groups):
    torch.manual_seed(0)
    conv = DropConnectConv2d(4, 4, 3, padding="same", groups=groups, p=P).double().eval()
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(36, 3).double())
    x, y = torch.randn(3, 4, 3, 3, dtype=torch.float64), torch.tensor([0, 1, 2])
    found = Penalties(model, [(x, y)]).gauss_newton(find_sites(model), draws=0)["0"]
    exact = 0.0
    for image in x:
        probabilities = model(image[None]).softmax(1)[0].detach()
        for k in range(3):
            (gradient,) = torch.autograd.grad(-model(image[None]).log_softmax(1)[0, k], conv.weight)
            exact += probabilities[k].item() * (gradient * conv.weight).square().sum().item()
    assert found == pytest.approx(0.5 * P / (1 - P) * exact / 3, rel=1e-10)


def test_real_masks_and_symmetric_pairs_have_the_mean_over_all_masks():
    model = network(lambda: nn.Linear(4, 6), nn.ReLU, lambda: nn.Dropout(0.1), lambda: nn.Linear(6, 3))
    x, y = batch(loss="cross_entropy", count=30)
    hidden = model[:2](x)
    without = nn.functional.cross_entropy(model(x), y).item()
    exact = enumerated(lambda m: nn.functional.cross_entropy(model[3](hidden * m), y), 6, 0.1) - without
    torch.manual_seed(0)
    penalties, sites = Penalties(model, [(x[:20], y[:20]), (x[20:], y[20:])]), find_sites(model)
    assert penalties.without_masks == pytest.approx(without)
    measured = penalties.measured(sites, relative_error=0.2, max_draws=5000)
    assert abs(measured.mean - exact) < 2 * measured.halfwidth
    assert measured.halfwidth <= 0.2 * measured.mean
    pairs = penalties.symmetric_pairs(sites, relative_error=0.02, max_draws=2000)
    assert pairs.mean == pytest.approx(exact, rel=0.08)
    assert pairs.draws < measured.draws


def test_masks_are_on_for_their_sites_alone_and_batch_norm_keeps_its_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(8, 8),
        nn.Dropout(0.5),
        nn.Linear(8, 3),
    )
    insert(model, {"1": Groups(0.5, 4), "0": DropConnect(0.5), "5": Dropout(0.5)})
    model.eval()
    x = torch.randn(16, 4)
    plain, statistics = model(x), model[1].running_mean.clone()
    sites = {site.name: site for site in find_sites(model)}
    assert {name: site.kind for name, site in sites.items()} == {
        "0": "weights",
        "1": "groups",
        "3": "units",
        "5": "units",
    }
    for name, site in sites.items():
        with masks_on([site]):
            masked = model(x)
        assert not torch.equal(masked, plain), name
        assert torch.equal(model(x), plain)
    with masks_on([sites["3"]]):
        hidden = model[:3](x)
    assert torch.equal(hidden, model[:3](x))
    assert torch.equal(model[1].running_mean, statistics)
    assert not any(part.training for part in model.modules())


def test_every_mask_of_a_vision_transformer_is_found_and_measured():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, embed_dim=16, depth=2, num_heads=2, num_classes=4,
        pos_drop_rate=0.1, patch_drop_rate=0.2, proj_drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2,
    ).eval()  # fmt: skip
    insert(model, {"blocks.*.mlp.fc1": DropConnect(0.1, per="sample")})
    sites = {site.name: site for site in find_sites(model)}
    kinds = {name: site.kind for name, site in sites.items()}
    assert kinds["patch_drop"] == kinds["blocks.0.attn.attn_drop"] == "unseen"
    assert kinds["pos_drop"] == kinds["blocks.1.mlp.drop2"] == "units"
    assert kinds["blocks.1.drop_path1"] == "paths"
    assert kinds["blocks.0.mlp.fc1"] == "weights"
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8) % 4
    penalties = Penalties(model, [(images, labels)])
    for name, site in sites.items():
        found = penalties.measured([site], max_draws=2)
        assert found.mean != 0, name
    predicted = penalties.gauss_newton(list(sites.values()))
    assert predicted.keys() == {name for name, kind in kinds.items() if kind != "unseen"}
    assert all(value > 0 for value in predicted.values())
    with pytest.raises(ValueError, match="got 'patch_drop'"):
        penalties.full_curvature(list(sites.values()))


def test_draws_stop_at_the_relative_error_or_at_the_maximum():
    generator = torch.Generator().manual_seed(0)
    steady = estimate(lambda: 5 + torch.randn((), generator=generator).item(), 0.05, 1000)
    assert steady.halfwidth <= 0.25
    assert 20 < steady.draws < 200
    assert estimate(lambda: torch.randn((), generator=generator).item(), 0.05, 30).draws == 30
    assert estimate(lambda: 1.0, 0.05, 100) == (1.0, 0.0, 8)


def test_masks_that_never_run_and_models_without_masks_are_named():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Dropout(0.1), nn.Dropout(0.1)

        def forward(self, x):
            return self.used(x)

    model = Unused().eval()
    with pytest.raises(ValueError, match="'unused' did not"):
        Penalties(model, [batch(outputs=4)], "squared").gauss_newton(find_sites(model))
    with pytest.raises(ValueError, match="with masks of p > 0, found none"):
        find_sites(nn.Sequential(nn.Dropout(0.0), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="Expected `include` to match something, got 'usd'; did you mean used"):
        find_sites(model, ["usd"])


def test_outputs_and_targets_that_do_not_fit_raise():
    x, _ = batch()
    with pytest.raises(ValueError, match=r"outputs \(B, K\) for the penalty, got of shape \(1, 2, 2\)"):
        Penalties(lambda x: x.view(-1, 2, 2), [(x, x)], "squared")
    with pytest.raises(ValueError, match=r"targets of the outputs' shape \(5, 4\), got \(5, 1\)"):
        Penalties(nn.Identity(), [(x, x[:, :1])], "squared")
