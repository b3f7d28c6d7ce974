"""Random shapes, strides, dtypes, parameters and extreme values through fallback and CPU kernel, against the oracles.

Every run draws the same trials. A new family adds its function of a `draw` to FAMILIES.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import oracles
import pytest
import torch
from conftest import assert_close, require_cpu_kernels

import kdfast
from kdfast import ops

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

EXAMPLES = 300  # of each family: some 20 seconds
INF = float("inf")
# An exponential below the smallest normal number may be 0, before temperature, log-ratio and upstream multiply it.
UNDERFLOW = 1e-26  # as a size: 1e-33 of tolerance, beside which no gradient matters
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class Trial:
    """One drawn call: `call(ops or oracles, *inputs)` gives one value per row, or their sum if `reduced`.

    `sizes(*inputs)` is the magnitude of what the call adds up, as in oracles.py: of each row [rows] or of their sum,
    and of the entries of a gradient, one for all inputs or one for each. What is not finite there is not compared.
    """

    inputs: list
    call: Callable
    sizes: Callable
    reduced: bool
    upstream: torch.Tensor


# ---- tensors ---------------------------------------------------------------------------------------------------------
def draw_matrix(draw, rows, cols, dtype):
    """Numbers of any magnitude that the dtype can hold, some of them rows or columns of the same."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1), label="seed"))
    scale = draw(st.sampled_from([3.0, 1.0, 0.0, 1e-3, 40.0, 1e4, 6e4]), label="scale")
    offset = draw(st.sampled_from([0.0, 0.0, 0.0, 100.0, -1e4, 1e6]), label="offset")
    x = torch.randn(rows, cols, dtype=torch.float64, generator=generator)
    x = (x.sign() if scale == 6e4 else x) * scale + offset
    if rows > 1 and draw(st.booleans(), label="equal rows"):
        x[-1] = x[0]
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


def lay_out(draw, x):
    """The same numbers (of one row or column, where it is expanded) with drawn strides, and NaN between them.

    The memory ends with the last element, so that a sanitizer sees what reads on.
    """
    rows, cols = x.shape
    inner, gap, offset = (draw(st.integers(0, 3), label=name) for name in ("inner stride", "gap", "offset"))
    order = draw(st.sampled_from(["rows", "rows", "columns", "one row", "one column"]), label="layout")
    row_stride, col_stride = cols * (1 + inner) + gap, 1 + inner
    if order == "columns":
        row_stride, col_stride = 1 + inner, rows * (1 + inner) + gap
    elif order == "one row":
        x, row_stride = x[:1].expand_as(x), 0
    elif order == "one column":
        x, col_stride = x[:, :1].expand_as(x), 0
    last = max(rows - 1, 0) * row_stride + (cols - 1) * col_stride
    memory = torch.full((offset + last + 1,), float("nan"), dtype=x.dtype)
    view = memory.as_strided((rows, cols), (row_stride, col_stride), offset)
    memory[(torch.arange(rows)[:, None] * row_stride + torch.arange(cols) * col_stride + offset).flatten()] = (
        x.flatten()
    )
    assert torch.equal(view, x)
    return view


def draw_column(draw, values):
    """[rows] numbers, contiguous or every second element."""
    step = draw(st.integers(1, 2), label="step")
    return torch.stack([values] * step, 1)[:, -1]


def draw_upstream(draw):
    return torch.tensor(draw(st.sampled_from([1.0, -3.0, 0.0, 1e-3]), label="upstream"))


