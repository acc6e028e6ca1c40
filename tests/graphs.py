"""What the backward pass of a tensor is made of."""

import torch


def backward_functions(out):
    """Names of the functions that the backward pass of a tensor calls."""
    found, todo = set(), [out.grad_fn]
    while todo:
        node = todo.pop()
        found.add(type(node).__name__)
        todo += [child for child, _ in node.next_functions if child is not None]
    return found


def second_derivative(layer, x, direction, dtype):
    """Of the sum of squares of what a layer gives, along inputs x * (1 + t * direction), at t = 0."""
    along = torch.zeros((), dtype=dtype, requires_grad=True)
    out = layer(x.to(dtype) * (1 + along * direction))
    (first,) = torch.autograd.grad(out.square().sum(), along, create_graph=True)
    return torch.autograd.grad(first, along)[0]
