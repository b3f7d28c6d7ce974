"""Batches that are spread over the ranks of torch.distributed, put together.

Ranks first tell each other about their tensors, on the CPU. So batches of different sizes work, and what cannot work is
the same error on every rank instead of a wait without end.
"""

import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdfast.ops import check

if dist.is_available():
    # DDP imports it, and its functions keep the process group that there is by then, as a default, for good.
    import torch.distributed.nn.functional  # noqa: F401

__all__ = ["gather", "ignore_banks"]

# Default process group -> a group of all its ranks that carries CPU tensors, None for itself. Weak: a group that is
# held after it was destroyed keeps its threads, and they may abort the process at its end.
_host_groups = weakref.WeakKeyDictionary()


def world_size() -> int:
    """How many ranks there are; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _host_group():
    """A group of all ranks for CPU tensors, which no rank has to wait for its GPU to send."""
    world = dist.group.WORLD
    if world not in _host_groups:
        carries = str(dist.get_backend_config())
        only_gpu = "nccl" in carries and "gloo" not in carries
        _host_groups[world] = dist.new_group(backend="gloo") if only_gpu else None
    return _host_groups[world]


def exchange(values: Sequence[int]) -> list[list[int]]:
    """Lists of ints, one from each rank in their order; all of one length."""
    mine = torch.tensor(values, dtype=torch.int64, device="cpu")
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine, group=_host_group())
    return [part.tolist() for part in parts]


def as_bytes(x: Tensor) -> Tensor:
    """The memory of a contiguous tensor as (bytes,): a backend then carries every dtype."""
    return x.reshape(-1).view(torch.uint8)


def gather_rows(x: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows of all ranks in their order, `counts` of them on each; without a gradient."""
    shape = (max(counts), *x.shape[1:])
    if 0 in shape:
        return x.new_empty((sum(counts), *x.shape[1:]))
    mine = x.new_zeros(shape)
    mine[: len(x)] = x
    parts = [torch.empty_like(mine) for _ in counts]
    dist.all_gather([as_bytes(part) for part in parts], as_bytes(mine))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, counts):
        ctx.first, ctx.rows = sum(counts[: dist.get_rank()]), len(x)
        return gather_rows(x, counts)

    @staticmethod
    def backward(ctx, grad):
        check.first_derivative_only("distributed.gather")
        # Every rank's loss has a gradient in every rank's rows. DDP divides by the number of ranks later.
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True).contiguous()
        dist.all_reduce(wide)
        return wide[ctx.first : ctx.first + ctx.rows].to(grad.dtype), None


_DIMS = 8  # of a tensor whose shape is exchanged
_DTYPES = (*check.FLOATS, *check.INTEGERS, torch.bool)


def gather(x: Tensor) -> Tensor:
    """The batches `x` (B, ...) of all ranks as one, in the order of the ranks, with a gradient.

    For losses on the relations within a batch::

        loss = kdfast.RKD()(kdfast.distributed.gather(student), kdfast.distributed.gather(teacher))

    Each rank then computes the loss of the whole batch. A rank's rows get the sum of the gradients of all ranks'
    losses, so that the average over the ranks, which DDP takes, is the gradient of one process with the whole batch.
    Every rank has to call it and its backward. B may differ between ranks, and may be 0. Without torch.distributed it
    returns `x`.

    Raises: TypeError for what is no tensor; ValueError, the same on every rank, where the ranks' shapes, dtypes or
    ``requires_grad`` do not fit together.
    """
    if world_size() == 1:
        check.tensor("x", x)
        return x
    fits = isinstance(x, torch.Tensor) and 1 <= x.dim() <= _DIMS and x.dtype in _DTYPES
    shape = list(x.shape) if fits else []
    wants = fits and x.requires_grad and torch.is_grad_enabled()
    header = [fits, len(shape), wants, _DTYPES.index(x.dtype) if fits else -1, *shape, *[0] * (_DIMS - len(shape))]
    headers = exchange([int(value) for value in header])
    for rank, (fitting, dims, grad, dtype, *sizes) in enumerate(headers):
        if not fitting:
            raise ValueError(f"x must be a tensor of 1 to {_DIMS} dimensions on every rank; on rank {rank} it is not")
        first = headers[0]
        if [dims, grad, dtype, *sizes[1:]] != [*first[1:4], *first[5:]]:
            raise ValueError(
                "x must have one dtype, requires_grad and shape but for the first dimension on every rank, got "
                f"{_described(first)} on rank 0 and {_described(headers[rank])} on rank {rank}"
            )
    return _Gather.apply(x, [sizes[4] for sizes in headers])


def _described(header):
    _, dims, grad, dtype, *sizes = header
    return f"{_DTYPES[dtype]} {tuple(sizes[:dims])}{' with gradient' if grad else ''}"


def ignore_banks(model: nn.Module) -> nn.Module:
    """Keep DistributedDataParallel from sending the memory banks inside `model`; call it before wrapping it.

    DDP copies every buffer from rank 0 in each step (gigabytes for banks), but for those on a list that it reads from
    the module it wraps. A :class:`kdfast.CRD` that is wrapped by itself has that list already; its `sync` keeps the
    banks equal. Returns `model`.
    """
    names = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for prefix, module in model.named_modules():
        own = getattr(module, "_ddp_params_and_buffers_to_ignore", ())
        names.update(f"{prefix}.{name}" if prefix else name for name in own)
    model._ddp_params_and_buffers_to_ignore = sorted(names)
    return model
