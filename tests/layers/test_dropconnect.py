import copy
import math
import pickle

import jaxtyping
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from masklr.layers import DropConnectConv2d, DropConnectLinear
from masklr.masks import kept_share, weights
from tests.two_processes import in_two_processes

PERS = ["batch", "sample"]


def linear(per="batch", p=0.4, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    return DropConnectLinear(6, 5, p=p, per=per, dtype=dtype, **options)


def conv(per="batch", p=0.4, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    options = {"padding": 1, "stride": 2, "groups": 2, **options}
    return DropConnectConv2d(4, 6, 3, p=p, per=per, dtype=dtype, **options)


def inputs(layer, batch=3, seed=1):
    torch.manual_seed(seed)
    shape = (batch, 7, 6) if isinstance(layer, nn.Linear) else (batch, 4, 5, 6)
    return torch.randn(shape, dtype=layer.weight.dtype, requires_grad=True)


def seeded(layer, x, seed=3):
    torch.manual_seed(seed)
    return layer(x)


def revealed_masks(per, batch, p=0.4, seed=3, in_features=6, out_features=5):
    """The masks of a linear layer of ones, (batch, out, in): its output for the identity."""
    layer = DropConnectLinear(in_features, out_features, bias=False, p=p, per=per)
    nn.init.ones_(layer.weight)
    identity = torch.eye(in_features).expand(batch, in_features, in_features)
    return seeded(layer, identity, seed).detach().mT


BOTH = pytest.mark.parametrize("make", [linear, conv])
PER = pytest.mark.parametrize("per", PERS)


@BOTH
@PER
def test_evaluation_and_p_of_zero_are_bitwise_the_plain_layer(make, per):
    layer = make(per, dtype=torch.float32)
    plain = copy.deepcopy(layer)
    plain.__class__ = nn.Linear if make is linear else nn.Conv2d
    x = inputs(layer)
    assert not torch.equal(layer(x), plain(x))
    assert torch.equal(layer.eval()(x), plain(x))
    layer.train().p = 0.0
    state = torch.get_rng_state()
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(torch.get_rng_state(), state)


@BOTH
def test_keys_and_initial_values_are_those_of_the_plain_layer(make):
    layer = make(dtype=torch.float32)
    torch.manual_seed(0)
    plain = nn.Linear(6, 5) if make is linear else nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2)
    assert list(layer.state_dict()) == list(plain.state_dict()) == ["weight", "bias"]
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), plain.parameters(), strict=True))
    assert isinstance(layer, type(plain))
    plain.load_state_dict(layer.state_dict())
    layer.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@PER
def test_every_weight_is_dropped_or_divided_by_the_keep_probability(per, p):
    factors = revealed_masks(per, 4, p)
    assert set(factors.unique().tolist()) == {0.0, torch.tensor(1 / kept_share(p)).item()}


def test_the_mask_of_a_batch_is_shared_and_those_of_samples_are_not():
    shared, own = (revealed_masks(per, 4, seed=0) for per in PERS)
    assert all(torch.equal(shared[0], mask) for mask in shared)
    assert all(not torch.equal(own[0], mask) for mask in own[1:])


@PER
def test_tokens_of_a_sample_share_its_mask(per):
    layer = linear(per)
    x = inputs(layer).detach()
    y = seeded(layer, torch.cat([x, x], dim=1))
    assert torch.allclose(y[:, :7], y[:, 7:])
    deeper = seeded(layer, x.view(3, 7, 1, 6))
    assert torch.allclose(deeper.view(3, 7, 5), seeded(layer, x))


def test_masks_of_an_image_are_the_same_at_all_positions():
    layer = conv("sample", stride=1, padding_mode="circular")
    x = inputs(layer).detach()
    moved = seeded(layer, x.roll((2, 3), dims=(2, 3)))
    assert torch.allclose(moved, seeded(layer, x).roll((2, 3), dims=(2, 3)))


