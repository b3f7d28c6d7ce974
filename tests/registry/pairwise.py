"""Rows of embeddings compared by the distances and angles among them."""

import math

import oracles
import torch

import kdfast
from kdfast import ops
from kdfast.ops import pairwise
from registry import FAR, SQUARED_ROUNDING, Group, Op, Program, program_of


def make_pair(shape):
    """One batch of a student and of a teacher of another width."""
    rows, cols = shape
    shapes = {"student": (rows, cols), "teacher": (rows, cols // 2 + 1)}
    return {name: torch.randn(*s, dtype=torch.float64) for name, s in shapes.items()}


def make_sets(shape):
    """Two sets of rows of one width."""
    rows, cols = shape
    return {name: torch.randn(n, cols, dtype=torch.float64) for name, n in (("x", rows), ("y", rows + 2))}


def largest(name, t):
    t = t.sign() * 6e4
    t[:, 0] = torch.linspace(-6e4, 6e4, len(t))
    return t


# ---- ops -------------------------------------------------------------------------------------------------------------
def _weighted_sizes(weights, x, y):
    """Of sum_j weights_ij (x_i - y_j) [n, D], weights without sign."""
    return (weights[..., None] * (x[:, None] - y).abs()).sum(1)


def sizes_distance(x, y, upstream, squared=False):
    """-> distances [n, m], entries of the gradients in x and, where y is another set, in y."""
    p = oracles._squared_distances(x, (x if y is None else y))
    weights = upstream.abs() * (2 if squared else torch.where(p > 0, p, math.inf).rsqrt())
    value = p if squared else p.sqrt()
    if y is None:
        return value, _weighted_sizes(weights + weights.t(), x, x)
    return value, _weighted_sizes(weights, x, y), _weighted_sizes(weights.t(), y, x)


def sizes_rkd_distance(student, teacher):
    """A difference of distances is off by a rounding of both, and so is its slope."""
    rows = len(student)
    p = oracles._squared_distances(student, student)
    r, t = oracles._over_mean(student), oracles._over_mean(teacher)
    slope = (r - t).clamp(-1, 1)
    value = (slope.abs() * (r + t)).mean() + SQUARED_ROUNDING
    mean = oracles._root(p, 1e-12).sum() / (rows * (rows - 1))
    per_pair = (r + t + (slope * r).abs().mean()) * torch.where(p > 1e-12, p, math.inf).rsqrt() / mean
    return value, _weighted_sizes(2 * per_pair / rows**2, student, student)


def sizes_rkd_angle(student, teacher):
    """A cosine is off by a rounding of 1."""
    rows = len(student)
    inverse = torch.where((p := oracles._squared_distances(student, student)) > 0, p, math.inf).rsqrt()
    slope = (oracles._cosines(student) - oracles._cosines(teacher)).clamp(-1, 1)
    # d cos_ijk / d p_jk is 1/2 of the product of both inverse lengths; in p_ij the two terms before they cancel.
    at_vertex = inverse * inverse.sum(1, keepdim=True) + rows * inverse**2
    weights = at_vertex + at_vertex.t() + inverse.t() @ inverse
    return 2 * slope.abs().mean() + SQUARED_ROUNDING, _weighted_sizes(2 * weights / rows**3, student, student)


def off_diagonal(value):
    """The diagonal of a distance matrix is a constant 0, but finite differences would see a kink there."""
    return value[~torch.eye(len(value), dtype=torch.bool, device=value.device)]


def distance(name, squared):
    return Op(
        name,
        lambda o, x: o.pairwise_distance(x, squared=squared),
        lambda g, x: sizes_distance(x, None, g, squared=squared),
        gradcheck=off_diagonal,
    )


def between(name, squared):
    return Op(
        name,
        lambda o, x, y: o.pairwise_distance(x, y, squared=squared),
        lambda g, x, y: sizes_distance(x, y, g, squared=squared),
    )


WEIGHTS = {"rkd_distance": (1, 0), "rkd_angle": (0, 1), "rkd": (25, 50)}


def rkd(name):
    """A loss whose gradient goes to the student alone, and is made in the forward from both."""
    a, b = WEIGHTS[name]

    def matrices(x, kernel):
        """Some of B x B, whatever the number of features; the fallback's, beside its blocks, of both terms at once."""
        blocks = 0 if kernel else 8 * 8 * pairwise.BLOCK
        matrices = (8 if kernel else 10) * 4 * len(x["student"]) ** 2
        return x["student"].nbytes + blocks + matrices if kernel or a and b else None

    def sizes(g, student, teacher):
        of_distance, of_angle = (f(student, teacher) for f in (sizes_rkd_distance, sizes_rkd_angle))
        value, entries = (a * x + b * y for x, y in zip(of_distance, of_angle, strict=True))
        return value, g * entries, None

    return Op(
        name,
        lambda o, student, teacher: getattr(o, name)(student, teacher),
        sizes,
        saved=("student",),
        equal=lambda student: student,
        memory=matrices,
    )


SHARED = {
    "cases": [  # rows, features
        (2, 1),  # one pair: its distance is the mean, and every angle is 0 or straight
        (3, 1),  # on a line all cosines are 1 or -1
        (3, 5),
        (5, 9),
        (32, 33),  # the rows of a block
        (66, 7),  # three blocks, so that a triple may lie in three
        (34, 70),  # more features than are read at a time on CUDA
        (34, 1030),  # and by a CPU
        (150, 70),  # several blocks for each thread
    ],
    "small": (5, 9),
    "tiny": (4, 3),
    "half": (5, 33),
    "laid_out": ((4, 35),),
    "simt": lambda shape, dtype: math.prod(shape) <= 5000,  # beyond, nothing is new to CUDA
    "largest": largest,
    "largest_upstream": 1e-3,  # or float16 gradients overflow
    "far": (((4, 40), (FAR, 1)), ((5, 4), (1, FAR))),
    "deterministic": (
        (64, 100),  # several rows and tiles for each thread
        (33, 5),
        (5, 2100),  # sums over features in several blocks
        (130, 9),  # the fallback takes a few vertices at a time
    ),
    "deterministic_simt": ((33, 5), (3, 2100)),
    "workload": (
        (2, 3),  # one pair
        (17, 33),  # one row more than a block of angles takes, one column more than a tile of features
        (33, 65),  # one row more than a block of distances takes, one column more than a block of gradients
        (130, 20),  # more pairs than one block of a sum adds up
    ),
}
GROUPS = [
    Group(
        "pairwise",
        make_pair,
        [rkd(name) for name in WEIGHTS],
        leaves=("student", "teacher"),
        cols=lambda x: max(x["student"].shape),
        layouts={"student": "rows", "teacher": "rows"},
        equal_shapes=((2, 1), (5, 9), (17, 1), (33, 40)),
        memory=(256, 160),
        **SHARED,
    ),
    Group(
        "pairwise",
        make_sets,
        [distance("distance", False), distance("squared", True)]
        + [between("between", False), between("between_squared", True)],
        leaves=("x", "y"),
        cols=lambda x: max(x["x"].shape),
        layouts={"x": "rows", "y": "rows"},
        **SHARED,
    ),
]


# ---- raw ops, programs -----------------------------------------------------------------------------------------------
def raw_calls(device):
    student, teacher, other = (torch.randn(n, d, device=device) for n, d in ((5, 9), (5, 5), (7, 9)))
    weights, factor = torch.randn(5, 7, device=device), torch.tensor(2.0, device=device)
    return [
        ("pairwise_distance", (student, None, False)),
        ("pairwise_distance", (student, other, True)),
        ("weighted_differences", (weights[:, :5], student, None, None)),
        ("weighted_differences", (weights, student.half(), other, factor)),
        ("rkd", (student, teacher, 25.0, 50.0, True)),
        ("rkd", (student, teacher, 0.0, 1.0, False)),
    ]


def make_layers(device, rows, dtype):
    """Maps, features and logits of a student and of a teacher, for IRG."""
    shapes = (rows, 2, 6, 5), (rows, 4, 3, 2), (rows, 9), (rows, 4)
    return [torch.randn(*shape).to(dtype).to(device) for _ in range(2) for shape in shapes]


def losses(*layers):
    student, teacher = layers[:4], layers[4:]
    return (
        kdfast.IRG()(student, teacher)
        + kdfast.IRGEdge()(student[2], teacher[0])
        + kdfast.IRGTransformation()(student[2], student[2] * 2, teacher[2], teacher[2] * 3)
        + kdfast.HardDarkRank(1.0, 1.0)(student[2], teacher[2])
        + kdfast.RKD()(student[1], teacher[0])
    )


PROGRAMS = [*map(program_of, GROUPS), Program("pairwise, losses", losses, make_layers, 6)]


# ---- errors ----------------------------------------------------------------------------------------------------------
def bad_inputs():
    return torch.randn(5, 9), torch.randn(5, 3)


ERRORS = [
    (
        lambda s, t: ops.rkd(s[0], t),
        ValueError,
        r"student must be \(batch, features\) or \(batch, ...\), got shape \(9,\)",
    ),
    (lambda s, t: ops.rkd(s, t[:4]), ValueError, r"teacher must have the student's batch size 5, got shape \(4, 3\)"),
    (lambda s, t: ops.rkd_angle(s.long(), t), TypeError, "student must be float32, float64, float16 or bfloat16"),
    (lambda s, t: ops.rkd_angle(s, t.tolist()), TypeError, "teacher must be a torch.Tensor, got list"),
    (lambda s, t: ops.rkd_angle(s[:, :0], t), ValueError, r"student must have at least one feature, got .* \(5, 0\)"),
    (lambda s, t: ops.rkd_distance(s, t.to("meta")), ValueError, "teacher must be on the student's device cpu"),
    (lambda s, t: ops.rkd(s, t, "1", 2.0), TypeError, "distance_weight must be a number, got str"),
    (lambda s, t: ops.rkd(s, t, 1.0, float("nan")), ValueError, "angle_weight must be finite, got nan"),
    (
        lambda s, t: ops.pairwise_distance(s, t),
        ValueError,
        r"rows like those of x, shape \(m, 9\), got \(5, 3\)",
    ),
    (lambda s, t: ops.pairwise_distance(s, s.to("meta")), ValueError, "y must be on x's device cpu, got meta"),
    (lambda s, t: ops.pairwise_distance(s.int()), TypeError, "x must be float32"),
    (lambda s, t: kdfast.RKD(distance_weight=None), TypeError, "distance_weight must be a number, got NoneType"),
    (lambda s, t: kdfast.HardDarkRank(alpha=0), ValueError, "alpha must be finite and above 0, got 0"),
    (lambda s, t: kdfast.HardDarkRank(permute_len=0), ValueError, "permute_len must be at least 1, got 0"),
    (lambda s, t: kdfast.HardDarkRank(permute_len=4.0), TypeError, "permute_len must be an int, got float"),
    (lambda s, t: kdfast.HardDarkRank()(s, t[1:]), ValueError, "teacher must have the student's batch size"),
    (lambda s, t: kdfast.IRGEdge()(s, t[1:]), ValueError, "teacher must have the student's batch size"),
    (
        lambda s, t: kdfast.IRGTransformation()(s, t, t, t),
        ValueError,
        r"student_early must have student_late's shape \(5, 9\), got \(5, 3\)",
    ),
    (
        lambda s, t: kdfast.IRG()(s, t),
        ValueError,
        r"student must be a list \[map1, map2, feature, logits\], got Tensor",
    ),
    (lambda s, t: kdfast.IRG()([s] * 3, [t] * 4), ValueError, r"student must be a list .*, got 3 entries"),
    (
        lambda s, t: kdfast.IRG()([s] * 4, [t] * 4),
        ValueError,
        r"student\[0\] must be \(batch, channels, ",
    ),
    (
        lambda s, t: kdfast.IRG()([s[..., None, None], s[:, :5, None, None], s, s], []),
        ValueError,
        r"student\[1\] must have as many channels as student\[0\], 9, or twice as many, got 5",
    ),
]