# ---- families --------------------------------------------------------------------------------------------------------
def draw_logits(draw):
    """A student and a teacher: unrelated, nearly equal or equal, with impossible classes in one or in both."""
    rows = draw(st.integers(0, 6), label="rows")
    cols = draw(st.one_of(st.integers(1, 40), st.sampled_from([1023, 1024, 1025, 2049])), label="cols")
    dtype = draw(st.sampled_from(FLOATS), label="student dtype")
    teacher_dtype = draw(st.sampled_from([dtype, *FLOATS]), label="teacher dtype")
    student = draw_matrix(draw, rows, cols, dtype)
    teacher = draw_matrix(draw, rows, cols, teacher_dtype)
    relation = draw(st.sampled_from(["unrelated", "unrelated", "equal", "near"]), label="relation")
    if relation != "unrelated":
        noise = 0 if relation == "equal" else 1e-3 * torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
        largest = torch.finfo(teacher_dtype).max
        teacher = (student.double() + noise).clamp(-largest, largest).to(teacher_dtype)
    for side, share in (("student", [student]), ("teacher", [teacher]), ("both", [student, teacher])):
        where = draw(st.sampled_from([None, None, None, "a class", "classes of a row", "a row"]), label=f"-inf: {side}")
        for x in share if rows and where else []:
            if where == "a row":
                x[rows // 2] = -INF
            else:
                x[rows // 2 if where == "classes of a row" else slice(None), cols // 3 :: 3] = -INF
    return lay_out(draw, student), lay_out(draw, teacher)


def draw_softmax_kl(draw):
    student, teacher = draw_logits(draw)
    rows, cols = student.shape
    numbers = torch.Generator().manual_seed(rows + cols)
    temperature = draw(st.sampled_from([1.0, 4.0, 0.5, 20.0, 0.05, 1e-3]), label="temperature")
    reduction = draw(st.sampled_from(["none", "sum", "batchmean"]), label="reduction")
    labels = draw_column(draw, torch.randint(cols, (rows,), generator=numbers))
    ops_of_logits = ["softmax_kl", "softmax_kl_topk", "cross_entropy_kl", "cross_entropy", "dkd"]
    op = draw(st.sampled_from(ops_of_logits), label="op")
    mean = 1 / max(rows, 1)
    share = mean if reduction == "batchmean" else 1.0
    inputs = [student, teacher]

    if op == "softmax_kl":
        beta = draw(st.sampled_from([0.0, 1.0, 0.5, 0.1, 1e-3]), label="beta")
        weight = draw(st.sampled_from([None, torch.float32, torch.float16]), label="weight")
        if weight is not None:
            weight = draw_column(draw, torch.rand(rows, generator=numbers).mul(3).floor().to(weight))

        def call(o, s, t):
            return o.softmax_kl(s, t, temperature, beta=beta, weight=weight, reduction=reduction)

        def sizes(s, t):
            factor = share * (torch.ones(rows) if weight is None else weight).double()
            by_row, entries = oracles.sizes_kl(s, t, temperature)
            return factor * by_row, factor[:, None] * entries

    elif op == "softmax_kl_topk":
        k = draw(st.one_of(st.integers(1, min(cols, 9)), st.just(cols)), label="k")
        top = ops.TopK.of(teacher.double(), k, temperature)
        rest = None if draw(st.booleans(), label="no rest") else draw_column(draw, top.rest.float())
        top = (lay_out(draw, top.values.to(teacher.dtype)), top.indices, rest, temperature)
        inputs = [student]

        def call(o, s, t):
            return o.softmax_kl(s, top, temperature, reduction=reduction)

        def sizes(s, t):
            return [share * x for x in oracles.sizes_topk(s, top, temperature)]

    elif op == "dkd":
        reduction = "batchmean"

        def call(o, s, t):
            return o.dkd(s, t, labels, temperature, alpha=1.0, beta=2.0)

        def sizes(s, t):
            return tuple(2 * mean * x for x in oracles.sizes_dkd(s, t, labels, temperature))

    else:
        smoothing = draw(st.sampled_from([0.0, 0.1, 1.0]), label="smoothing")
        ignored = draw(st.booleans(), label="ignored rows")
        if draw(st.booleans(), label="soft labels"):
            labels = torch.rand(rows, cols, generator=numbers) ** 4
            labels = lay_out(draw, (labels / labels.sum(1, keepdim=True)).to(student.dtype))
            kept = rows
        else:
            if ignored:
                labels[::2] = -100
            kept = int((labels >= 0).sum())
        options = {"label_smoothing": smoothing, "reduction": reduction}

        def call(o, s, t):
            if op == "cross_entropy":
                return o.cross_entropy(s, labels, **options)
            return o.cross_entropy_kl(s, t, labels, temperature, kl_weight=0.7, ce_weight=0.3, **options)

        def sizes(s, t):
            ce = [x / (max(kept, 1) if reduction == "batchmean" else 1) for x in oracles.sizes_ce(s, labels)]
            if op == "cross_entropy":
                return ce
            return [share * kl + x for kl, x in zip(oracles.sizes_kl(s, t, temperature), ce, strict=True)]

        inputs = inputs[: 1 if op == "cross_entropy" else 2]

    reduced = reduction != "none"
    scale = draw(st.sampled_from([1.0, -3.0, 0.0, 1e-3]), label="upstream")
    upstream = torch.full(() if reduced else (rows,), scale)
    return Trial(inputs, lambda o, s, t=None: call(o, s, t), lambda s, t=None: sizes(s, t), reduced, upstream)


def draw_pairwise(draw):
    rows = draw(st.one_of(st.integers(0, 9), st.sampled_from([31, 32, 33])), label="rows")
    width = st.one_of(st.integers(1, 20), st.sampled_from([255, 257]))
    student, teacher = (
        lay_out(draw, draw_matrix(draw, rows, draw(width, label="width"), draw(st.sampled_from(FLOATS), label="dtype")))
        for _ in range(2)
    )
    op = draw(st.sampled_from(["rkd_distance", "rkd_angle", "rkd"]), label="op")
    upstream = draw_upstream(draw)

    def sizes(student):
        parts = [oracles.sizes_rkd_distance(student, teacher), oracles.sizes_rkd_angle(student, teacher)]
        weights = {"rkd_distance": (1, 0), "rkd_angle": (0, 1), "rkd": (25, 50)}[op]
        return [weights[0] * distance + weights[1] * angle for distance, angle in zip(*parts, strict=True)]

    return Trial([student], lambda o, s: getattr(o, op)(s, teacher), sizes, True, upstream)


# The ops of maps: call(ops or oracles, student, teacher, margin, reduction).
FEATURES = {
    "squared_error": lambda o, s, t, m, r: o.squared_error(s, t),
    "channel_squared_error": lambda o, s, t, m, r: o.channel_squared_error(s, t).sum(),
    "activation_boundary": lambda o, s, t, m, r: o.activation_boundary(s, t, 0.5, reduction=r),
    "partial_squared_error": lambda o, s, t, m, r: o.partial_squared_error(s, t, m, reduction=r),
    "normalized_error": lambda o, s, t, m, r: o.normalized_error(s, t),
    "normalized_error, 2": lambda o, s, t, m, r: o.normalized_error(s, t, 2),
    "pyramid_error": lambda o, s, t, m, r: o.pyramid_error(s, t),
}


def draw_feature(name, draw):
    """Maps that lie as rows, channel after channel or position after position."""
    rows = draw(st.sampled_from([2, 3, 4, 1, 0]), label="rows")
    channels = draw(st.one_of(st.integers(1, 5), st.just(33)), label="channels")
    height, width = (draw(st.integers(1, 9), label=name) for name in ("height", "width"))
    dtype = draw(st.sampled_from(FLOATS), label="student dtype")
    teacher_dtype = draw(st.sampled_from([dtype, *FLOATS]), label="teacher dtype")
    student, teacher = (draw_matrix(draw, rows, channels * height * width, d) for d in (dtype, teacher_dtype))
    if draw(st.booleans(), label="near"):
        noise = 1e-3 * torch.randn(student.shape, generator=torch.Generator().manual_seed(0))
        largest = torch.finfo(teacher_dtype).max
        teacher = (student.double() + noise).clamp(-largest, largest).to(teacher_dtype)
    by_channel = draw(st.booleans(), label="channels_last")
    margin = -torch.rand(channels, generator=torch.Generator().manual_seed(rows))
    reduction = "sum"
    if name in ("activation_boundary", "partial_squared_error"):
        reduction = draw(st.sampled_from(["none", "sum", "mean"]), label="reduction")

    def maps(x):
        if by_channel:
            return x.unflatten(1, (height, width, channels)).movedim(-1, 1)
        return x.unflatten(1, (channels, height, width))

    def as_rows(x):
        return (x.movedim(1, -1) if by_channel else x).flatten(1)

    def call(o, s, t):
        return FEATURES[name](o, maps(s), maps(t), margin, reduction)

    def sizes(s, t):
        leaves = [x.detach().double().requires_grad_() for x in (s, t)]
        if name == "pyramid_error":
            value, *entries = oracles.sizes_pyramid(*map(maps, leaves))
        elif name.startswith("normalized_error"):
            power = 1 if name == "normalized_error" else 2
            value, *entries = oracles.sizes_normalized(*map(maps, leaves), power)
        else:  # each term is exact up to a rounding of itself
            value = call(oracles, *leaves)
            grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
            return value.detach(), *(g.abs() for g in grads if g is not None)
        entries = [as_rows(x) for x in entries]
        if name == "normalized_error":
            # The sign of a difference that is smaller than its rounding may be any, and all of a sample depend on it.
            units = [torch.nn.functional.normalize(x.detach(), dim=1) for x in leaves]
            unclear = (units[0] - units[1]).abs() <= 1e-5 * (units[0].abs() + units[1].abs())
            entries = [x.masked_fill(unclear.any(1, keepdim=True), INF) for x in entries]
        return value, *entries

    student, teacher = lay_out(draw, student), lay_out(draw, teacher)
    scale = draw(st.sampled_from([1.0, -3.0, 0.0, 1e-3]), label="upstream")
    upstream = torch.full((rows,) if reduction == "none" else (), scale)
    reduced = reduction != "none"
    if name == "activation_boundary":  # no gradient to the teacher
        return Trial([student], lambda o, s: call(o, s, teacher), lambda s: sizes(s, teacher), reduced, upstream)
    return Trial([student, teacher], call, sizes, reduced, upstream)


def without_turned_signs(entries, matrix, other):
    """No size for gradients of absolute differences of two matrices [..., n, n] that rounding may turn around."""
    gap = (matrix - other).abs().detach()
    gap = gap.masked_fill(torch.eye(gap.shape[-1], dtype=torch.bool), INF)  # a cosine of a row with itself is constant
    return [torch.full_like(e, INF) for e in entries] if (gap < 1e-5).any() else entries


def draw_gram(draw):
    rows = draw(st.one_of(st.integers(0, 9), st.sampled_from([31, 33, 65])), label="rows")
    width = st.one_of(st.integers(1, 20), st.sampled_from([255, 257]))
    inputs = [
        lay_out(draw, draw_matrix(draw, rows, draw(width, label="width"), draw(st.sampled_from(FLOATS), label="dtype")))
        for _ in range(2)
    ]
    kinds = ["rows", "rows_absolute", "distribution", "polynomial", "absolute", "affinity"]
    kind = draw(st.sampled_from(kinds), label="kind")
    if kind == "affinity":  # a sample of so many positions, in rows of a map
        inputs = [x.t()[None, :, None] for x in inputs]
        if not rows:
            inputs = [x.new_zeros(0, x.shape[1], 1, 2) for x in inputs]

        def sizes(*pair):
            value, *entries = oracles.sizes_affinity(*pair)
            units = [oracles._cosines_of_rows(x.double().flatten(2).transpose(1, 2), 1e-8) for x in pair]
            return value, *without_turned_signs(entries, *units)

        return Trial(inputs, lambda o, s, t: o.affinity(s, t), sizes, reduced=True, upstream=draw_upstream(draw))
    options = {"kind": kind, "eps": draw(st.sampled_from([1e-7, 1e-3] if kind == "distribution" else [0.0, 1e-8]))}
    if kind == "polynomial":
        options["coefficients"] = draw(st.lists(st.sampled_from([0.5, -1.0, 0.1]), min_size=1, max_size=5))

    def sizes(*pair):
        value, *entries = oracles.sizes_gram(*pair, **options)
        if kind.startswith("rows"):
            # A row that is 0 has no gradient: the formula divides by the floor of its norm.
            nothing = [(x == 0).all(-1, keepdim=True) for x in pair]
            entries = [torch.where(n, INF, e) for n, e in zip(nothing, entries, strict=True)]
        if kind == "rows_absolute":
            entries = without_turned_signs(entries, *(oracles._normal_rows(x.double()) for x in pair))
        elif kind == "absolute":
            entries = without_turned_signs(
                entries, *(oracles._cosines_of_rows(x.double(), options["eps"]) for x in pair)
            )
        return value, *entries

    return Trial(inputs, lambda o, s, t: o.gram_distance(s, t, **options), sizes, True, draw_upstream(draw))


def draw_attention(draw):
    batch, height = draw(st.integers(0, 3), label="batch"), draw(st.integers(1, 4), label="height")
    width = draw(st.one_of(st.integers(1, 9), st.sampled_from([255, 257])), label="width")
    last = draw(st.booleans(), label="channels last")
    inputs = []
    for _ in range(2):
        channels = draw(st.one_of(st.integers(1, 9), st.sampled_from([33, 65])), label="channels")
        dtype = draw(st.sampled_from(FLOATS), label="dtype")
        sizes = (batch, height, width, channels) if last else (batch, channels, height, width)
        x = lay_out(draw, draw_matrix(draw, math.prod(sizes[:-1]), sizes[-1], dtype)).unflatten(0, sizes[:-1])
        inputs.append(x.movedim(-1, 1) if last else x)
    power = draw(st.integers(1, 4), label="power")
    return Trial(
        inputs,
        lambda o, s, t: o.attention_transfer(s, t, power),
        lambda s, t: oracles.sizes_attention(s, t, power),
        reduced=True,
        upstream=draw_upstream(draw),
    )


def draw_nce(draw):
    rows = draw(st.integers(0, 9), label="rows")
    cols = draw(st.one_of(st.integers(1, 40), st.sampled_from([128, 257])), label="cols")
    n_data = draw(st.sampled_from([1, 7, 300]), label="n_data")
    negatives = draw(st.one_of(st.integers(1, 9), st.sampled_from([255, 257])), label="negatives")

    def unit(n):
        x = draw_matrix(draw, n, cols, torch.float64)
        x = x / x.norm(dim=1, keepdim=True).clamp(min=1e-300)
        return lay_out(draw, x.to(draw(st.sampled_from(FLOATS), label="dtype")))

    anchors, banks = [unit(rows), unit(rows)], [unit(n_data), unit(n_data)]
    index = torch.randint(n_data, (rows, negatives + 1), generator=torch.Generator().manual_seed(rows + cols))
    constants = [torch.tensor(draw(st.floats(1e-3, 1e6), label="Z"), dtype=torch.float64) for _ in range(2)]
    temperature = draw(st.sampled_from([0.07, 1.0, 0.02]), label="temperature")
    return Trial(
        anchors,
        lambda o, s, t: o.nce(s, t, *banks, index, *constants, temperature),
        lambda s, t: oracles.sizes_nce(s, t, *banks, index, *constants, temperature),
        reduced=True,
        upstream=draw_upstream(draw),
    )


def draw_ensemble(draw):
    """A few networks, one of them perhaps equal to another, and classes that all of them mask."""
    rows = draw(st.integers(0, 5), label="rows")
    cols = draw(st.one_of(st.integers(1, 40), st.sampled_from([1023, 1024, 1025, 2049])), label="cols")
    dtype = draw(st.sampled_from(FLOATS), label="dtype")
    count = draw(st.integers(1, 4), label="networks")
    networks = [draw_matrix(draw, rows, cols, dtype) for _ in range(count)]
    if count > 1 and draw(st.booleans(), label="equal networks"):
        networks[1] = networks[0].clone()
    masked = torch.zeros(cols, dtype=torch.bool)
    if draw(st.booleans(), label="masked classes"):
        masked[cols // 3 :: 3] = cols > 2
    numbers = torch.Generator().manual_seed(rows + cols)
    allowed = (~masked).nonzero()[:, 0]
    labels = allowed[torch.randint(len(allowed), (rows,), generator=numbers)]
    for x in networks:
        x[:, masked] = -INF
    temperature = draw(st.sampled_from([1.0, 3.0, 4.0, 0.5, 20.0, 0.05]), label="temperature")
    op = draw(st.sampled_from(["mixed", "kl", "cross_entropy"]), label="op")
    mix = torch.randn(rows, count, count, generator=numbers).softmax(2)
    learners = draw(st.integers(1, count), label="learners")
    one_target = draw(st.booleans(), label="one target")
    eps = draw(st.sampled_from([0.0, 1e-7, 1e-3]), label="eps")
    upstream = torch.tensor(draw(st.sampled_from([1.0, -3.0, 0.0, 1e-3]), label="upstream"))
    mix = mix[:, : 1 if one_target else learners]
    options = {"eps": eps, "ramp": 0.6, "learners": learners, "through_targets": True, "target_ce": one_target}

    def kept(z):
        """The classes that exist: the oracle knows of no others."""
        return [x[:, ~masked] for x in z], torch.searchsorted(allowed, labels)

    def call(o, *z):
        z, y = kept(z) if o is oracles else (z, labels)
        if op == "mixed":
            return o.mixed_logits_kl(z, mix, y, temperature, **options)
        return o.teachers_kl(z[0], z[1:] or [z[0].detach()], y, temperature, kind=op)

    def sizes(*z):
        z, y = kept(z)
        if op == "mixed":
            value, entries, _ = oracles.sizes_mixed_logits_kl(z, mix, y, temperature, **options)
        else:
            value, own, each = oracles.sizes_teachers_kl(z[0], z[1:] or [z[0]], y, temperature, kind=op)
            entries = torch.stack([own, *each][:count])
        full = entries.new_zeros(count, rows, cols)
        full[:, :, ~masked] = entries
        return value, full.amax(0)

    if not masked.any():  # a layout may repeat one column
        networks = [lay_out(draw, x) for x in networks]
    return Trial(networks, call, sizes, True, upstream)


def draw_moments(draw):
    """Maps as in `draw_feature`; one number of all moments."""
    rows = draw(st.sampled_from([2, 3, 4, 1, 0]), label="rows")
    channels = draw(st.one_of(st.integers(1, 5), st.just(33)), label="channels")
    positions = draw(st.one_of(st.integers(1, 70), st.sampled_from([1023, 1025, 2049])), label="positions")
    dtype = draw(st.sampled_from(FLOATS), label="dtype")
    x = lay_out(draw, draw_matrix(draw, rows, channels * positions, dtype))
    by_channel = draw(st.booleans(), label="channels_last")
    of_mean, of_variance = (draw(st.sampled_from([1.0, -3.0, 0.0]), label=name) for name in ("mean", "variance"))

    def maps(x):
        return x.unflatten(1, (positions, channels)).movedim(-1, 1) if by_channel else x.unflatten(1, (channels, -1))

    def call(o, x):
        mean, variance = o.channel_moments(maps(x)).sum(1)
        return of_mean * mean + of_variance * variance

    def sizes(x):
        upstream = torch.tensor([[of_mean], [of_variance]]).expand(2, channels)
        values, entries = oracles.sizes_moments(maps(x), upstream)
        size = abs(of_mean) * values[0] + abs(of_variance) * values[1]
        return size, (entries.movedim(1, -1) if by_channel else entries).flatten(1)

    return Trial([x], call, sizes, True, torch.tensor(draw(st.sampled_from([1.0, -3.0, 0.0, 1e-3]), label="upstream")))


FAMILIES = {
    "ensemble": draw_ensemble,
    "softmax_kl": draw_softmax_kl,
    "pairwise": draw_pairwise,
    "gram": draw_gram,
    "attention": draw_attention,
    "nce": draw_nce,
    "moments": draw_moments,
    **{f"feature-{name}": functools.partial(draw_feature, name) for name in FEATURES},
}


# ---- the check -------------------------------------------------------------------------------------------------------
def run(trial, module, inputs):
    """-> the value and the gradients in all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = trial.call(module, *leaves)
    return value.detach(), *torch.autograd.grad(value, leaves, trial.upstream.to(value.dtype))


def compare(got, want, size, cols, what):
    """`got` against the oracle's `want` where that is a number, and one that the dtype of `got` can hold.

    To float32's precision also where an op works in float64, as the oracle does, which loses digits itself: extreme
    numbers cost the formulas more of them than the ops.
    """
    assert not got.isnan().any(), f"{what} has NaN"
    size = size + UNDERFLOW
    known = want.isfinite() & size.isfinite() & (want.abs() < 0.999 * torch.finfo(got.dtype).max)
    assert_close(*(torch.where(known, x, 0) for x in (got, want, size.expand_as(want))), cols, torch.float32, what)


@pytest.mark.parametrize("family", FAMILIES)
def test_fuzz(family):
    require_cpu_kernels()

    @settings(
        max_examples=EXAMPLES // (len(FEATURES) if family.startswith("feature") else 1),
        deadline=None,
        derandomize=True,
        report_multiple_bugs=False,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data):
        trial = FAMILIES[family](data.draw)
        exact = run(trial, oracles, [x.double() for x in trial.inputs])
        value_size, *entries = trial.sizes(*trial.inputs)
        upstream = trial.upstream.abs().double()
        scale = upstream[:, None] if upstream.dim() else upstream
        sizes = [value_size.sum() if trial.reduced else value_size]
        sizes += [scale * x for x in (entries if len(entries) > 1 else entries * len(trial.inputs))]
        with kdfast.fallback():
            results = {"fallback": run(trial, ops, trial.inputs)}
        results["kernel"] = run(trial, ops, trial.inputs)
        cols = max(math.prod(x.shape[1:]) for x in trial.inputs)
        for name, (value, *grads) in results.items():
            told = ~exact[0].isnan()
            assert torch.equal((value == INF)[told], (exact[0] == INF)[told]), f"{name}: {value}, expected {exact[0]}"
            compare(value, exact[0], sizes[0], cols, f"{name}: value")
            for index, (got, want, size) in enumerate(zip(grads, exact[1:], sizes[1:], strict=True)):
                compare(got, want, size, cols, f"{name}: gradient in input {index}")
        for one, other in zip(*results.values(), strict=True):
            assert torch.equal(one.isinf(), other.isinf()), f"infinities of the fallback {one}, of the kernel {other}"

    check()
