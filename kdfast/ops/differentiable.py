"""From ops to functions with a gradient: the two patterns that ops follow, each written once.

    statistics kept       The forward keeps a few numbers for each row, and the backward reads the inputs again: for
                          rows of logits and for maps, whose gradients are as large as they are.
    gradient formed       The forward, which has everything at hand, gives the gradient, too, or the small matrix that
                          leads to it, and the backward scales it: for relations, where a second read is the work.

Gradients are of first order: a second derivative is refused. What takes a list of tensors, gives more than the result,
or has a backward that is not one op (plain PyTorch, several ops) is an autograd function written out: tried here, the
matching of its arguments took 2 to 10 % of a small call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from kdfast.ops import check
from kdfast.ops.saved import save, saved


def statistics_kept(forward: OpOverload, backward: OpOverload, name: str | None = None) -> Callable[..., Tensor]:
    """``function(settings, *tensors)`` of two ops, whose arguments are matched by name.

    forward: tensors, of which those that can have a gradient come first, then settings -> result, or
        (result, statistics).
    backward: grad, the tensors, the statistics (if it takes another tensor and there are none, the result), those
        settings that it needs, then ``need_x`` for each tensor x that can have a gradient -> the gradients of these;
        without any ``need_x``, that of the first tensor.
    name: of the function in messages, if it is not that of the op.
    """
    name = name or forward.__name__.partition(".")[0]
    tensors, settings = _arguments(forward)
    read, others = _arguments(backward)
    passed = [settings.index(x) for x in others if not x.startswith("need_")]
    flags = len(others) - len(passed)
    rest = [None] * (len(tensors) - max(flags, 1))
    has_statistics = len(forward._schema.returns) > 1
    keeps_result = not has_statistics and len(read) > len(tensors) + 1

    def run(*args):
        ctx, settings, *tensors = args
        ctx.settings = settings
        result = forward(*tensors, *settings)
        if has_statistics:
            result, statistics = result
            save(ctx, *tensors, statistics)
        elif keeps_result:
            save(ctx, *tensors, result)
        else:
            save(ctx, *tensors)
        return result

    def differentiate(ctx, grad):
        check.first_derivative_only(name)
        settings, needs = ctx.settings, ctx.needs_input_grad[1 : flags + 1]
        grads = backward(grad, *saved(ctx), *[settings[i] for i in passed], *needs)
        if not flags:
            return None, grads, *rest
        return None, *[x if need else None for x, need in zip(grads, needs, strict=True)], *rest

    return function_of(name, run, differentiate)


def gradient_formed(
    forward: Callable[..., Any], finish: Callable[..., Tensor], name: str, sides: int = 2
) -> Callable[..., Tensor]:
    """``function(settings, *tensors)`` of two functions, the first `sides` of the tensors having gradients.

    forward: tensors, settings, and for each side whether its gradient is needed -> result, and for each side what leads
        to its gradient.
    finish: grad, what leads to the gradient of x, x, settings -> the gradient of x.
    """

    def run(*args):
        ctx, settings, needs, *tensors = args
        result, *slopes = forward(*tensors, *settings, *needs)
        kept = [x if need else None for x, need in zip(tensors, needs, strict=False)]
        save(ctx, *kept, *slopes)
        ctx.settings, ctx.others = settings, len(tensors) - sides
        return result

    def differentiate(ctx, grad):
        check.first_derivative_only(name)
        kept, needs = saved(ctx), ctx.needs_input_grad[2:]
        grads = [
            finish(grad, slope, x, *ctx.settings) if need else None
            for x, slope, need in zip(kept[:sides], kept[sides:], needs, strict=False)
        ]
        return None, None, *grads, *[None] * ctx.others

    apply = function_of(name, run, differentiate)

    def function(settings, *tensors):
        recording = torch.is_grad_enabled()
        return apply(settings, [recording and x.requires_grad for x in tensors[:sides]], *tensors)

    return function


def function_of(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """An autograd function of the two, to be called; its nodes in a graph are called after `name`.

    forward takes ``*args``: without gradients, dynamo passes no ctx to one with as many parameters as arguments.
    """
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"_{name}_", (torch.autograd.Function,), methods).apply


def _arguments(op):
    """-> names of an op's tensors, and of its other arguments."""
    names = [(x.name, str(x.type) in ("Tensor", "Optional[Tensor]")) for x in op._schema.arguments]
    return [x for x, is_tensor in names if is_tensor], [x for x, is_tensor in names if not is_tensor]
