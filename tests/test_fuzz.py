"""Random shapes, strides, dtypes, parameters and extreme values through fallback and CPU kernel, against the oracles.

Every run draws the same trials, of the ops of tests/registry/: by the function of a `draw` that is written for an op's
numbers, or else by `draw_op`.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import oracles
import pytest
import registry
import torch
from conftest import assert_close, require_cpu_kernels
from registry import Inputs

import kdfast
from kdfast import ops

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

EXAMPLES = 300  # of each family, and of each op that `draw_op` draws: some 5 to 20 seconds
INF = float("inf")
# An exponential below the smallest normal number may be 0, before temperature, log-ratio and upstream multiply it.
UNDERFLOW = 1e-26  # as a size: 1e-33 of tolerance, beside which no gradient matters
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LARGEST = 40_000  # elements of a case that is drawn near


@dataclass
class Trial:
    """One drawn call: an op of the registry, its inputs, and the upstream gradient, one number for all entries."""

    op: registry.Op
    x: Inputs
    upstream: float | torch.Tensor
    unclear: Callable = lambda x, entries: entries  # sizes of gradients, infinite where they cannot be compared
    classes: torch.Tensor | None = None  # that exist: the oracle knows of no others
    temperature: float | None = None  # of softmaxes by which a value is finite or not


# ---- tensors ---------------------------------------------------------------------------------------------------------
def draw_matrix(draw, rows, cols, dtype):
    """Numbers of any magnitude that the dtype can hold, some of them rows or columns of the same."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1), label="seed"))
    return scaled(draw, torch.randn(rows, cols, dtype=torch.float64, generator=generator), dtype)


def scaled(draw, x, dtype):
    """Numbers of any magnitude that the dtype can hold in place of those of x, which are near 1."""
    scale = draw(st.sampled_from([3.0, 1.0, 0.0, 1e-3, 40.0, 1e4, 6e4]), label="scale")
    offset = draw(st.sampled_from([0.0, 0.0, 0.0, 100.0, -1e4, 1e6]), label="offset")
    x = (x.double().sign() if scale == 6e4 else x.double()) * scale + offset
    if len(x) > 1 and draw(st.booleans(), label="equal rows"):
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
    return draw(st.sampled_from([1.0, -3.0, 0.0, 1e-3]), label="upstream")


def draw_dtype(draw, label="dtype", first=()):
    return draw(st.sampled_from([*first, *FLOATS]), label=label)


