"""Attention by batched matrix products that keep the probabilities: on CPUs the fastest for short sequences."""

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale Q K^T) V, and the probabilities; of queries (heads, M, d), keys and values (heads, N, d).

    To be called without autocast, which would take softmax to float32 and back, a copy each.
    """
    scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)
    probabilities = torch._softmax(scores, -1, False, out=scores)
    return torch.bmm(probabilities, v), probabilities


def write_gradients(
    grads: tuple[Tensor, Tensor, Tensor], grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, scale: float
) -> None:
    """Write the gradients of queries, keys and values; `kept` are the probabilities that `attend` returned."""
    grad_q, grad_k, grad_v = grads
    torch.bmm(kept.transpose(1, 2), grad_out, out=grad_v)
    grad_scores = torch.bmm(grad_out, v.transpose(1, 2))
    torch._softmax_backward_data(grad_scores, kept, -1, kept.dtype, grad_input=grad_scores)
    torch.baddbmm(grad_q, grad_scores, k, beta=0, alpha=scale, out=grad_q)
    torch.baddbmm(grad_k, grad_scores.transpose(1, 2), q, beta=0, alpha=scale, out=grad_k)
