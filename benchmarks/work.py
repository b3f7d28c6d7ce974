"""What a call asks of a GPU, counted without one: for each operation that is dispatched its bytes and FLOPs.

An operation of PyTorch is taken as one kernel that reads each of its inputs and writes each of its results once. Some
take several kernels, and a softmax of long rows reads them more than once, so this is the least that eager PyTorch
does. A view and an empty tensor take none.
"""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

NO_KERNEL = {
    *("_unsafe_view", "alias", "detach", "empty", "empty_like", "empty_permuted", "empty_strided", "lift_fresh"),
    *("new_empty", "new_empty_strided", "resize_", "set_", "_reshape_alias", "_local_scalar_dense", "is_same_size"),
}
LOOKS = {"any", "all", "nonzero", "is_nonzero", "equal"}  # by which a CPU, and no GPU, refuses labels that are wrong
# Of the first argument they read, or write, as many elements as there are indices.
GATHERS = {"gather", "index", "index_select", "embedding", "take"}
FILLS = {"ones_like", "zeros_like", "full_like", "fill_", "zero_", "new_zeros", "new_ones", "new_full"}  # read nothing
SCATTERS = {"scatter_", "scatter_add_", "index_put_", "index_add_", "_index_put_impl_"}


def elements(t):
    """Different ones in memory."""
    return math.prod(size for size, stride in zip(t.shape, t.stride(), strict=True) if stride != 0) if t.numel() else 0


def nbytes(t):
    return elements(t) * t.element_size()


def tensors(values):
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


class Recorder(TorchDispatchMode):
    """Inside, a list of what each operation asks for: `records`.

    Of each: op, bytes, and where there are any: fresh (bytes of the call's inputs that no earlier one read), FLOPs of
    matrix products and their dtype. `known(arguments, result)` gives more of an op of kdfast. Without `looks`, what
    only a CPU asks is left out. all_of_masks: of fake tensors, a mask chooses everything.
    """

    def __init__(self, inputs, known=None, looks=True, all_of_masks=False):
        super().__init__()
        self.records, self.known, self.looks, self.all_of_masks = [], known, looks, all_of_masks
        self._unread = {t.untyped_storage()._cdata for t in tensors(inputs)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        out = self._of_mask(name, args) if self.all_of_masks else None
        out = func(*args, **(kwargs or {})) if out is None else out
        if func.namespace == "kdfast":
            if self.known:
                self.records.append({"op": name, **self._bytes(name, args, kwargs, out), **self.known(args, out)})
            else:
                self.records.append({"op": f"kdfast.{name}", **self._bytes(name, args, kwargs, out)})
        elif not self._free(func, name, args):
            record = {"op": name, **self._bytes(name, args, kwargs, out)}
            if flops := flop_registry.get(func._overloadpacket):
                record["flops"] = flops(*args, **(kwargs or {}), out_val=out)
                record["dtype"] = str(out.dtype).removeprefix("torch.")
            if record["bytes"]:
                self.records.append(record)
        return out

    def _of_mask(self, name, args):
        """What a mask chooses has no size before it is computed."""
        if name == "nonzero":
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if name == "index" and (mask := args[1][0]) is not None and mask.dtype == torch.bool and len(args[1]) == 1:
            return args[0].new_empty((mask.numel(), *args[0].shape[mask.dim() :]))
        return None

    def _free(self, func, name, args):
        if func.namespace == "prim" or name in NO_KERNEL or (not self.looks and name in LOOKS):
            return True
        returns = [r.alias_info for r in func._schema.returns]
        return bool(returns) and all(a is not None and not a.is_write for a in returns)

    def _bytes(self, name, args, kwargs, out):
        read, written = [] if name in FILLS else tensors((args, kwargs or {})), tensors(out)
        storages = {t.untyped_storage()._cdata for t in read}
        total, fresh = 0, 0
        for i, t in enumerate(read):
            size = nbytes(t)
            if i == 0 and name in GATHERS:
                size = min(size, sum(map(nbytes, written)))
            if i == 0 and name in SCATTERS:
                size = min(size, 2 * max(map(nbytes, read[1:]), default=size))
            total += size
            if (storage := t.untyped_storage()._cdata) in self._unread:
                self._unread.discard(storage)
                fresh += size
        for t in written:  # in place: written as it was read
            seen = t.untyped_storage()._cdata in storages
            total += 0 if seen and name in SCATTERS else nbytes(t)
        return {"bytes": total, "fresh": fresh} if fresh else {"bytes": total}
