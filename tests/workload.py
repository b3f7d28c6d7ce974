"""Every op, forward and backward, on small inputs that cross the boundaries of the kernels.

`python tests/workload.py` runs it once on the GPU: short enough for compute-sanitizer to watch. A new family adds its
function to FAMILIES; test_workload.py tells if an op is missing.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kdfast import ops


@dataclass
class Call:
    """One loss of leaf tensors."""

    name: str
    function: Callable
    leaves: list

    def run(self):
        """-> the loss and the gradients in all leaves."""
        loss = self.function(*self.leaves)
        return [loss.detach(), *torch.autograd.grad(loss, self.leaves, torch.ones_like(loss))]


# ---- families: device -> calls ---------------------------------------------------------------------------------------
def softmax_kl(device):
    shapes = [
        (3, 7),  # less than the eight elements that a thread reads at once
        (9, 33),  # one class more than a warp has lanes, one row more than a block has warps
        (2, 2049),  # the first row that a whole block reads
        (1, 16385),  # two blocks share the row's gradient
    ]
    for rows, cols in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            # On the CPU, so that on the GPU only kernels of kdfast compute. The rows lie apart, unaligned.
            numbers = torch.Generator().manual_seed(cols)
            wide = torch.randn(2, rows, cols + 3, generator=numbers).to(dtype).to(device)
            leaves = [x[:, 1:-2].detach().requires_grad_() for x in wide]
            labels = torch.randint(cols, (rows,), generator=numbers).to(device)
            weight = torch.rand(rows, generator=numbers).to(device)
            soft = torch.full((rows, cols), 1 / cols).to(device)
            functions = {
                "KL": lambda s, t: ops.softmax_kl(s, t, 4.0),
                "JSD": lambda s, t, weight=weight: ops.softmax_kl(s, t, beta=0.3, weight=weight, reduction="none"),
                "reverse KL": lambda s, t: ops.softmax_kl(s, t, beta=1.0),
                "CE + KL": lambda s, t, y=labels: ops.cross_entropy_kl(s, t, y, 4.0, label_smoothing=0.1),
                "soft CE + KL": lambda s, t, y=soft: ops.cross_entropy_kl(s, t, y),
                "DKD": lambda s, t, y=labels: ops.dkd(s, t, y),
            }
            where = f"{rows} x {cols}, {str(dtype).removeprefix('torch.')}"
            for name, function in functions.items():
                yield Call(f"{name}, {where}", function, leaves)
            yield Call(f"CE, {where}", lambda s, y=labels: ops.cross_entropy(s, y), leaves[:1])
            top = [x.to(device) for x in ops.TopK.of(wide[1, :, 1:-2].cpu(), min(cols, 40), 4.0)[:3]]
            yield Call(f"KL of top-k, {where}", lambda s, t=top: ops.softmax_kl(s, (*t, 4.0), 4.0), leaves[:1])
    many = torch.randn(8193, 3, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    ones = torch.ones(8193, dtype=torch.long).to(device)
    yield Call("CE of more rows than a block adds up", lambda s: ops.cross_entropy(s, ones), [many])


def pairwise(device):
    shapes = [
        (2, 3),  # one pair
        (17, 33),  # one row more than a block of angles takes, one column more than a tile of features
        (33, 65),  # one row more than a block of distances takes, one column more than a block of gradients
        (130, 20),  # more pairs than one block of a sum adds up
    ]
    for rows, cols in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            numbers = torch.Generator().manual_seed(rows)
            x, y, teacher = (torch.randn(n, cols, generator=numbers) for n in (rows, rows + 3, rows))
            x[1], teacher[-1] = x[0], teacher[0]  # equal rows
            leaves = [z.to(dtype).to(device).requires_grad_() for z in (x, y)]
            teacher = teacher.to(device)
            functions = {
                "distances of two sets": ops.pairwise_distance,
                "RKD": lambda x, t=teacher: ops.rkd(x, t),
                "RKD distance": lambda x, t=teacher: ops.rkd_distance(x, t),
                "RKD angle": lambda x, t=teacher: ops.rkd_angle(x, t),
            }
            where = f"{rows} x {cols}, {str(dtype).removeprefix('torch.')}"
            for index, (name, function) in enumerate(functions.items()):
                yield Call(f"{name}, {where}", function, leaves[: 1 if index else 2])


def nce(device):
    shapes = [
        (3, 5, 9, 7),  # rows shorter than a vector, more draws than rows
        (2, 300, 20, 50),  # more rows than a warp takes for one anchor
        (2, 5, 1030, 6),  # more features than a warp keeps in registers
    ]
    for batch, negatives, dim, rows in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            numbers = torch.Generator().manual_seed(dim)
            anchors = torch.randn(2, batch, dim, generator=numbers).div(dim**0.5).to(device)
            banks = torch.randn(2, rows, dim, generator=numbers).div(dim**0.5).to(dtype).to(device)
            index = torch.arange(batch).to(device)
            seed, unset, z = (torch.tensor(x).to(device) for x in (1, -1.0, 50.0))

            def step(s, t, banks=banks, index=index, seed=seed, unset=unset, z=z, k=negatives):
                """A step of CRD: draw, score, move a copy of a bank, so that every step is the same."""
                drawn = ops.draw_negatives(index, k, banks.shape[1], seed)
                torch.ops.kdfast.nce_log_sums(s.detach(), t.detach(), *banks, drawn, unset, unset, 0.1)
                loss = ops.nce(s, t, *banks, drawn, z, z, 0.1)
                ops.update_bank(banks[0].clone(), s.detach(), index)
                return loss

            where = f"{batch} x {negatives} x {dim}, {str(dtype).removeprefix('torch.')}"
            yield Call(f"CRD, {where}", step, [x.detach().requires_grad_() for x in anchors])


def maps(device):
    """Of two families: attention maps, and inner products."""
    shapes = [
        (2, 3, 1, 5),  # fewer positions and channels than a vector
        (3, 33, 5, 7),  # one channel more than a tile
        (2, 20, 6, 11),  # positions of three tiles
    ]
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            numbers = torch.Generator().manual_seed(shape[1])
            student, teacher = (torch.randn(shape, generator=numbers).to(dtype).to(device) for _ in range(2))
            rows = [x.flatten(1).requires_grad_() for x in (student, teacher)]
            leaves = [student.requires_grad_(), teacher.requires_grad_()]
            where = f"{' x '.join(map(str, shape))}, {str(dtype).removeprefix('torch.')}"
            for name, function in {
                "AT": ops.attention_transfer,
                "AT of odd power": lambda s, t: ops.attention_transfer(s, t, 3),
                "affinity": ops.affinity,
                "selectivity": lambda s, t: ops.selectivity(s.flatten(2), t.flatten(2)),
                "inner products": lambda s, t: ops.inner_products(s.flatten(2), t.flatten(2)),
            }.items():
                yield Call(f"{name}, {where}", function, leaves)
            for kind, options in {
                "rows": {},
                "rows_absolute": {},
                "distribution": {"eps": 1e-7},
                "polynomial": {"coefficients": (0.5, 0.3, 0.1)},
                "absolute": {"eps": 1e-8},
            }.items():
                compare = functools.partial(ops.gram_distance, kind=kind, **options)
                yield Call(f"Gram, {kind}, {where}", compare, [x.detach().requires_grad_() for x in rows])


def feature(device):
    shapes = [
        (2, 3, 1, 5),  # less than the elements that a thread reads at once
        (3, 33, 5, 7),  # one channel more than a warp has lanes, windows that overlap
        (5, 130, 8, 8),  # more elements of a sample, and more positions, than a block takes
    ]
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                numbers = torch.Generator().manual_seed(shape[1])
                margin = -torch.rand(shape[1], generator=numbers).to(device)
                pair = (torch.randn(shape, generator=numbers).to(dtype) for _ in range(2))
                leaves = [x.to(device, memory_format=memory_format).requires_grad_() for x in pair]
                functions = {
                    "squared error": ops.squared_error,
                    "squared error per channel": ops.channel_squared_error,
                    "partial squared error": lambda s, t, m=margin: ops.partial_squared_error(s, t, m),
                    "partial, none": lambda s, t, m=margin: ops.partial_squared_error(s, t, m, reduction="none"),
                    "normalized error": ops.normalized_error,
                    "normalized squared error": lambda s, t: ops.normalized_error(s, t, 2),
                    "pyramid": ops.pyramid_error,
                }
                where = f"{' x '.join(map(str, shape))}, {str(dtype).removeprefix('torch.')}, {memory_format}"
                for name, function in functions.items():
                    yield Call(f"{name}, {where}", function, leaves)
                boundary = functools.partial(ops.activation_boundary, teacher=leaves[1].detach())
                yield Call(f"boundary, {where}", boundary, leaves[:1])


def ensemble(device):
    shapes = [
        (3, 3, 7),  # less than the eight elements that a thread reads at once
        (5, 9, 33),  # one class more than a warp has lanes, one row more than a block has warps
        (2, 2, 2049),  # the first row that a whole block reads
    ]
    for count, rows, cols in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            numbers = torch.Generator().manual_seed(cols)
            wide = torch.randn(count, rows, cols + 3, generator=numbers).to(dtype).to(device)
            networks = [x[:, 1:-2].detach().requires_grad_() for x in wide]
            mix = torch.randn(rows, count, count, generator=numbers).softmax(2).to(device).requires_grad_()
            labels = torch.randint(cols, (rows,), generator=numbers).to(device)
            ramp, gram = torch.tensor(0.5).to(device), torch.eye(count, dtype=torch.float64).to(device)

            def attention(mix, *z, y=labels, ramp=ramp):
                return ops.mixed_logits_kl(z, mix, y, 3.0, eps=1e-7, ramp=ramp, through_targets=True)

            def gated(mix, *z, y=labels):
                return ops.mixed_logits_kl(z, mix[:, :1], y, 3.0, eps=1e-7, target_ce=True)

            def adaptive(student, *teachers, gram=gram):
                """AE-KD, and the programme that it solves on its own."""
                loss, _ = ops.aekd(student, teachers)
                return loss + 0 * torch.ops.kdfast.simplex_minimum(gram, gram[0], 0.9).sum().to(loss.dtype)

            where = f"{count} x {rows} x {cols}, {str(dtype).removeprefix('torch.')}"
            student, *teachers = networks
            constants = [x.detach() for x in teachers]
            for name, function, leaves in (
                ("attention to mixed logits", attention, [mix, *networks]),
                ("gated logits", gated, [mix, *networks]),
                ("least logits", lambda *z, y=labels: ops.mixed_logits_kl(z, None, y), networks),
                ("teachers", lambda s, *t, y=labels: ops.teachers_kl(s, t, y, 4.0), networks),
                ("mean of teachers", lambda s, *t: ops.teachers_kl(s, t, kind="cross_entropy"), networks),
                (
                    "reverse KL of teachers",
                    lambda s, t=constants: ops.teachers_kl(s, t, kind="reverse_kl"),
                    [student],
                ),
                ("AE-KD", lambda s, t=constants, f=adaptive: f(s, *t), [student]),
            ):
                yield Call(f"{name}, {where}", function, leaves)


def moments(device):
    shapes = [
        (2, 3, 1, 5),  # less than the elements that a thread reads at once
        (3, 33, 5, 7),  # one channel more than a warp has lanes
        (5, 2, 17, 19),  # more positions than a block takes
        (3, 1, 105, 105),  # more elements of a channel than a block takes
    ]
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1])).to(dtype)
                leaf = x.to(device, memory_format=memory_format).requires_grad_()
                where = f"{' x '.join(map(str, shape))}, {str(dtype).removeprefix('torch.')}, {memory_format}"
                yield Call(f"moments, {where}", ops.channel_moments, [leaf])


FAMILIES = {
    "ensemble": ensemble,
    "softmax_kl": softmax_kl,
    "pairwise": pairwise,
    "nce": nce,
    "attention and gram": maps,
    "feature": feature,
    "moments": moments,
}


def calls(device):
    """All calls of all families."""
    return [call for family in FAMILIES.values() for call in family(device)]


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
