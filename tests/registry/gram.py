"""Matrices of inner products, and how they are compared."""

import dataclasses
import functools

import oracles
import torch

import kdfast
from kdfast import ops
from registry import FAR, SQUARED_ROUNDING, Bench, Group, Op, Program, program_of, scaled

SERIES = [0.4, 0.3, 0.2, 0.1]


def make(shape):
    """A student's embeddings [B, D] or maps, and a teacher's of another width."""
    shapes = {"student": shape, "teacher": (shape[0], shape[1] // 2 + 1, *shape[2:])}
    return {name: torch.randn(*s, dtype=torch.float64) for name, s in shapes.items()}


def make_batches(shape):
    """Batches of rows [Z, n, D] and [Z, n + 3, D]."""
    z, n, d = shape
    return {name: torch.randn(z, rows, d, dtype=torch.float64) for name, rows in (("a", n), ("b", n + 3))}


# ---- ops -------------------------------------------------------------------------------------------------------------
def sizes_gram(student, teacher, kind="rows", *, eps=0.0, coefficients=()):
    """-> value, entries of both gradients: a cosine is off by a rounding of 1, an entry of G by one of |x_i| |x_j|.

    Where slopes are signs, an entry that rounding turns around counts as one that is off by itself.
    """
    pair = student, teacher
    norms = [x.norm(dim=-1, keepdim=True) for x in pair]
    scale = 1 / max(pair[0].shape[-2] * pair[0][..., 0].numel(), 1)
    inverse = [torch.where(n > 0, 1 / (n + eps), 0.0) for n in norms]

    def outer(x):
        return x @ x.transpose(-1, -2)

    if kind in ("rows", "rows_absolute"):
        grams, sizes = [outer(x) for x in pair], [outer(n) for n in norms]
        lengths = [g.norm(dim=-1, keepdim=True).clamp(min=1e-12) for g in grams]
        q, of_q = ([x / n for x, n in zip(y, lengths, strict=True)] for y in (grams, sizes))
        gap, of_gap = (q[0] - q[1]).abs(), of_q[0] + of_q[1]
        if kind == "rows":
            value, slope, of_slope = 2 * gap * of_gap + SQUARED_ROUNDING * of_gap**2, 2 * gap, 2 * of_gap
        else:
            value, slope, of_slope = of_gap, torch.ones_like(gap), torch.ones_like(gap)
        shares = [
            (of_slope + y * (x.abs() * of_slope + y * slope).sum(-1, keepdim=True)) / n
            for x, y, n in zip(q, of_q, lengths, strict=True)
        ]
    else:
        c, d = (oracles._cosines_of_rows(x, eps) for x in pair)
        if kind == "distribution":
            totals = [(1 + x).sum(-1, keepdim=True) / 2 for x in (c, d)]
            p, t = ((1 + x) / 2 / n for x, n in zip((c, d), totals, strict=True))
            of_gap = 1 / totals[0] + 1 / totals[1]
            ratio = (t - p).abs() / (p + eps)
            value = (1 + ratio) * of_gap
            slope = (1 + ratio) * of_gap / (p.clamp(max=t) + eps)
            shares = [(slope + 1 + (1 + slope) * x) / (2 * n) for x, n in zip((p, t), totals, strict=True)]
            shares = [x + x.mean(-1, keepdim=True) for x in shares]
        elif coefficients:
            k, k_slope = sum(abs(a) for a in coefficients), sum(i * abs(a) for i, a in enumerate(coefficients))
            gap = (oracles._power_series(c, coefficients) - oracles._power_series(d, coefficients)).abs()
            value = 2 * gap * k + SQUARED_ROUNDING * k**2
            curve = sum(i * i * abs(a) for i, a in enumerate(coefficients))
            shares = [2 * (k * k_slope + gap * curve)] * 2
        else:
            value, shares = torch.ones_like(c), [torch.ones_like(c)] * 2
        shares = [x * outer(r) for x, r in zip(shares, inverse, strict=True)]
    entries = []
    for x, n, r, share in zip(pair, norms, inverse, shares, strict=True):
        m = share + share.transpose(-1, -2)
        entries.append(scale * (m @ x.abs() + (m @ n) * r * x.abs()))
    return scale * value.sum(), *entries


def affinity_formula(student, teacher, kind="absolute", eps=1e-8):
    s, t = (oracles._cosines_of_rows(x.flatten(2).transpose(1, 2), eps) for x in (student, teacher))
    if kind == "positive":
        s, t = s.clamp(min=0), t.clamp(min=0)
    gap = s - t
    return (gap.abs() if kind == "absolute" else gap.square()).sum() / max(s.numel(), 1)


def sizes_affinity(student, teacher, kind="absolute", *, eps=1e-8):
    rows = [x.flatten(2).transpose(1, 2) for x in (student, teacher)]
    coefficients = () if kind == "absolute" else (0.0, 1.0)
    value, *entries = sizes_gram(*rows, "polynomial", eps=eps, coefficients=coefficients)
    return value, *(e.transpose(1, 2).unflatten(2, student.shape[2:]) for e in entries)


def equal(student):
    return student


def gram_distance(name, **options):
    """Of equal networks a distribution has gradients of the size of its rounding; test_gram.py bounds them."""
    return Op(
        name,
        lambda o, student, teacher: o.gram_distance(student, teacher, **options),
        lambda g, student, teacher: scaled(g, sizes_gram(student, teacher, **options)),
        equal=None if name == "distribution" else equal,
    )


def affinity(name, **options):
    """Nothing of the size of positions^2: a few copies of the maps."""
    return Op(
        name,
        lambda o, student, teacher: o.affinity(student, teacher, **options),
        lambda g, student, teacher: scaled(g, sizes_affinity(student, teacher, **options)),
        functools.partial(affinity_formula, **options),
        memory=lambda x, kernel: 8 * sum(t.nbytes for t in x.values()) if kernel else None,
    )


def products(a, b):
    return a.abs() @ b.abs().transpose(1, 2)


def of_products(x):
    """Multiplications and additions of the product, and of the two of its gradients."""
    forward = 2 * x["a"].numel() * x["b"].shape[1]
    return forward, 2 * forward


INNER_PRODUCTS = [
    Op(
        "products",
        lambda o, a, b: o.inner_products(a, b),
        lambda g, a, b: (products(a, b), g @ b.abs(), g.transpose(1, 2) @ a.abs()),
        lambda a, b: a @ b.transpose(1, 2),
        bench=Bench(((32, 64, 784), (64, 256, 784)), of_products, "matmul"),
    ),
    Op(
        "products_with_itself",
        lambda o, a: o.inner_products(a),
        lambda g, a: (products(a, a), (g + g.transpose(1, 2)) @ a.abs()),
        lambda a: a @ a.transpose(1, 2),
    ),
]
TRANSPOSED = {name: lambda t: t.transpose(1, 2).contiguous().transpose(1, 2) for name in "ab"}
MAPS = [(1, 1, 1, 1), (2, 3, 4, 5), (2, 5, 9, 8), (1, 65, 6, 23)]  # positions for several blocks of 64, odd channels
GROUPS = [
    Group(
        "gram",
        make,
        [
            gram_distance("rows"),
            gram_distance("rows_absolute", kind="rows_absolute"),
            gram_distance("distribution", kind="distribution", eps=1e-7),
            gram_distance("polynomial", kind="polynomial", coefficients=SERIES),
            gram_distance("absolute", kind="absolute", eps=1e-8),
        ],
        cases=[  # rows, features
            (1, 3),
            (2, 1),
            (5, 9),
            (33, 17),  # one row more than a block of 32, one feature more than a vector
            (67, 17),  # one tile of 64 and a bit, in rows
            (5, 67),  # and in features
            (5, 1037),  # more features than a panel of 1024
            (130, 70),  # on CUDA large tiles, in pieces of the features
        ],
        small=(5, 9),
        tiny=(4, 5),
        half=(5, 33),
        laid_out=((4, 35),),
        leaves=("student", "teacher"),
        cols=lambda x: max(t[0].numel() for t in x.values()),
        layouts={"student": "rows", "teacher": "rows"},
        equal_shapes=((5, 9), (40, 12), (3, 120)),
        far=(((4, 40), (FAR, 1)), ((5, 4), (1, FAR))),
        deterministic=((5, 324), (40, 216), (2, 1224)),
        deterministic_simt=((5, 324), (2, 1224)),
        simt=lambda shape, dtype: shape[1] <= 1000,  # a fiber per thread: slow, and CUDA has no panels
        workload=((2, 15), (3, 1155), (2, 1320)),
    ),
    Group(
        "gram",
        make,
        [affinity("affinity"), affinity("affinity_squared", kind="squared")],
        cases=MAPS,
        small=(2, 3, 4, 5),
        tiny=(1, 3, 2, 2),
        laid_out=((2, 5, 9, 4),),
        leaves=("student", "teacher"),
        cols=lambda x: max(t[0].numel() for t in x.values()),
        layouts={"student": "maps", "teacher": "maps"},
        equal_shapes=((3, 4, 6, 5), (2, 70, 3, 3), (40, 2, 2, 3)),
        far=(((3, 4, 5, 4), (FAR, 20, 4, 1)), ((3, 4, 5, 4), (FAR, 1, 16, 4))),
        deterministic=((2, 17, 9, 8), (5, 9, 6, 6)),
        deterministic_simt=((2, 17, 9, 8),),
        memory=(1, 16, 48, 48),
        workload=(
            (2, 3, 1, 5),  # fewer positions and channels than a vector
            (3, 33, 5, 7),  # one channel more than a tile
            (2, 20, 6, 11),  # positions of three tiles
        ),
    ),
    Group(
        "gram",
        make_batches,
        INNER_PRODUCTS,
        cases=[(1, 1, 1), (3, 5, 7), (2, 40, 33), (1, 70, 65)],
        small=(2, 4, 7),
        tiny=(1, 2, 3),
        leaves=("a", "b"),
        cols=lambda x: max(*x["b"].shape[1:], x["a"].shape[1]),
        layouts=TRANSPOSED,
        largest_upstream=1e-3,
        deterministic=((3, 70, 65),),
        deterministic_simt=((3, 20, 65),),
        workload=((2, 3, 5), (3, 33, 35), (2, 20, 66)),
    ),
]


GROUPS.insert(
    2,
    dataclasses.replace(
        GROUPS[1],
        ops=[affinity("affinity_positive", kind="positive")],
        largest=lambda name, t: (
            t / t.abs().amax() * 6e4
        ),  # cosines of signs are 0 but for rounding: there the slope jumps
    ),
)


# ---- raw ops, programs -----------------------------------------------------------------------------------------------
def raw_calls(device):
    a, b = (torch.randn(2, n, 7, device=device) for n in (4, 3))
    gram, grad = a @ a.transpose(1, 2), torch.tensor(2.0, device=device)
    return [
        ("inner_products", (a, None)),
        ("inner_products", (a, b)),
        ("weighted_sums", (gram, a, grad)),
        ("compare_grams", (gram, gram + 1, "rows", 0.0, [], True, False)),
        ("compare_grams", (gram, gram + 1, "distribution", 1e-7, [], True, True)),
        ("compare_grams", (gram, gram + 1, "polynomial", 0.0, SERIES, False, False)),
        ("affinity", (a, a[:, :2], "absolute", 1e-8, True, False)),
        ("affinity", (a, a[:, :2], "positive", 1e-8, True, True)),
        ("affinity_backward", (grad, torch.randn(2, 7, 4, device=device), a, 1e-8)),
    ]


LAYERWISE = {
    "SP": kdfast.SP(),
    "NST": kdfast.NST(),
    "FSP": lambda s, t: kdfast.FSP()([s, s.flip(1)], [t, t.flip(1)]),
    "FAKD": kdfast.FAKD(),
    "FAKD channel": kdfast.FAKD("channel"),
    "FAKD instance": kdfast.FAKD("instance"),
    "LKD": kdfast.LKD(2),
    "PKT": kdfast.PKT(),
    "CCKD": kdfast.CCKD(),
}


def losses(student, teacher):
    return sum(loss(student, teacher) for loss in LAYERWISE.values())


def make_maps(device, rows, dtype):
    return [torch.randn(rows, 4, 4, 4).to(dtype).to(device) for _ in range(2)]


PROGRAMS = [*map(program_of, GROUPS), Program("gram, losses", losses, make_maps)]


# ---- errors ----------------------------------------------------------------------------------------------------------
def bad_inputs():
    return torch.randn(5, 9), torch.randn(5, 3)


ERRORS = [
    (lambda s, t: ops.gram_distance(s, t, "none"), ValueError, "kind must be one of rows, .*, got 'none'"),
    (lambda s, t: ops.gram_distance(s, t[:2]), ValueError, "teacher must have the student's rows"),
    (lambda s, t: ops.gram_distance(s, t, "polynomial"), ValueError, "coefficients belong to kind 'polynomial'"),
    (
        lambda s, t: ops.gram_distance(s, t, "polynomial", coefficients=[0.1] * 17),
        ValueError,
        "coefficients must be at most 16, got 17",
    ),
    (lambda s, t: ops.gram_distance(s, t, eps=-1.0), ValueError, "eps must be from 0.0 to inf, got -1.0"),
    (lambda s, t: ops.gram_distance(s.int(), t), TypeError, "student must be float32"),
    (
        lambda s, t: ops.affinity(s[..., None, None], t[..., None, None], kind="cosine"),
        ValueError,
        "kind must be one of absolute, squared, positive, got 'cosine'",
    ),
    (lambda s, t: ops.affinity(s, t), ValueError, "student must be .batch, channels, height, width"),
    (lambda s, t: ops.inner_products(s), ValueError, "a must be .batches, rows, features"),
    (lambda s, t: ops.inner_products(s[None], t[None]), ValueError, r"b must be \(1, rows, 9\)"),
    (lambda s, t: kdfast.CCKD("rbf"), ValueError, "kernel must be one of gaussian, bilinear, got 'rbf'"),
    (lambda s, t: kdfast.CCKD(order=-1), ValueError, "order must be at least 0"),
    (lambda s, t: kdfast.CCKD(order=16), ValueError, "order must be at most 15, got 16"),
    (lambda s, t: kdfast.PKT(0), ValueError, "eps must be finite and above 0"),
    (lambda s, t: kdfast.FAKD("rows"), ValueError, "affinity must be one of spatial, channel, instance"),
    (
        lambda s, t: kdfast.FAKD("channel")(s[..., None, None], t[..., None, None]),
        ValueError,
        "the student's 9 channels",
    ),
    (lambda s, t: kdfast.FSP()(s, t), ValueError, "student must be a list of at least two maps, got Tensor"),
    (lambda s, t: kdfast.FSP()([s[..., None, None]] * 2, [t[..., None, None]] * 2), ValueError, "the 9 channels"),
    (
        lambda s, t: kdfast.LKD()(s[..., None, None], t[..., None, None]),
        ValueError,
        "at least 4 positions high and wide",
    ),
    (lambda s, t: kdfast.SP()(s, t[1:]), ValueError, "teacher must have the student's batch size 5"),
]
