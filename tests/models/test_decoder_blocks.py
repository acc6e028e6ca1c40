import pytest
import torch
from timm.models.vision_transformer import Block
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from masklr.layers import DropConnectLinear
from masklr.models.decoder_blocks import FirstTokensBlock
from tests.graphs import backward_functions

B, K, M, N, E = 3, 5, 7, 12, 24


def inputs(seed=0):
    torch.manual_seed(seed)
    table = torch.randn(N, E, requires_grad=True)
    index = torch.stack([torch.randperm(N)[:M] for _ in range(B)])
    return torch.randn(B, K, E, requires_grad=True), table, index


def twins():
    torch.manual_seed(0)
    theirs, ours = Block(E, 3, qkv_bias=True), FirstTokensBlock(E, 3, qkv_bias=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def run(block, known, table, index):
    masked = table[index]
    if isinstance(block, FirstTokensBlock):
        return block(known, masked, table, index)
    return block(torch.cat([known, masked], dim=1))


def output_and_gradients(block, known, table, index):
    out = run(block, known, table, index)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [known, table, *block.parameters()])]


def is_own(out):
    return "_WithRowsOfTableBackward" in backward_functions(out)


def test_output_and_gradients_equal_those_of_timms_block():
    theirs, ours = twins()
    given = inputs()
    assert is_own(run(ours, *given))
    for a, b in zip(output_and_gradients(theirs, *given), output_and_gradients(ours, *given), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def test_rows_that_nobody_names_get_no_gradient():
    _, ours = twins()
    known, table, index = inputs()
    (grad,) = torch.autograd.grad(run(ours, known, table, index).square().sum(), table)
    named = torch.zeros(N, dtype=torch.bool)
    named[index.flatten()] = True
    assert 0 < named.sum() < N
    assert (grad[named] != 0).all(dim=1).all()
    assert (grad[~named] == 0).all()


def test_mask_tokens_are_projected_once_for_each_patch():
    _, ours = twins()
    rows = []
    project = torch.nn.functional.linear

    def counted(x, *rest):
        rows.append(x.shape[:-1].numel())
        return project(x, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", counted)
        run(ours, *inputs())
    assert rows[0] == B * K + N


@pytest.mark.usefixtures("with_and_without_bf16_products")
def test_bf16_is_as_near_to_the_truth_as_timms_block():
    theirs, ours = twins()
    known, table, index = inputs()
    exact = output_and_gradients(theirs, known, table, index)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert is_own(run(ours, known, table, index))
        a, b = (output_and_gradients(block, known, table, index) for block in (theirs, ours))
    for truth, timms, fast in zip(exact, a, b, strict=True):
        error, timms_error = (((y.float() - truth).norm() / truth.norm()).item() for y in (fast, timms))
        assert error < 0.03
        assert error < 1.5 * timms_error


@pytest.mark.parametrize("part", ["norm1", "attn", "attn.qkv"])
def test_whoever_listens_to_a_part_hears_of_all_tokens(part):
    _, ours = twins()
    given = inputs()
    before = run(ours, *given)
    heard = []
    ours.get_submodule(part).register_forward_hook(lambda layer, args, out: heard.append(out.shape[:2]))
    out = run(ours, *given)
    assert heard == [(B, K + M)]
    assert not is_own(out)
    torch.testing.assert_close(out, before)


def test_a_mask_on_the_projection_is_drawn_for_all_tokens_together():
    theirs, ours = twins()
    given = inputs()
    results = []
    for block in (theirs, ours):
        layer = DropConnectLinear(E, 3 * E, p=0.5)
        layer.load_state_dict(block.attn.qkv.state_dict())
        block.attn.qkv = layer
        torch.manual_seed(3)
        results.append(run(block, *given))
    assert not is_own(results[1])
    torch.testing.assert_close(*results)


def test_gradients_are_the_same_when_the_block_is_computed_anew():
    _, ours = twins()
    known, table, index = inputs()
    found = []
    for block in (ours, lambda *given: checkpoint(ours, *given, use_reentrant=False)):
        out = block(known, table[index], table, index)
        assert is_own(out)
        found.append(torch.autograd.grad(out.sin().sum(), [known, table, *ours.parameters()]))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_few_mask_tokens_are_served_as_they_are():
    theirs, ours = twins()
    known, table, index = inputs()
    out = run(ours, known[:1], table, index[:1])
    assert not is_own(out)
    torch.testing.assert_close(out, run(theirs, known[:1], table, index[:1]))


def test_without_gradients_and_under_the_math_kernel_it_is_timms_block():
    theirs, ours = twins()
    given = inputs()
    with torch.no_grad():
        torch.testing.assert_close(run(ours, *given), run(theirs, *given))
    with sdpa_kernel(SDPBackend.MATH):
        assert not is_own(run(ours, *given))
