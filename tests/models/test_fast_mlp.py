import copy

import pytest
import torch
from timm.layers import DropPath, Mlp
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from masklr.models import fast_linear, fast_mlp, float32_products
from masklr.models.fast_linear import column_sums, linear
from masklr.models.fast_mlp import FastMlp
from tests.graphs import backward_functions, second_derivative


def twins(width=24, **options):
    """timm's MLP and ours with the same weights."""
    torch.manual_seed(0)
    theirs = Mlp(width, 4 * width, **options)
    ours = FastMlp(width, 4 * width, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def output_and_gradients(layer, x):
    x = x.clone().requires_grad_()
    out = layer(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    grads = torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()])
    return [out.detach(), *grads]


def is_own(out):
    return "_MLPBackward" in backward_functions(out)


@pytest.mark.parametrize("shape", [(3, 7, 24), (5, 24), (2, 2, 4, 24)])
def test_output_and_gradients_equal_those_of_timm(shape):
    theirs, ours = twins()
    x = torch.randn(shape)
    assert is_own(ours(x))
    for a, b in zip(output_and_gradients(theirs, x), output_and_gradients(ours, x), strict=True):
        assert b.dtype == a.dtype
        assert b.is_contiguous()
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [8, 802])
@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_is_as_near_to_the_truth_as_timm(rows, autocast, monkeypatch):
    monkeypatch.setattr(float32_products, "ONEDNN_HAS_BF16", True)
    theirs, ours = twins()
    x = torch.randn(rows, 24)
    truth = output_and_gradients(copy.deepcopy(theirs).double(), x.double())
    if not autocast:
        theirs, ours, x = theirs.bfloat16(), ours.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert is_own(ours(x))
        a, b = output_and_gradients(theirs, x), output_and_gradients(ours, x)
    for exact, timms, fast in zip(truth, a, b, strict=True):
        assert fast.dtype == timms.dtype
        error, timms_error = (((y.double() - exact).norm() / exact.norm()).item() for y in (fast, timms))
        assert error < 0.02
        assert error < 1.5 * timms_error


def test_what_leaves_gelu_is_not_kept():
    theirs, ours = twins()
    x = torch.randn(100, 24)

    def kept(layer):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            layer(x)
        return sum({t.data_ptr(): t.numel() for t in saved if t.shape[0] == len(x)}.values())

    assert kept(theirs) == 100 * (24 + 96 + 96)
    assert kept(ours) == 100 * (24 + 96)


def gelu_tanh():
    return nn.GELU(approximate="tanh")


@pytest.mark.parametrize(
    "options",
    [{"drop": 0.5}, {"bias": False}, {"act_layer": nn.ReLU}, {"act_layer": gelu_tanh}, {"norm_layer": nn.LayerNorm}],
)
def test_options_of_timm_keep_their_meaning(options):
    theirs, ours = twins(**options)
    x = torch.randn(3, 7, 24)
    assert not is_own(ours(x))
    results = []
    for layer in (theirs, ours):
        torch.manual_seed(1)  # dropout draws
        results.append(output_and_gradients(layer, x))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


def test_dropout_is_applied_in_training_only():
    _, ours = twins(drop=0.5)
    x = torch.randn(3, 7, 24)
    assert (ours(x) == 0).any()
    ours.eval()
    assert is_own(ours(x))
    assert not (ours(x) == 0).any()