def near(x, dtype):
    """Numbers close to those of x."""
    noise = 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    largest = torch.finfo(dtype).max
    return (x.double() + noise).clamp(-largest, largest).to(dtype)


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
        largest = torch.finfo(teacher_dtype).max
        same = student.double().clamp(-largest, largest).to(teacher_dtype)
        teacher = same if relation == "equal" else near(student, teacher_dtype)
    for side, share in (("student", [student]), ("teacher", [teacher]), ("both", [student, teacher])):
        where = draw(st.sampled_from([None, None, None, "a class", "classes of a row", "a row"]), label=f"-inf: {side}")
        for x in share if rows and where else []:
            if where == "a row":
                x[rows // 2] = -INF
            else:
                x[rows // 2 if where == "classes of a row" else slice(None), cols // 3 :: 3] = -INF
    return lay_out(draw, student), lay_out(draw, teacher)


def draw_softmax_kl(draw):
    of = registry.family("softmax_kl")
    logits, kept_classes = of.GROUPS
    student, teacher = draw_logits(draw)
    rows, cols = student.shape
    numbers = torch.Generator().manual_seed(rows + cols)
    temperature = draw(st.sampled_from([1.0, 4.0, 0.5, 20.0, 0.05, 1e-3]), label="temperature")
    reduction = draw(st.sampled_from(["none", "sum", "batchmean"]), label="reduction")
    labels = draw_column(draw, torch.randint(cols, (rows,), generator=numbers))
    x = Inputs(student=student, teacher=teacher, labels=labels)
    kinds = ["softmax_kl", "softmax_kl_topk", "cross_entropy_kl", "cross_entropy", "dkd"]
    kind = draw(st.sampled_from(kinds), label="op")
    if kind == "softmax_kl":
        beta = draw(st.sampled_from([0.0, 1.0, 0.5, 0.1, 1e-3]), label="beta")
        weight = draw(st.sampled_from([None, torch.float32, torch.float16]), label="weight")
        if weight is not None:
            x.weight = draw_column(draw, torch.rand(rows, generator=numbers).mul(3).floor().to(weight))
        op = of.softmax_kl(kind, temperature, beta, weight is not None, reduction)
    elif kind == "softmax_kl_topk":
        k = draw(st.one_of(st.integers(1, min(cols, 9)), st.just(cols)), label="k")
        top = ops.TopK.of(teacher.double(), k, temperature)
        has_rest = not draw(st.booleans(), label="no rest")
        rest = draw_column(draw, top.rest.float()) if has_rest else top.rest
        values = lay_out(draw, top.values.to(teacher.dtype))
        x = Inputs(student=student, values=values, rest=rest, indices=top.indices, weight=rest)
        op = kept_classes.bound(of.top_k(kind, temperature, has_rest, reduction=reduction))
        return Trial(op, x, draw_upstream(draw))
    elif kind == "dkd":
        op = of.dkd(kind, temperature)
    else:
        smoothing = draw(st.sampled_from([0.0, 0.1, 1.0]), label="smoothing")
        ignored = draw(st.booleans(), label="ignored rows")
        targets = "labels"
        if draw(st.booleans(), label="soft labels"):
            targets = "probabilities"
            soft = torch.rand(rows, cols, generator=numbers) ** 4
            x.probabilities = lay_out(draw, (soft / soft.sum(1, keepdim=True)).to(student.dtype))
        elif ignored:
            labels[::2] = -100
        if kind == "cross_entropy":
            op = of.cross_entropy(kind, targets, smoothing, reduction)
        else:
            op = of.cross_entropy_kl(kind, targets, temperature, 0.7, 0.3, smoothing, reduction)
    of_softmax = temperature if kind in ("softmax_kl", "cross_entropy_kl") else None
    return Trial(logits.bound(op), x, draw_upstream(draw), temperature=of_softmax)


def draw_pair(draw, rows, widths):
    """Rows of a student and of a teacher."""
    return Inputs(
        (name, lay_out(draw, draw_matrix(draw, rows, draw(widths, label="width"), draw_dtype(draw))))
        for name in ("student", "teacher")
    )


def draw_feature(name, draw):
    """Maps that lie as rows, channel after channel or position after position."""
    of = registry.family("feature")
    rows = draw(st.sampled_from([2, 3, 4, 1, 0]), label="rows")
    channels = draw(st.one_of(st.integers(1, 5), st.just(33)), label="channels")
    height, width = (draw(st.integers(1, 9), label=name) for name in ("height", "width"))
    dtype = draw_dtype(draw, "student dtype")
    teacher_dtype = draw_dtype(draw, "teacher dtype", [dtype])
    student, teacher = (draw_matrix(draw, rows, channels * height * width, d) for d in (dtype, teacher_dtype))
    if draw(st.booleans(), label="near"):
        teacher = near(student, teacher_dtype)
    by_channel = draw(st.booleans(), label="channels_last")

    def maps(x):
        if by_channel:
            return x.unflatten(1, (height, width, channels)).movedim(-1, 1)
        return x.unflatten(1, (channels, height, width))

    def unclear(x, entries):
        """The sign of a difference that is smaller than its rounding may be any, and all of a sample depend on it."""
        if name != "normalized":
            return entries
        units = [torch.nn.functional.normalize(t.flatten(1), dim=1) for t in (x.student, x.teacher)]
        rounded = (units[0] - units[1]).abs() <= 1e-5 * (units[0].abs() + units[1].abs())
        rounded = rounded.any(1).view(-1, 1, 1, 1)
        return [e.masked_fill(rounded, INF) for e in entries]

    op = of.GROUPS[0][name]
    if name in ("boundary", "partial"):
        reduction = draw(st.sampled_from(["none", "sum", "mean"]), label="reduction")
        made = of.boundary(name, 0.5, reduction) if name == "boundary" else of.partial(name, reduction)
        op = of.GROUPS[0].bound(made)
    margin = -torch.rand(channels, generator=torch.Generator().manual_seed(rows))
    x = Inputs(student=maps(lay_out(draw, student)), teacher=maps(lay_out(draw, teacher)), margin=margin)
    return Trial(op, x, draw_upstream(draw), unclear)


def turned_signs(entries, matrix, other):
    """No size for gradients of absolute differences of two matrices [..., n, n] that rounding may turn around."""
    gap = (matrix - other).abs().detach()
    gap = gap.masked_fill(torch.eye(gap.shape[-1], dtype=torch.bool), INF)  # a cosine of a row with itself is constant
    return [torch.full_like(e, INF) for e in entries] if (gap < 1e-5).any() else entries


def draw_gram(draw):
    of = registry.family("gram")
    rows = draw(st.one_of(st.integers(0, 9), st.sampled_from([31, 33, 65])), label="rows")
    x = draw_pair(draw, rows, st.one_of(st.integers(1, 20), st.sampled_from([255, 257])))
    kinds = ["rows", "rows_absolute", "distribution", "polynomial", "absolute", "affinity"]
    kind = draw(st.sampled_from(kinds), label="kind")
    if kind == "affinity":  # a sample of so many positions, in rows of a map
        x = registry.mapped(x, lambda name, t: t.t()[None, :, None] if rows else t.new_zeros(0, t.shape[1], 1, 2))

        def unclear(x, entries):
            units = (oracles._cosines_of_rows(t.flatten(2).transpose(1, 2), 1e-8) for t in x.values())
            return turned_signs(entries, *units)

        return Trial(of.GROUPS[1]["affinity"], x, draw_upstream(draw), unclear)
    if kind.startswith("rows"):  # of a sample alone it is 0, whatever the formula says of zeros
        assume(rows != 1 or all(t.any() for t in x.values()))
    options = {"kind": kind, "eps": draw(st.sampled_from([1e-7, 1e-3] if kind == "distribution" else [0.0, 1e-8]))}
    if kind == "polynomial":
        options["coefficients"] = draw(st.lists(st.sampled_from([0.5, -1.0, 0.1]), min_size=1, max_size=5))

    def unclear(x, entries):
        if kind.startswith("rows"):
            # A row that is 0 has no gradient: the formula divides by the floor of its norm.
            nothing = [(t == 0).all(-1, keepdim=True) for t in x.values()]
            entries = [torch.where(n, INF, e) for n, e in zip(nothing, entries, strict=True)]
        if kind == "rows_absolute":
            return turned_signs(entries, *map(oracles._normal_rows, x.values()))
        if kind == "absolute":
            return turned_signs(entries, *(oracles._cosines_of_rows(t, options["eps"]) for t in x.values()))
        return entries

    return Trial(of.GROUPS[0].bound(of.gram_distance(kind, **options)), x, draw_upstream(draw), unclear)


def draw_nce(draw):
    of = registry.family("nce")
    rows = draw(st.integers(0, 9), label="rows")
    cols = draw(st.one_of(st.integers(1, 40), st.sampled_from([128, 257])), label="cols")
    n_data = draw(st.sampled_from([1, 7, 300]), label="n_data")
    negatives = draw(st.one_of(st.integers(1, 9), st.sampled_from([255, 257])), label="negatives")

    def unit(n):
        x = draw_matrix(draw, n, cols, torch.float64)
        x = x / x.norm(dim=1, keepdim=True).clamp(min=1e-300)
        return lay_out(draw, x.to(draw_dtype(draw)))

    x = Inputs(student=unit(rows), teacher=unit(rows), bank_student=unit(n_data), bank_teacher=unit(n_data))
    generator = torch.Generator().manual_seed(rows + cols)
    x.contrast_index = torch.randint(n_data, (rows, negatives + 1), generator=generator)
    for name in ("z_student", "z_teacher"):
        x[name] = torch.tensor(draw(st.floats(1e-3, 1e6), label="Z"), dtype=torch.float64)
    temperature = draw(st.sampled_from([0.07, 1.0, 0.02]), label="temperature")
    return Trial(of.GROUPS[0].bound(of.nce(temperature)), x, draw_upstream(draw))


def draw_networks(draw):
    """A few networks, one of them perhaps equal to another, and classes that all of them mask. -> also temperature."""
    rows = draw(st.integers(0, 5), label="rows")
    cols = draw(st.one_of(st.integers(1, 40), st.sampled_from([1023, 1024, 1025, 2049])), label="cols")
    dtype = draw_dtype(draw)
    count = draw(st.integers(1, 4), label="networks")
    networks = [draw_matrix(draw, rows, cols, dtype) for _ in range(count)]
    if count > 1 and draw(st.booleans(), label="equal networks"):
        networks[1] = networks[0].clone()
    classes = torch.ones(cols, dtype=torch.bool)
    if draw(st.booleans(), label="masked classes"):
        classes[cols // 3 :: 3] = cols <= 2
    numbers = torch.Generator().manual_seed(rows + cols)
    allowed = classes.nonzero()[:, 0]
    labels = allowed[torch.randint(len(allowed), (rows,), generator=numbers)]
    for x in networks:
        x[:, ~classes] = -INF
    mix = torch.randn(rows, count, count, generator=numbers).softmax(2)
    if classes.all():  # a layout may repeat one column
        networks = [lay_out(draw, x) for x in networks]
    x = Inputs(networks=networks, mix=mix, labels=labels, ramp=torch.tensor(0.6))
    return x, classes, draw(st.sampled_from([1.0, 3.0, 4.0, 0.5, 20.0, 0.05]), label="temperature")


def draw_mixed_logits(draw):
    of = registry.family("mixed_logits")
    x, classes, temperature = draw_networks(draw)
    learners = draw(st.integers(1, len(x.networks)), label="learners")
    one_target = draw(st.booleans(), label="one target")
    options = {"temperature": temperature, "eps": draw(st.sampled_from([0.0, 1e-7, 1e-3]), label="eps")}
    options |= {"through_targets": True, "target_ce": one_target}
    op = of.mixed_logits_kl("mixed", 1 if one_target else learners, learners, ramped=True, **options)
    return Trial(of.GROUPS[0].bound(op), x, draw_upstream(draw), classes=classes)


def draw_teachers(draw):
    of = registry.family("teachers")
    networks, classes, temperature = draw_networks(draw)
    kind = draw(st.sampled_from(["kl", "cross_entropy"]), label="kind")
    x = of.taught(networks)
    if len(networks.networks) == 1:
        x.teachers = [x.student.clone()]
    op = of.GROUPS[0].bound(of.teachers_kl(kind, kind, temperature=temperature, kl_weight=1.0))
    return Trial(op, x, draw_upstream(draw), classes=classes)


# ---- any op ----------------------------------------------------------------------------------------------------------
def placed(draw, t):
    """The same numbers with drawn strides: any leading dimensions as rows, channels before or after positions."""
    channels_last = t.dim() > 2 and draw(st.booleans(), label="channels last")
    t = t.movedim(1, -1) if channels_last else t
    split = draw(st.integers(1, t.dim() - 1), label="dimensions of rows")
    x = lay_out(draw, t.flatten(0, split - 1).flatten(1))
    x = x.unflatten(0, t.shape[:split]).unflatten(-1, t.shape[split:])
    return x.movedim(-1, 1) if channels_last else x


def draw_op(op, draw):
    """Near a shape of the op's group: numbers of any magnitude in its leaves, an upstream gradient for each entry."""
    group = op.group
    shape = draw(st.sampled_from([s for s in group.cases if math.prod(s) <= LARGEST]), label="case")
    shape = [max(1, n + draw(st.integers(-1, 1), label="more")) for n in shape]
    shape[group.batch] *= draw(st.integers(0, 9), label="no rows if 0") > 0
    assume(op.name != "standardized" or math.prod(shape) != shape[1])  # a channel of one value
    torch.manual_seed(draw(st.integers(0, 2**32 - 1), label="seed"))
    x = group.inputs("cpu", tuple(shape), *(draw_dtype(draw) for _ in op.inputs))

    def changed(name, t):
        t = scaled(draw, t, t.dtype) if name in op.leaves else t
        return placed(draw, t) if name in group.layouts and t.dim() > 1 and t.is_floating_point() else t

    x = registry.mapped(x, changed)
    shape = op(ops, x).shape  # the oracle's, which `compare` will have: the op is quicker
    return Trial(op, x, draw_upstream(draw) * torch.randint(-1, 3, shape))


class Names:
    """In place of kdfast.ops: each function gives its name."""

    def __getattr__(self, name):
        return lambda *args, **options: name


# ---- all of them -----------------------------------------------------------------------------------------------------
FEATURES = ("squared", "channels", "boundary", "partial", "normalized", "normalized_2", "pyramid")
FAMILIES = {
    "mixed_logits": draw_mixed_logits,
    "teachers": draw_teachers,
    "softmax_kl": draw_softmax_kl,
    "gram": draw_gram,
    "nce": draw_nce,
    **{f"feature-{name}": functools.partial(draw_feature, name) for name in FEATURES},
}
DRAWN = {  # the functions of kdfast.ops that these draw
    *("activation_boundary", "affinity", "channel_squared_error", "cross_entropy", "cross_entropy_kl", "dkd"),
    *("gram_distance", "mixed_logits_kl", "nce", "normalized_error", "partial_squared_error", "pyramid_error"),
    *("softmax_kl", "squared_error", "teachers_kl"),
}
OPS = {
    str(op): functools.partial(draw_op, op)
    for op in registry.every_op()
    if op(Names(), op.group.inputs("cpu", op.group.tiny)) not in DRAWN
}


# ---- the check -------------------------------------------------------------------------------------------------------
def run(op, module, x, upstream):
    """-> the value and the gradients in all leaves; None where there is none."""
    leaves = [t.detach().requires_grad_() for t in registry.tensors(x, op.leaves)]
    value = op(module, registry.replaced(x, op.leaves, leaves))
    upstream = torch.as_tensor(upstream).to(value.dtype).expand_as(value)
    return value.detach(), *torch.autograd.grad(value, leaves, upstream, allow_unused=True)


def of_classes(x, classes):
    """The inputs with the classes that exist alone."""
    if classes is None or classes.all():
        return x
    allowed = classes.nonzero()[:, 0]
    names = ("networks", "student", "teachers")
    kept = registry.mapped(x, lambda name, t: t[:, classes] if name in names else t)
    return Inputs(kept, labels=torch.searchsorted(allowed, x.labels))


def to_all(t, like, classes):
    """A gradient of those classes as one of all."""
    if t is None or t.shape == like.shape:
        return t
    full = t.new_zeros(like.shape)
    full[:, classes] = t
    return full


def expected(trial):
    """-> (wanted, size) of the value and of each gradient."""
    x = of_classes(registry.widened(trial.x), trial.classes)
    value, *grads = run(trial.op, oracles, x, trial.upstream)
    g = torch.as_tensor(trial.upstream, dtype=torch.float64).abs().expand_as(value)
    size, *entries = trial.op.sizes_of(g, x, value, grads)
    some = [i for i, e in enumerate(entries) if e is not None]
    for i, e in zip(some, trial.unclear(x, [entries[i] for i in some]), strict=True):
        entries[i] = e
    leaves = registry.tensors(trial.x, trial.op.leaves)
    rest = [
        [to_all(t, like, trial.classes) for t in pair]
        for pair, like in zip(zip(grads, entries, strict=True), leaves, strict=True)
    ]
    return (value, size), *rest


def flushed(trial, value):
    """The oracle's value; where it is infinite, that of exponentials which are 0 if the accumulator may have them as 0.

    A teacher's probability of 1e-300 makes a student's -inf infinitely wrong; in float32 it is none.
    """
    if trial.temperature is None or not value.isinf().any():
        return value
    least = math.log(torch.finfo(trial.op.accumulator(trial.x)).tiny)

    def rounded(name, t):
        small = (t - t.amax(1, keepdim=True)) / trial.temperature < least if name in ("student", "teacher") else None
        return t if small is None else t.masked_fill(small, -INF)

    other = trial.op(oracles, registry.mapped(registry.widened(trial.x), rounded))
    return torch.where(value.isinf() & other.isfinite(), other, value)


def compare(got, want, size, cols, what):
    """`got` against the oracle's `want` where that is a number, and one that the dtype of `got` can hold.

    To float32's precision also where an op works in float64, as the oracle does, which loses digits itself: extreme
    numbers cost the formulas more of them than the ops.
    """
    assert not got.isnan().any(), f"{what} has NaN"
    size = size + UNDERFLOW
    known = want.isfinite() & size.isfinite() & (want.abs() < 0.999 * torch.finfo(got.dtype).max)
    assert_close(*(torch.where(known, x, 0) for x in (got, want, size.expand_as(want))), cols, torch.float32, what)


@pytest.mark.parametrize("family", [*FAMILIES, *OPS])
def test_fuzz(family):
    require_cpu_kernels()

    @settings(
        max_examples=EXAMPLES // (len(FEATURES) if "feature-" in family else 1),
        deadline=None,
        derandomize=True,
        report_multiple_bugs=False,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data):
        trial = {**FAMILIES, **OPS}[family](data.draw)
        (value, size), *rest = expected(trial)
        with kdfast.fallback():
            results = {"fallback": run(trial.op, ops, trial.x, trial.upstream)}
        results["kernel"] = run(trial.op, ops, trial.x, trial.upstream)
        labels = [label for label, _ in registry.labelled(trial.x, trial.op.leaves)]
        leaves = registry.tensors(trial.x, trial.op.leaves)
        if all(t.numel() for t in leaves):
            of_value, *all_cols = trial.op.cols_of(trial.x, len(leaves))
        else:
            of_value, *all_cols = [max(math.prod(t.shape[1:]) for t in leaves)] * (1 + len(leaves))
        for name, (got, *grads) in results.items():
            told = ~value.isnan()
            want = torch.where(got.isfinite(), flushed(trial, value), value)
            assert torch.equal((got == INF)[told], (want == INF)[told]), f"{name}: {got}, expected {value}"
            compare(got, want, size, of_value, f"{name}: value")
            for label, grad, (slope, entries), cols in zip(labels, grads, rest, all_cols, strict=True):
                if entries is None:
                    assert grad is None, f"{name}: a gradient in {label}"
                else:
                    slope = torch.zeros_like(entries) if slope is None else slope
                    compare(grad, slope, entries, cols, f"{name}: gradient in {label}")
        for one, other in zip(*results.values(), strict=True):
            if one is not None:
                assert torch.equal(one.isinf(), other.isinf()), f"fallback {one}, kernel {other}"

    check()