@pytest.mark.parametrize("path", ["numpy", "torch"])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_masks_of_samples_have_mean_one_the_right_variance_and_independent_entries(p, path, monkeypatch):
    if path == "torch":  # what runs on other devices
        monkeypatch.setattr(weights, "_uniform_int16", weights._torch_int16)
    draws = 40_000
    factors = revealed_masks("sample", draws, p, in_features=3, out_features=2).flatten(1).double()
    variance = p / (1 - p)
    moments = (factors - 1).T @ (factors - 1) / draws
    pairs = moments - moments.diag().diag()
    assert (factors.mean(0) - 1).abs().max() < 5 * math.sqrt(variance / draws)
    # (m - 1)^2 is 1 with probability p and variance^2 otherwise; at p = 1/2 it is constant.
    error = math.sqrt(p * (1 - p) / draws) * abs(1 - variance**2)
    assert (moments.diag() - variance).abs().max() <= 5 * error + 1e-3
    assert pairs.abs().max() < 5 * variance / math.sqrt(draws)
    neighbours = ((factors[1:] - 1) * (factors[:-1] - 1)).mean(0)
    assert neighbours.abs().max() < 5 * variance / math.sqrt(draws)


@pytest.mark.parametrize("path", ["numpy", "torch"])
@pytest.mark.parametrize(
    "options",
    [
        {"make": linear},
        {"make": linear, "bias": False},
        {"make": conv},
        {"make": conv, "bias": False, "dilation": 2, "padding": "valid", "stride": 1},
        {"make": conv, "padding_mode": "reflect", "groups": 1},
        {"make": conv, "padding": "same", "stride": 1, "padding_mode": "circular"},
        {"make": conv, "padding": "same", "stride": 1, "dilation": 2},
    ],
    ids=lambda options: "-".join(str(getattr(value, "__name__", value)) for value in options.values()),
)
@PER
def test_gradients_are_those_of_finite_differences(per, options, path, monkeypatch):
    if path == "torch":
        monkeypatch.setattr(weights, "_uniform_int16", weights._torch_int16)
    layer = options["make"](per, **{key: value for key, value in options.items() if key != "make"})
    names = [name for name, _ in layer.named_parameters()]

    def output(x, *parameters):
        torch.manual_seed(3)
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (inputs(layer, batch=2), *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize("chunk", [1, 70, 10**6])  # weights of one sample at a time, of two, of all
@BOTH
def test_samples_do_not_see_one_another_in_chunks_of_any_size(make, chunk, monkeypatch):
    monkeypatch.setattr("masklr.layers.sample_masks.CHUNK_WEIGHTS", chunk)
    layer = make("sample")
    x = inputs(layer, batch=5).detach()
    y = seeded(layer, x)
    for sample in range(5):
        alone = torch.zeros_like(x)
        alone[sample] = x[sample]
        assert torch.allclose(seeded(layer, alone)[sample], y[sample])


@pytest.mark.parametrize("chunk", [1, 70, 10**6])
@BOTH
def test_gradients_in_chunks_of_any_size_are_those_of_finite_differences(make, chunk, monkeypatch):
    monkeypatch.setattr("masklr.layers.sample_masks.CHUNK_WEIGHTS", chunk)
    layer = make("sample")

    def output(x, weight, bias):
        torch.manual_seed(3)
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(output, (inputs(layer, batch=5), *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize("chunk", [1, 10**6])
@BOTH
def test_gradients_of_bfloat16_weights_are_summed_in_float32(make, chunk, monkeypatch):
    monkeypatch.setattr("masklr.layers.sample_masks.CHUNK_WEIGHTS", chunk)
    samples = 1000  # in bfloat16, a sum of ones ends at 256
    gradients = []
    for dtype in (torch.bfloat16, torch.float64):
        layer = make("sample", p=0.25, dtype=dtype, **({} if make is linear else {"padding": 0}))
        x = torch.ones(samples, *inputs(layer).shape[1:], dtype=dtype)
        seeded(layer, x).sum().backward()
        gradients.append(layer.weight.grad.double())
    assert torch.allclose(*gradients, rtol=0.01)


@BOTH
@PER
def test_frozen_parameters_and_inputs_get_no_gradient_and_the_others_keep_theirs(make, per):
    layer = make(per)
    x = inputs(layer)
    seeded(layer, x).square().sum().backward()
    whole = [x.grad, layer.weight.grad, layer.bias.grad]
    for frozen in range(3):
        x.grad = None
        layer.zero_grad()
        leaves = [x, layer.weight, layer.bias]
        for index, leaf in enumerate(leaves):
            leaf.requires_grad_(index != frozen)
        seeded(layer, x).square().sum().backward()
        for index, leaf in enumerate(leaves):
            assert leaf.grad is None if index == frozen else torch.allclose(leaf.grad, whole[index])


@BOTH
@PER
def test_single_samples_and_empty_batches(make, per):
    layer = make(per)
    x = inputs(layer).detach()[0]
    single = seeded(layer, x) if make is conv else seeded(layer, x[0])
    assert single.shape == (layer.eval()(x) if make is conv else layer.eval()(x[0])).shape
    layer.train()
    empty = layer(inputs(layer)[:0])
    assert empty.shape[0] == 0
    empty.sum().backward()
    assert layer.weight.grad.abs().sum() == 0


@PER
def test_gradients_reach_the_weights_and_training_moves_them(per):
    layer = linear(per, dtype=torch.float32)
    x, before = inputs(layer).detach(), layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        (layer(x) - x[..., :5]).square().mean().backward()
        optimizer.step()
        losses.append((layer.eval()(x) - x[..., :5]).square().mean().item())
        layer.train()
    assert losses[-1] < 0.7 * losses[0]
    assert layer.weight.is_leaf
    assert (layer.weight != before).all()
    assert list(dict(layer.named_parameters())) == ["weight", "bias"]


@pytest.mark.parametrize("reentrant", [True, False])
@PER
def test_recomputation_under_checkpointing_sees_the_same_masks(per, reentrant):
    network = nn.Sequential(linear(per), nn.Tanh(), DropConnectLinear(5, 6, p=0.4, per=per, dtype=torch.float64))
    x = inputs(network[0])
    gradients = []
    for through in (lambda x: network(x), lambda x: checkpoint(network, x, use_reentrant=reentrant)):
        network.zero_grad()
        y = seeded(through, x)
        torch.rand(5)  # moves the generator, as later layers do
        y.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@BOTH
@PER
def test_copies_and_pickles_draw_the_same_masks_and_share_nothing(make, per):
    layer = make(per)
    x = inputs(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(seeded(other, x), seeded(layer, x))
        other.p = 0.0
        assert layer.p == 0.4
        assert other.weight is not layer.weight


@BOTH
@PER
def test_autocast_computes_in_bfloat16_and_keeps_gradients_in_float32(make, per):
    layer = make(per, dtype=torch.float32)
    x = inputs(layer)
    exact = seeded(layer, x)
    exact.sum().backward()
    gradient = layer.weight.grad.clone()
    layer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = seeded(layer, x)
    rounded.sum().backward()
    assert rounded.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32
    assert torch.allclose(rounded.float(), exact, atol=0.05)
    assert torch.allclose(layer.weight.grad, gradient, atol=0.02 * gradient.abs().max().item())
    wide = make(per)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert wide.eval()(inputs(wide)).dtype == wide.train()(inputs(wide)).dtype


@pytest.mark.parametrize("make", [linear, conv])
@PER
def test_layers_of_bfloat16_parameters_work(make, per):
    layer = make(per, dtype=torch.float32)
    x = inputs(layer)
    exact = seeded(layer, x)
    low = layer.to(torch.bfloat16)
    y = seeded(low, x.detach().bfloat16().requires_grad_())
    y.sum().backward()
    assert y.dtype == low.weight.grad.dtype == torch.bfloat16
    assert torch.allclose(y.float(), exact, atol=0.05)


class NoTensorAsLargeAs(TorchDispatchMode):
    """Raises when an operator returns a tensor of that many elements."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.calls = elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.calls += 1
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.elements:
                raise MemoryError(f"{func} gave {tuple(tensor.shape)}")
        return found


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(lambda: DropConnectLinear(192, 768, per="sample"), (8, 3, 192)),
     (lambda: DropConnectConv2d(128, 128, 3, per="sample"), (8, 128, 4, 4))],
)  # fmt: skip
def test_no_weight_is_held_for_each_sample(layer, shape):
    layer = layer()
    x = torch.randn(shape, requires_grad=True)
    elements = 8 * layer.weight.numel()
    with NoTensorAsLargeAs(elements) as watch:
        layer(x).square().sum().backward()
    assert watch.calls > 16  # what the samples' loop does is seen
    with pytest.raises(MemoryError), NoTensorAsLargeAs(elements):
        layer.weight * torch.ones(8, *[1] * layer.weight.ndim)


def test_gradients_of_gradients_work_for_a_mask_a_batch_and_say_so_for_samples():
    layer = linear("batch")
    x = inputs(layer)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    (gradient,) = torch.autograd.grad(linear("sample")(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("make", [linear, conv])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"p": 1.0}, r"Expected `p` in \[0, 1\), got 1.0"),
        ({"p": -0.1}, r"Expected `p` in \[0, 1\), got -0.1"),
        ({"p": math.nan}, r"Expected `p` in \[0, 1\), got nan"),
        ({"per": "token"}, "Expected `per` to be batch or sample, got 'token'"),
    ],
)
def test_wrong_arguments_raise(make, wrong, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the layer itself is to refuse a wrong `per`
    with pytest.raises(ValueError, match=message):
        make(**wrong)


@PER
def test_a_p_that_is_set_later_is_checked_when_it_is_used(per):
    layer = linear(per)
    layer.p = 1.0
    with pytest.raises(ValueError, match=r"Expected `p` in \[0, 1\), got 1.0"):
        layer(inputs(layer))


def test_compiled_layers_are_the_same_in_evaluation_and_differ_between_steps_in_training(compilable):
    network = nn.Sequential(linear("batch", dtype=torch.float32), nn.Tanh(), DropConnectLinear(5, 6, per="sample"))
    compiled = torch.compile(network, fullgraph=True)
    x = inputs(network[0]).detach()
    assert torch.allclose(compiled.eval()(x), network(x), atol=1e-6)
    compiled.train()
    assert not torch.allclose(compiled(x), compiled(x))


@PER
def test_compiled_layer_has_the_gradient_of_the_weights_that_it_kept(per, compilable):
    # One token a sample: the output shows which weights were kept, and the gradient must be theirs.
    layer = DropConnectLinear(4, 3, bias=False, p=0.5, per=per)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.eye(4).reshape(4, 1, 4))
    y.sum().backward()
    kept = y.detach().reshape(4, 3).T != 0
    assert kept.any()
    assert torch.equal(layer.weight.grad, kept * 2.0)


@PER
def test_compiled_convolution_has_consistent_gradients(per, compilable):
    layer = DropConnectConv2d(4, 3, 1, bias=False, p=0.5, per=per)
    x = torch.eye(4).reshape(4, 4, 1, 1)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    y.sum().backward()
    kept = y.detach().flatten(1).T != 0
    assert torch.equal(layer.weight.grad[:, :, 0, 0], kept * 2.0)


@PER
def test_a_checkpointed_block_that_is_compiled_recomputes_the_same_masks(per, compilable):
    layer = DropConnectLinear(4, 3, bias=False, p=0.5, per=per)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x):
        return checkpoint(lambda x: layer(x).square(), x, use_reentrant=False)

    x = torch.eye(4).reshape(4, 1, 4)
    y = run(x)
    y.sum().backward()
    kept = y.detach().reshape(4, 3).T != 0
    assert kept.any()
    assert torch.allclose(layer.weight.grad, kept * 8.0 * layer.weight.detach())


def train_on_rank(rank, folder):
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    network = nn.Sequential(
        linear("batch", dtype=torch.float32, seed=rank),  # DDP hands out the weights of rank 0
        DropConnectLinear(5, 8, per="sample"),
        nn.Unflatten(1, (2, 2, 2)),
        DropConnectConv2d(2, 2, 1, per="batch"),
        DropConnectConv2d(2, 2, 1, per="sample"),
    )
    parallel = nn.parallel.DistributedDataParallel(network)
    torch.manual_seed(rank)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        parallel(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
    torch.save(([*network.parameters()], [p.grad for p in network.parameters()]), f"{folder}/{rank}.pt")


def test_two_processes_with_masks_of_their_own_stay_in_step(tmp_path):
    in_two_processes(train_on_rank, tmp_path)
    (parameters, gradients), other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert len(parameters) == 8
    assert all(torch.equal(a, b) for a, b in zip(parameters, other[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients, other[1], strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
