"""Every op, forward and backward, on small inputs that cross the boundaries of the kernels.

`python tests/workload.py` runs it once on the GPU: short enough for compute-sanitizer to watch. Ops and shapes are
those of tests/registry/, and what no entry there runs; test_workload.py tells if an op is missing.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import registry
import torch

from kdfast import ops

DTYPES = (torch.float32, torch.bfloat16)
# Entries that run the kernels of others.
ALIKE = {
    *("softmax_kl.kl_weighted", "softmax_kl.topk_no_rest", "feature.boundary_none", "feature.partial_mean"),
    *("pairwise.distance", "pairwise.squared", "pairwise.between_squared", "attention.power1", "attention.power4"),
    *("mixed_logits.no_labels", "mixed_logits.shared_target", "mixed_logits.constant", "teachers.kl_sum"),
}


@dataclass
class Call:
    """One loss of leaf tensors."""

    name: str
    function: Callable
    leaves: list

    def run(self):
        """-> the loss and the gradients in all leaves that get one."""
        loss = self.function(*self.leaves)
        grads = torch.autograd.grad(loss, self.leaves, torch.ones_like(loss), allow_unused=True)
        return [loss.detach(), *(g for g in grads if g is not None)]


# ---- the registry's ops ----------------------------------------------------------------------------------------------
def apart(t, device):
    """Rows that lie apart, none aligned; made on the CPU, so that on the GPU only kernels of kdfast compute."""
    wide = t.new_zeros(*t.shape[:-1], t.shape[-1] + 3)
    wide[..., 1:-2] = t
    return wide.to(device)[..., 1:-2]


def inputs_of(group, shape, dtype, memory_format, device):
    torch.manual_seed(sum(shape))
    x = group.in_format(group.inputs("cpu", shape, dtype), memory_format)
    if group.family == "pairwise":
        for t in x.values():
            t[1] = t[0]  # equal rows
    if group.of_maps:
        return registry.mapped(x, lambda name, t: t.to(device))
    return registry.mapped(x, lambda name, t: apart(t, device) if name in group.leaves else t.to(device))


def calls_of(group, device):
    for shape in group.workload:
        for dtype in DTYPES:
            for memory_format in group.memory_formats:
                x = inputs_of(group, shape, dtype, memory_format, device)
                for op in group.ops:
                    if str(op) not in ALIKE:
                        where = f"{shape}, {dtype}, {memory_format}"
                        yield Call(f"{op}, {where}", *on_leaves(op, x))


def on_leaves(op, x):
    """The op's value as a function of its leaves, and these."""

    def function(*leaves):
        return op(ops, registry.replaced(x, op.leaves, leaves))

    return function, [t.detach().requires_grad_() for t in registry.tensors(x, op.leaves)]


# ---- what no entry runs ----------------------------------------------------------------------------------------------
def many_rows(device):
    many = torch.randn(8193, 3, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    ones = torch.ones(8193, dtype=torch.long).to(device)
    yield Call("CE of more rows than a block adds up", lambda s: ops.cross_entropy(s, ones), [many])


def steps_of_crd(device):
    shapes = [
        (3, 5, 9, 7),  # rows shorter than a vector, more draws than rows
        (2, 300, 20, 50),  # more rows than a warp takes for one anchor
        (2, 5, 1030, 6),  # more features than a warp keeps in registers
    ]
    for batch, negatives, dim, rows in shapes:
        for dtype in DTYPES:
            numbers = torch.Generator().manual_seed(dim)
            anchors = torch.randn(2, batch, dim, generator=numbers).div(dim**0.5).to(device)
            banks = torch.randn(2, rows, dim, generator=numbers).div(dim**0.5).to(dtype).to(device)
            index = torch.arange(batch).to(device)
            seed, unset, z = (torch.tensor(x).to(device) for x in (1, -1.0, 50.0))

            def step(s, t, banks=banks, index=index, seed=seed, unset=unset, z=z, k=negatives):
                """Draw, score, move a copy of a bank, so that every step is the same."""
                drawn = ops.draw_negatives(index, k, banks.shape[1], seed)
                torch.ops.kdfast.nce_log_sums(s.detach(), t.detach(), *banks, drawn, unset, unset, 0.1)
                loss = ops.nce(s, t, *banks, drawn, z, z, 0.1)
                ops.update_bank(banks[0].clone(), s.detach(), index)
                return loss

            leaves = [x.detach().requires_grad_() for x in anchors]
            yield Call(f"CRD, {batch} x {negatives} x {dim}, {dtype}", step, leaves)


def selectivity(device):
    for group in registry.family("attention").GROUPS:
        for shape in group.workload:
            for dtype in DTYPES:
                x = inputs_of(group, shape, dtype, torch.contiguous_format, device)
                leaves = [t.flatten(2).requires_grad_() for t in x.values()]
                yield Call(f"selectivity, {shape}, {dtype}", ops.selectivity, leaves)


def adaptive_weights(device):
    """AE-KD, and the programme that it solves on its own."""
    group = registry.family("teachers").GROUPS[0]
    for shape in group.workload:
        for dtype in DTYPES:
            x = inputs_of(group, shape, dtype, torch.contiguous_format, device)
            gram = torch.eye(shape[0], dtype=torch.float64).to(device)

            def loss_of(student, teachers=x.teachers, gram=gram):
                loss, _ = ops.aekd(student, teachers)
                return loss + 0 * torch.ops.kdfast.simplex_minimum(gram, gram[0], 0.9).sum().to(loss.dtype)

            yield Call(f"AE-KD, {shape}, {dtype}", loss_of, [x.student.detach().requires_grad_()])


def calls(device):
    """All calls of all families."""
    found = [call for group in registry.groups() for call in calls_of(group, device)]
    return found + [call for more in (many_rows, steps_of_crd, selectivity, adaptive_weights) for call in more(device)]


def main():
    if not torch.cuda.is_available():
        print("no GPU")
        return 2
    count = 0
    for call in calls("cuda"):
        for result in call.run():
            if not result.cpu().isfinite().all():  # on the CPU, see above
                print(f"{call.name}: not finite")
                return 1
            count += 1
    print(f"workload: {count} results, all finite")
    return 0


if __name__ == "__main__":
    sys.exit(main())
