"""Every op of kdfast.ops with what tests of it need: inputs, the formula, the sizes of its terms, bad inputs.

A file of this folder is a family. It lists `GROUPS` of ops that take the same inputs, `raw_calls` of the dispatcher's
ops, `PROGRAMS` and `ERRORS`. From an entry on, tests/test_ops_*.py hold an op to the contract of all ops,
tests/workload.py runs it on a GPU under compute-sanitizer, tests/test_fuzz.py draws it, and benchmarks/bench_ops.py
measures it.

Inputs are a dict: name -> tensor, or list of tensors. Nothing here needs pytest.
"""

import functools
import importlib
import inspect
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import oracles
import torch

from kdfast import ops


# ---- inputs ----------------------------------------------------------------------------------------------------------
class Inputs(dict):
    """Inputs by name, also as attributes."""

    __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__


def mapped(x, f):
    """The inputs with f(name, tensor) in place of each tensor."""
    return Inputs((name, [f(name, t) for t in v] if isinstance(v, list) else f(name, v)) for name, v in x.items())


def labelled(x, names):
    """-> pairs (label, tensor) of the inputs `names`: "mix", "networks[1]"."""
    pairs = []
    for name in names:
        several = isinstance(x[name], list)
        pairs += [(f"{name}[{i}]", t) for i, t in enumerate(x[name])] if several else [(name, x[name])]
    return pairs


def tensors(x, names):
    """All tensors of the inputs `names`."""
    return [t for _, t in labelled(x, names)]


def replaced(x, names, new):
    """The inputs with the tensors `new` in place of those of `names`, in the order of `tensors`."""
    new, result = iter(new), type(x)(x)
    for name in names:
        result[name] = [next(new) for _ in x[name]] if isinstance(x[name], list) else next(new)
    return result


def widened(x):
    """The same numbers in float64, without gradients: what a formula gets."""
    return mapped(x, lambda name, t: t.detach().double() if t.is_floating_point() else t)


# ---- sizes -----------------------------------------------------------------------------------------------------------
SQUARED_ROUNDING = 1e-6  # of a term whose slope is 0: the square of a few roundings, over one of them, in float32


def scaled(g, sizes):
    """Sizes of a value and of its gradients, these for an upstream gradient g in place of 1."""
    value, *entries = sizes
    return value, *(g * e for e in entries)


# ---- ops -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Bench:
    """At which shapes `kdfast bench` measures an op against its formula, and the work that neither can avoid.

    work: inputs -> of forward, of backward; by default the bytes of what is read, and once more with the gradients.
    ceiling: what bounds it, "copy" for bytes, "matmul" for operations.
    """

    shapes: tuple
    work: Callable | None = None
    ceiling: str = "copy"


@dataclass(eq=False)
class Op:
    """A public op with its settings: a function of named inputs.

    call: (o, *inputs) -> value, with o = kdfast.ops or oracles; its parameters name the inputs.
    formula: (*inputs) -> value in plain PyTorch, in the dtype of the inputs, where oracles.py has none under the name
        that `call` takes of o.
    sizes: (g, *inputs) -> magnitudes of what is added up (conftest.py): of the value, and of the gradient in each
        tensor of the leaves, None where there is none. g [value] is the upstream gradient without signs; inputs are
        float64. Without `sizes` each term is exact up to a rounding of itself.
    leaves: inputs that may require a gradient; by default the group's. unread: inputs that these settings ignore.
    saved: leaves of which a change in place is noticed; by default those that get a gradient.
    """

    name: str
    call: Callable
    sizes: Callable | None = None
    formula: Callable | None = None
    leaves: tuple | None = None
    unread: tuple = ()
    saved: tuple | None = None
    gradcheck: Callable | None = lambda value: value  # the smooth part of the value; None: gradients stop on purpose
    equal: Callable | None = None  # student -> a student that is at distance exactly 0 from itself
    cols: Callable | None = None  # of the value and of each gradient, where it is not the group's
    images: bool = False  # no other maps
    memory: Callable | None = None  # (inputs, compiled kernel) -> bytes that forward and backward may take, or None
    bench: Bench | None = None
    group: "Group" = field(default=None, repr=False)

    def __post_init__(self):
        self.inputs = tuple(inspect.signature(self.call).parameters)[1:]
        self.read = tuple(name for name in self.inputs if name not in self.unread)

    def __str__(self):
        return f"{self.group.family}.{self.name}"

    def __call__(self, o, x):
        call = self.formula if self.formula and o is oracles else functools.partial(self.call, o)
        return call(*(x[name] for name in self.inputs))

    def total(self, x):
        """One number of the value, whose upstream gradient differs from entry to entry."""
        value = self(ops, x)
        return (value * value).sum()

    def of_leaves(self, x):
        """`total` as a function of the leaves' tensors, and these."""
        return lambda *leaves: self.total(replaced(x, self.leaves, leaves)), tensors(x, self.leaves)

    def collecting(self, x):
        """The inputs with leaves that collect gradients."""
        leaves = [t.detach().clone().requires_grad_() for t in tensors(x, self.leaves)]  # a map keeps its format
        return replaced(x, self.leaves, leaves)

    def accumulator(self, x):
        """The dtype of the value."""
        names = [name for name in self.group.typed if name in self.read]
        return torch.float64 if any(t.dtype == torch.float64 for t in tensors(x, names)) else torch.float32

    def upstream(self, x, scale=1.0):
        """A random gradient of the value, exact in float32."""
        return torch.randn(self(oracles, widened(x)).shape).double().to(tensors(x, self.inputs)[0].device) * scale

    def sizes_of(self, g, x, value, grads):
        """-> size of the value, of the gradient in each leaf's tensor."""
        if self.sizes is None:
            return value.detach(), *(None if t is None else t.abs() for t in grads)
        return self.sizes(g, *(x[name] for name in tuple(inspect.signature(self.sizes).parameters)[1:]))

    def cols_of(self, x, count):
        """Terms in a sum: of the value, of the gradient in each leaf's tensor."""
        cols = (self.cols or self.group.cols)(x)
        return cols if isinstance(cols, (list, tuple)) else [cols] * (1 + count)