@pytest.mark.parametrize("part", ["fc1", "act", "drop1", "norm", "fc2", "drop2"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_whoever_listens_to_a_part_hears_it(part, kind):
    _, ours = twins()
    x = torch.randn(2, 24, requires_grad=True)
    before = ours(x)
    heard = []
    handle = getattr(getattr(ours, part), kind)(lambda *given: heard.append(given) and None)
    out = ours(x)
    out.sum().backward()
    assert len(heard) == 1
    assert not is_own(out)
    torch.testing.assert_close(out, before)
    handle.remove()
    assert is_own(ours(x))


def test_listeners_to_every_module_hear_the_parts():
    _, ours = twins()
    heard = []
    handle = nn.modules.module.register_module_forward_hook(lambda layer, *_: heard.append(layer))
    try:
        ours(torch.randn(2, 24, requires_grad=True))
    finally:
        handle.remove()
    assert {ours.fc1, ours.act, ours.fc2} <= set(heard)


@pytest.mark.parametrize("part", ["drop1", "drop2"])
def test_dropout_that_is_in_training_alone_is_applied(part):
    _, ours = twins(drop=0.5)
    ours.eval()
    getattr(ours, part).training = True
    x = torch.randn(3, 24)
    torch.manual_seed(0)
    assert not torch.allclose(ours(x), ours(x))


@pytest.mark.parametrize("part", ["drop1", "drop2"])
@pytest.mark.parametrize("layer", [DropPath(0.5), nn.Identity()])
def test_another_layer_in_dropouts_place_is_called(part, layer):
    results = []
    x = torch.randn(8, 24)
    for mlp in twins():
        setattr(mlp, part, layer)
        torch.manual_seed(0)
        results.append(mlp(x))
    torch.testing.assert_close(*results, rtol=0, atol=0)


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


class HalvedLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def replaced(layer):
    layer.fc1.__class__ = HalvedLinear


def parametrized(layer):
    parametrize.register_parametrization(layer.fc1, "weight", Halved())
    parametrize.register_parametrization(layer.fc1, "bias", Halved())


def patched(layer):
    forward = layer.fc1.forward
    layer.fc1.forward = lambda x: forward(x) / 2


@pytest.mark.parametrize("change", [replaced, parametrized, patched])
def test_a_part_that_was_changed_is_served_as_it_is(change):
    theirs, ours = twins()
    for layer in (theirs, ours):
        change(layer)
    x = torch.randn(2, 24)
    assert not is_own(ours(x))
    torch.testing.assert_close(ours(x), theirs(x))
    assert not torch.allclose(ours(x), twins()[0](x))


def test_without_gradients_it_is_timms_bit_for_bit():
    theirs, ours = twins()
    x = torch.randn(3, 24)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.usefixtures("compilable")
def test_compiled_it_is_timms():
    theirs, ours = twins()
    x = torch.randn(3, 24)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    found = torch.compile(lambda x: ours(x), backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(found, theirs(x))
    assert "gelu" in graphs[0]
    assert "autograd_function_apply" not in graphs[0]


@pytest.mark.parametrize("trained", ["none", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "x"])
def test_frozen_parts_get_no_gradient_and_the_others_theirs(trained):
    found = []
    for layer in twins():
        x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0)).requires_grad_(trained == "x")
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name == trained)
        out = layer(x)
        assert out.requires_grad == (trained != "none")
        if trained != "none":
            out.square().sum().backward()
        found.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a)
    assert sum(grad is not None for grad in found[1]) == (trained != "none")


@pytest.mark.parametrize("changed", [copy.deepcopy, lambda layer: layer])
def test_transposed_inputs_and_copies_of_the_layer(changed):
    theirs, ours = twins()
    found = []
    for layer in (theirs, changed(ours)):
        x = torch.randn(3, 24, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = layer(x.transpose(1, 2)).transpose(1, 2)
        found.append([out.detach(), *torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()])])
    assert is_own(out)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


# torch.autograd.forward_ad scripts decompositions of its own on its first use.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning")
def test_transforms_of_functions_and_derivatives_forward_are_timms():
    theirs, ours = twins()
    x, v = torch.randn(3, 24), torch.randn(3, 24)
    found = []
    for layer in (theirs, ours):
        parameters = dict(layer.named_parameters())

        def loss(parameters, x, layer=layer):
            return torch.func.functional_call(layer, parameters, (x,)).square().sum()

        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        with torch.autograd.forward_ad.dual_level():
            along = torch.autograd.forward_ad.make_dual(x, v)
            slope = torch.autograd.forward_ad.unpack_dual(layer(along)).tangent
        found.append([*per_sample.values(), slope])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a)


def test_a_second_backward_pass_gives_the_same():
    _, ours = twins()
    x = torch.randn(3, 24, requires_grad=True)
    out = ours(x).square().sum()
    first = torch.autograd.grad(out, [x, *ours.parameters()], retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out, [x, *ours.parameters()]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["MLP", "linear"])
