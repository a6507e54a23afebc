"""Comparisons of an operation in a narrow type with the same operation in float64."""

import torch


def error(found, expected):
    """Distance relative to the norm of what was expected."""
    wide = expected.double()
    return ((found.double() - wide).norm() / wide.norm().clamp(min=1e-30)).item()


def backward(function, leaves):
    """Return the outputs and the gradients of `leaves`."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    outs = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in outs]
    return [o.detach() for o in outs], torch.autograd.grad(outs, leaves, grads)


def agree(function, leaves, tolerance, wide=None):
    """The function of float32 or bfloat16 leaves against that of the same leaves in float64."""
    found, grads = backward(function, leaves)
    expected, exact = backward(wide or function, [leaf.double() for leaf in leaves])
    for ours, theirs in zip([*found, *grads], [*expected, *exact], strict=True):
        assert ours.dtype is leaves[0].dtype
        assert error(ours, theirs) < tolerance
