import copy

import pytest
import timm
import torch
from functorch.compile import make_boxed_func
from timm.layers import Attention, Mlp
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from masklr.layers import DropConnectLinear, LowRankLinear
from masklr.models import Classifier, MaskedAutoencoder, attention_in_float32
from masklr.models import float32_products as module
from masklr.models.attention import FastAttention, accelerate
from masklr.models.cross_decoder import CrossAttention
from masklr.models.fast_linear import linear
from masklr.models.fast_mlp import FastMlp
from tests.graphs import backward_functions, second_derivative

OF_THIS_PROCESSOR = module.ONEDNN_HAS_BF16
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "convolution", "linear"}
PRODUCTS |= {"convolution_backward", "_scaled_dot_product_flash_attention_for_cpu"}
PRODUCTS |= {"_scaled_dot_product_flash_attention_for_cpu_backward"}


@pytest.fixture(autouse=True)
def cpu_without_bf16(monkeypatch):
    monkeypatch.setattr(module, "ONEDNN_HAS_BF16", False)
    with torch._functorch.config.patch(backward_pass_autocast="same_as_forward"):  # put back after each test
        yield


def bf16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


class Recorded(TorchDispatchMode):
    """The products that run under it: names, and types of what they multiply."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            self.found += [(name, arg.dtype) for arg in args if isinstance(arg, torch.Tensor)]
        return func(*args, **(kwargs or {}))

    def assert_in_float32(self):
        assert len(self.found) > 4
        assert {dtype for _, dtype in self.found} == {torch.float32}, sorted(set(map(str, self.found)))


def make_mae(**options):
    torch.manual_seed(0)
    options.setdefault("image_size", 16)
    args = {"embed_dim": 24, "depth": 2, "num_heads": 3}
    return MaskedAutoencoder(
        patch_size=4,
        encoder_args={**args, **options.pop("encoder_args", {})},
        decoder_dim=24,
        decoder_depth=3,
        decoder_heads=3,
        **options,
    )


def make_classifier(**args):
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3}
    return Classifier(image_size=16, patch_size=4, backbone_args={**sizes, **args})


def with_listeners():
    model = make_mae()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda *_: None)
    return model


def with_dropconnect():
    model = make_mae()
    for block in model.encoder.blocks:
        for parent, name in ((block.attn, "qkv"), (block.mlp, "fc1")):
            old = getattr(parent, name)
            setattr(parent, name, DropConnectLinear(old.in_features, old.out_features, p=0.3))
    return model


def with_low_rank(**options):
    model = make_mae(image_size=32, **options)  # 64 patches: too many for products in float32
    for layers in (*model.encoder.blocks, *model.decoder_blocks):
        for name in ("qkv", "q", "proj"):
            if hasattr(layers.attn, name):
                setattr(layers.attn, name, LowRankLinear.from_linear(getattr(layers.attn, name), 4))
        layers.mlp.fc1 = LowRankLinear.from_linear(layers.mlp.fc1, 4)
    return model


MODELS = {
    "low rank": with_low_rank,
    "low rank, cross decoder": lambda: with_low_rank(decoder="cross"),
    "low rank, cross decoder, few tokens": lambda: with_low_rank(decoder="cross", prediction_ratio=0.1),
    "full decoder": make_mae,
    "cross decoder": lambda: make_mae(decoder="cross", prediction_ratio=0.5),
    "recomputed": lambda: make_mae(checkpoint=True),
    "listeners": with_listeners,
    "dropconnect": with_dropconnect,
    "norm of queries": lambda: make_mae(encoder_args={"qk_norm": True}),
    "dropout of attention": lambda: make_mae(encoder_args={"attn_drop_rate": 0.1, "proj_drop_rate": 0.1}),
    "no biases": lambda: make_mae(encoder_args={"qkv_bias": False}),
    "classifier": lambda: make_classifier(),
    "classifier with dropout": lambda: make_classifier(attn_drop_rate=0.1, proj_drop_rate=0.1, qk_norm=True),
}


def loss_of(model):
    size = model.image_size
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))
    if isinstance(model, Classifier):
        return model(images).square().mean()
    split = model.draw_split(3, torch.Generator().manual_seed(1))
    return model(images, split).loss


@pytest.mark.parametrize("name", MODELS)
def test_no_product_of_a_training_step_is_in_bf16(name):
    model = MODELS[name]().train()
    with Recorded() as recorded:
        with bf16():
            loss = loss_of(model)
        loss.backward()
    recorded.assert_in_float32()


@pytest.mark.parametrize("name", MODELS)
def test_no_product_without_gradients_is_in_bf16(name):
    model = MODELS[name]().eval()
    with Recorded() as recorded, torch.no_grad(), bf16():
        loss_of(model)
    recorded.assert_in_float32()


def test_no_product_of_second_derivatives_is_in_bf16():
    model = make_mae()
    with Recorded() as recorded, sdpa_kernel(SDPBackend.MATH):
        with bf16():
            loss = loss_of(model)
        leaf = model.encoder.blocks[0].attn.qkv.weight
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
    recorded.assert_in_float32()
    assert second.isfinite().all()


@pytest.mark.usefixtures("compilable")
@pytest.mark.parametrize("name", ["full decoder", "cross decoder", "classifier"])
def test_no_product_of_a_compiled_step_is_in_bf16(name):
    model = MODELS[name]().train()
    found = []

    def record(graph, inputs):
        for node in graph.graph.nodes:
            named = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
            if named in PRODUCTS:
                values = [arg.meta["val"] for arg in node.args if isinstance(arg, torch.fx.Node)]
                found.extend((named, value.dtype) for value in values)
        return make_boxed_func(graph)

    with bf16():
        eager = loss_of(model)
        loss = torch.compile(loss_of, backend=aot_autograd(fw_compiler=record, bw_compiler=record))(model)
    loss.backward()
    torch.testing.assert_close(loss, eager, rtol=0.02, atol=0)
    assert len(found) > 20
    assert {dtype for _, dtype in found} == {torch.float32}, sorted(set(map(str, found)))


LAYERS = {
    "linear": (lambda: nn.Linear(24, 40), lambda: nn.Linear(24, 40), linear, "LinearInFloat32Backward"),
    "MLP": (lambda: Mlp(24, 96), lambda: FastMlp(24, 96), FastMlp.__call__, "MLPInFloat32Backward"),
    "attention": (
        lambda: Attention(24, 3, qkv_bias=True),
        lambda: FastAttention(24, 3, qkv_bias=True),
        FastAttention.__call__,
        "SelfAttentionInFloat32Backward",
    ),
}


@pytest.fixture(params=[0, 48 * 48], ids=["fused", "products"])
def either_attention(request, monkeypatch):
    """Attention by the fused kernel, and by batched products."""
    monkeypatch.setattr(attention_in_float32, "MAX_PAIRS_BY_PRODUCTS", request.param)
    return "fused" if request.param == 0 else "products"


def twins(name):
    theirs, ours, call, function = LAYERS[name]
    torch.manual_seed(0)
    theirs, ours = theirs(), ours()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.3)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, call, function


def output_and_gradients(function, layer, x, wanted=None):
    x = x.clone().requires_grad_(wanted is None)
    out = function(x)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape).bfloat16().to(out.dtype)
    leaves = [x, *layer.parameters()] if wanted is None else wanted
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


@pytest.mark.usefixtures("either_attention")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("piece", [1, 500, 2**20])
@pytest.mark.parametrize("autocast", [True, False])
def test_output_and_gradients_are_nearer_to_the_truth_than_those_of_bf16(name, piece, autocast, monkeypatch):
    monkeypatch.setattr(module, "PIECE", piece)
    theirs, ours, call, function = twins(name)
    x = torch.randn(7, 11, 24)
    exact = copy.deepcopy(theirs).double()
    truth = output_and_gradients(exact, exact, x.double())
    if not autocast:
        theirs, ours, x = theirs.bfloat16(), ours.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert function in backward_functions(call(ours, x.clone().requires_grad_()))
        found = output_and_gradients(lambda x: call(ours, x), ours, x)
        other = output_and_gradients(theirs, theirs, x)
    for true, ours_, theirs_ in zip(truth, found, other, strict=True):
        assert ours_.dtype == theirs_.dtype
        error, other_error = (((y.double() - true).norm() / true.norm()).item() for y in (ours_, theirs_))
        assert error < 0.01
        assert error < 1.1 * other_error


@pytest.mark.usefixtures("either_attention")
@pytest.mark.parametrize("name", LAYERS)
def test_transposed_inputs(name):
    theirs, ours, call, _ = twins(name)
    x = torch.randn(3, 24, 7)
    exact = copy.deepcopy(theirs).double()
    truth = output_and_gradients(lambda x: exact(x.mT).mT, exact, x.double())
    with bf16():
        found = output_and_gradients(lambda x: call(ours, x.mT).mT, ours, x)
    for true, rounded in zip(truth, found, strict=True):
        assert (rounded.double() - true).norm() < 0.01 * true.norm()


@pytest.mark.parametrize("name", LAYERS)
def test_parameters_in_bf16_are_served_without_gradients_and_with_listeners_too(name):
    theirs, ours, call, _ = twins(name)
    x = torch.randn(2, 5, 24)
    theirs, ours = theirs.bfloat16(), ours.bfloat16()
    with bf16():
        expected = theirs(x)
        with torch.no_grad():
            torch.testing.assert_close(call(ours, x), expected, rtol=0.02, atol=0.05)
        for layer in ours.modules():
            layer.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(call(ours, x), expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(("tokens", "kernel"), [(48, False), (49, True)])
def test_short_sequences_attend_by_products_and_others_by_the_fused_kernel(cross, tokens, kernel):
    layer = CrossAttention(24, context_dim=24, num_heads=3) if cross else twins("attention")[1]
    x = torch.randn(2, tokens, 24, requires_grad=True)
    with Recorded() as recorded, bf16():
        (layer(x, torch.randn(2, 48, 24)) if cross else layer(x)).sum().backward()
    recorded.assert_in_float32()
    names = {name for name, _ in recorded.found}
    forward = "_scaled_dot_product_flash_attention_for_cpu"
    assert names >= ({forward, f"{forward}_backward"} if kernel else {"bmm", "baddbmm"})
    assert not names & ({"bmm", "baddbmm"} if kernel else {forward, f"{forward}_backward"})


def test_masks_of_attention_in_bf16():
    theirs, ours, _, _ = twins("attention")
    x, mask = torch.randn(2, 5, 24), torch.randn(5, 5).bfloat16()
    with bf16():
        torch.testing.assert_close(ours(x, attn_mask=mask), theirs(x, attn_mask=mask), rtol=0.02, atol=0.05)


@pytest.mark.usefixtures("either_attention")
def test_cross_attention_is_nearer_to_the_truth_in_any_pieces(monkeypatch):
    torch.manual_seed(0)
    layer = CrossAttention(24, context_dim=20, num_heads=3)
    x, context = torch.randn(5, 4, 24), torch.randn(5, 7, 20)
    exact = copy.deepcopy(layer).double()
    truth = output_and_gradients(lambda x: exact(x, context.double()), exact, x.double())
    for piece in (1, 2**20):
        monkeypatch.setattr(module, "PIECE", piece)
        with bf16():
            out = layer(x, context)
            assert "CrossAttentionInFloat32Backward" in backward_functions(out)
            found = output_and_gradients(lambda x: layer(x, context), layer, x)
        for true, ours in zip(truth, found, strict=True):
            assert (ours.double() - true).norm() < 0.01 * true.norm()


@pytest.mark.usefixtures("either_attention")
@pytest.mark.parametrize("last", [1, 5])
def test_only_the_last_tokens_ask(last):
    _, ours, _, _ = twins("attention")
    x = torch.randn(3, 9, 24)
    exact = copy.deepcopy(ours).double()
    truth = output_and_gradients(lambda x: exact(x, last=last), exact, x.double())
    with bf16():
        found = output_and_gradients(lambda x: ours(x, last=last), ours, x)
    assert found[0].shape == (3, last, 24)
    for true, rounded in zip(truth, found, strict=True):
        assert (rounded.double() - true).norm() < 0.01 * true.norm()


@pytest.mark.parametrize("name", ["linear", "MLP"])
def test_frozen_parts_get_no_gradient_and_the_others_theirs(name):
    _, ours, call, _ = twins(name)
    x = torch.randn(5, 24)
    with bf16():
        _, _, *all_grads = output_and_gradients(lambda x: call(ours, x), ours, x)
        names = [key for key, _ in ours.named_parameters()]
        for trained, expected in zip(names, all_grads, strict=True):
            for key, p in ours.named_parameters():
                p.requires_grad_(key == trained)
            _, grad = output_and_gradients(lambda x: call(ours, x), ours, x, [ours.get_parameter(trained)])
            assert torch.equal(grad, expected)
        ours.requires_grad_(False)
        leaf = x.clone().requires_grad_()
        call(ours, leaf).sum().backward()
    assert leaf.grad.abs().sum() > 0


@pytest.mark.usefixtures("either_attention")
@pytest.mark.parametrize("name", LAYERS)
def test_second_derivative_is_right_under_the_math_kernel_and_an_error_elsewhere(name):
    _, ours, call, _ = twins(name)
    x, direction = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    exact = copy.deepcopy(ours).double()
    with sdpa_kernel(SDPBackend.MATH):
        truth = second_derivative(lambda x: call(exact, x), x, direction, torch.float64)
        with bf16():
            found = second_derivative(lambda x: call(ours, x), x, direction, torch.float32)
    torch.testing.assert_close(found.double(), truth, rtol=0.05, atol=0)
    with bf16(), pytest.raises(RuntimeError, match="sdpa_kernel"):
        second_derivative(lambda x: call(ours, x), x, direction, torch.float32)


def test_what_is_kept_for_the_backward_pass_is_bf16_or_the_weights_themselves():
    _, ours, _, _ = twins("MLP")
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    x = torch.randn(50, 24).bfloat16()
    with bf16(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ours(x.requires_grad_())
    own = {p.data_ptr() for p in ours.parameters()}
    others = [tensor for tensor in kept if tensor.data_ptr() not in own]
    assert sorted(tuple(tensor.shape) for tensor in others) == [(50, 24), (50, 96)]
    assert {tensor.dtype for tensor in others} == {torch.bfloat16}


def test_float32_and_float64_are_not_touched():
    ours = twins("MLP")[1]
    assert "_MLPBackward" in backward_functions(ours(torch.randn(3, 24)))
    ours.double()
    with bf16():
        assert ours(torch.randn(3, 24, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("name", LAYERS)
def test_defaults_of_torch_are_not_asked(name):
    _, ours, call, _ = twins(name)
    x = torch.randn(2, 5, 24)
    torch.set_default_dtype(torch.float64)
    try:
        with bf16():
            found = output_and_gradients(lambda x: call(ours, x), ours, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found[0].dtype == torch.bfloat16
    assert {grad.dtype for grad in found[1:]} == {torch.float32}


def test_no_rows_are_no_error():
    with bf16():
        for name in LAYERS:
            _, ours, call, _ = twins(name)
            x = torch.zeros(0, 5, 24, requires_grad=True)
            call(ours, x).sum().backward()
            assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())


def test_what_took_a_linear_layers_place_is_not_rounded():
    x = torch.randn(2, 24)
    with bf16():
        assert torch.equal(linear(nn.Identity(), x), x)
        assert linear(nn.Linear(24, 3, bias=False), x).dtype == torch.bfloat16


def test_pieces_cover_all_rows_and_are_of_about_one_size():
    for rows in (0, 1, 7, 1000, 12345):
        for width in (1, 768, 10**7):
            sizes = [len(piece) for piece in torch.empty(rows, 0).split(module.piece_size(rows, width))]
            assert sum(sizes) == rows
            assert max(sizes) * width <= 1.5 * module.PIECE or max(sizes) <= 1


@pytest.mark.parametrize(("has", "cuda"), [(True, False), (False, True), (False, False)])
def test_compiled_backward_passes_keep_their_types_on_such_cpus_only(has, cuda, monkeypatch):
    monkeypatch.setattr(module, "ONEDNN_HAS_BF16", has)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    accelerate(timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=12, depth=1, num_heads=1))
    assert torch._functorch.config.backward_pass_autocast == ("same_as_forward" if has or cuda else "off")


@pytest.mark.usefixtures("compilable")
@pytest.mark.parametrize("name", LAYERS)
def test_compiled_in_one_graph(name):
    _, ours, call, _ = twins(name)
    x = torch.randn(2, 5, 24)
    with bf16():
        compiled = torch.compile(lambda x: call(ours, x), backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(compiled, call(ours, x), rtol=0.02, atol=0.05)


def test_the_processor_is_asked():
    assert torch.ops.mkldnn._is_mkldnn_bf16_supported() == OF_THIS_PROCESSOR
    assert not module.has_bf16_products()  # as set for these tests
    assert not module.lacks_products(torch.zeros(1))
    with bf16():
        assert module.lacks_products(torch.zeros(1))
        assert not module.lacks_products(torch.zeros(1, dtype=torch.float64))
    with torch.autocast("cpu", dtype=torch.float16):
        assert not module.lacks_products(torch.zeros(1))