def test_gradient_is_that_of_finite_differences(name):
    torch.manual_seed(0)
    sizes = [(2, 3, 4), (5, 4), (5,)] + ([(4, 5), (4,)] if name == "MLP" else [])
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    function = fast_mlp._MLP if name == "MLP" else fast_linear._Linear
    assert torch.autograd.gradcheck(function.apply, inputs)


def test_second_derivative_is_right_under_the_math_kernel_and_an_error_elsewhere():
    _, ours = twins()
    x, v = torch.randn(2, 24), torch.randn(2, 24)

    with sdpa_kernel(SDPBackend.MATH):
        found = second_derivative(ours, x, v, torch.float32)
        exact = second_derivative(copy.deepcopy(ours).double(), x, v, torch.float64)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match=r"an MLP is to be differentiated again.*sdpa_kernel"):
        second_derivative(ours, x, v, torch.float32)


def test_a_type_of_its_own_is_left_to_timm():
    theirs, ours = twins()
    x = torch.randn(3, 24, dtype=torch.float64)
    out = ours.double()(x)
    assert not is_own(out)
    assert torch.equal(out, theirs.double()(x))
    with pytest.raises(RuntimeError, match="dtype"):
        ours.float()(x)


@pytest.mark.parametrize("rows", [1, 6, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_column_sums(rows, dtype):
    torch.manual_seed(0)
    x = torch.randn(rows, 5).to(dtype)
    exact = x.double().sum(0)
    assert ((column_sums(x).double() - exact).norm() / exact.norm()) < (0.01 if dtype == torch.bfloat16 else 1e-5)


def has_bf16_products():
    return fast_linear.has_fused_bias(torch.bfloat16)


@pytest.mark.skipif(not has_bf16_products(), reason="oneDNN has no bf16 on this processor")
def test_linear_layers_in_bf16():
    layer = nn.Linear(24, 40)
    x = torch.randn(3, 7, 24)
    exact = output_and_gradients(copy.deepcopy(layer).double(), x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear(layer, x)
        found = output_and_gradients(lambda_module(layer), x)
    assert "_LinearBackward" in backward_functions(out)
    assert out.dtype == torch.bfloat16
    for a, b in zip(exact, found, strict=True):
        assert ((b.double() - a).norm() / a.norm()) < 0.01
        assert b is found[0] or b.dtype == torch.float32


@pytest.mark.skipif(not has_bf16_products(), reason="oneDNN has no bf16 on this processor")
@pytest.mark.parametrize("trained", ["x", "weight", "bias"])
def test_linear_layers_in_bf16_with_frozen_parts(trained):
    layer = nn.Linear(24, 40)
    x = torch.randn(3, 24, requires_grad=trained == "x")
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name == trained)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear(layer, x)
    wanted = x if trained == "x" else getattr(layer, trained)
    exact = {
        "x": layer.weight.sum(0).expand(3, -1),
        "weight": x.sum(0).expand(40, -1),
        "bias": torch.full((40,), 3.0),
    }
    (found,) = torch.autograd.grad(out.sum(), wanted, retain_graph=True)
    torch.testing.assert_close(found, exact[trained], rtol=0.02, atol=0.05)
    with pytest.raises(RuntimeError, match="a linear layer is to be differentiated again"):
        torch.autograd.grad(out.float().square().sum(), wanted, create_graph=True)


def lambda_module(layer):
    """A module whose call is `linear(layer, x)`."""

    class Served(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return linear(self.layer, x)

    return Served()


def test_linear_serves_whatever_took_a_layers_place(monkeypatch):
    monkeypatch.setattr(float32_products, "ONEDNN_HAS_BF16", True)
    x = torch.randn(2, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for layer in (nn.Identity(), HalvedLinear(24, 3), nn.Linear(24, 3, bias=False)):
            assert torch.equal(linear(layer, x), layer(x))
            assert "_LinearBackward" not in str(getattr(linear(layer, x), "grad_fn", ""))