@dataclass(eq=False)
class Group:
    """Ops of one family that take the same inputs.

    make: shape -> inputs in float64 on the CPU. cases: shapes, each at a boundary of a kernel.
    """

    family: str
    make: Callable
    ops: list
    cases: list
    small: tuple
    leaves: tuple
    cols: Callable
    layouts: dict  # input -> "rows", "maps", "column" (behaviour.py), or a function of it
    typed: tuple | None = None  # inputs that decide the accumulation type; by default the leaves
    fixed: tuple = ()  # inputs whose dtype does not change
    tiny: tuple | None = None  # for finite differences
    half: tuple | None = None  # for float16 and bfloat16
    laid_out: tuple = ()  # shapes for layouts
    channels_last: tuple = ()  # more cases of maps
    other_dims: tuple = ()  # shapes that are no images
    batch: int = 0  # the axis of a shape that is the number of rows
    contiguous: bool = True  # gradients are, whatever the inputs
    equal_shapes: tuple = ()
    elementwise: bool = False  # also maps that lie differently are exactly equal
    largest: Callable = lambda name, t: t.sign() * 6e4  # float16 numbers of a leaf
    largest_upstream: float = 1.0
    far: tuple = ()  # (shape, strides of the first leaf) with elements beyond 2^31; `FAR` is such a stride
    deterministic: tuple = ()  # shapes; beside those of SIMT, where a thread is a fiber
    deterministic_simt: tuple = ()
    memory: tuple | None = None  # the shape for `Op.memory`
    memory_dtypes: tuple = ((torch.float32,),)
    simt: Callable = lambda shape, dtype: True  # whether a case is worth its time under SIMT
    workload: tuple = ()

    def __post_init__(self):
        self.typed = self.typed or self.leaves
        self.tiny, self.half, self.laid_out = (
            self.tiny or self.small,
            self.half or self.small,
            self.laid_out or (self.small,),
        )
        for op in self.ops:
            self.bound(op)

    def bound(self, op):
        """The op, as one of this group."""
        op.group = self
        op.leaves = tuple(name for name in op.leaves or self.leaves if name in op.read)
        return op

    def __getitem__(self, name):
        return next(op for op in self.ops if op.name == name)

    @property
    def of_maps(self):
        return "maps" in self.layouts.values()

    @property
    def memory_formats(self):
        return (torch.contiguous_format, torch.channels_last) if self.of_maps else (torch.contiguous_format,)

    def rows(self, count):
        """`small` with so many rows."""
        return (*self.small[: self.batch], count, *self.small[self.batch + 1 :])

    def inputs(self, device, shape, *dtypes):
        """Inputs of `shape`; the floating-point ones take the dtypes in turn."""
        turn = itertools.cycle(dtypes or [torch.float64])
        device = getattr(device, "device", device)

        def cast(name, t):
            return (t.to(next(turn)) if t.is_floating_point() and name not in self.fixed else t).to(device)

        return mapped(self.make(shape), cast)

    def in_format(self, x, memory_format):
        """The inputs with maps in `memory_format`."""
        return mapped(x, lambda name, t: t.contiguous(memory_format=memory_format) if t.dim() == 4 else t)


FAR = 2**30 + 8


# ---- programs: what is compiled, captured in a CUDA graph, run under autocast ----------------------------------------
@dataclass(eq=False)
class Program:
    """Several ops or losses as one number: `function(*inputs)` of what `make(device, rows, dtype)` gives.

    The inputs that get a gradient require it already; if none does, all do.
    """

    name: str
    function: Callable
    make: Callable
    rows: int = 5
    graph: bool = True  # a CUDA graph can hold it

    def __str__(self):
        return self.name


def program_of(group, memory_format=torch.contiguous_format):
    """The sum of a group's ops."""
    template = group.make(group.rows(2))  # how many tensors an input has

    def make(device, rows, dtype):
        x = group.in_format(group.inputs(device, group.rows(rows), dtype), memory_format)
        for t in tensors(x, group.leaves):
            t.requires_grad_()
        return tensors(x, template)

    def function(*given):
        x = replaced(template, template, given)
        return sum(op.total(x) for op in group.ops)

    layout = ", channels_last" if memory_format == torch.channels_last else ""
    return Program(f"{group.family}, {group.ops[0].name} and others{layout}", function, make, group.small[group.batch])


# ---- all of them -----------------------------------------------------------------------------------------------------
# Those of KDFAST_TEST_FAMILIES alone, where that is set: a process that tests one of them collects no others.
FAMILIES = os.environ.get("KDFAST_TEST_FAMILIES", "").split() or sorted(
    path.stem for path in Path(__file__).parent.glob("[a-z]*.py")
)


def family(name):
    """The module of a family."""
    return importlib.import_module(f"registry.{name}")


def groups():
    return [group for name in FAMILIES for group in family(name).GROUPS]


def every_op():
    return [op for group in groups() for op in group.ops]
