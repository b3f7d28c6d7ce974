"""The contract of every op in tests/registry/: what PyTorch does with it, and what it refuses."""

import os
import re

import behaviour
import pytest
import registry
import torch

import kdfast
from kdfast import ops

OPS = registry.every_op()
every_op = pytest.mark.parametrize("op", OPS, ids=str)
every_family = pytest.mark.parametrize("family", registry.FAMILIES)
PROGRAMS = [program for family in registry.FAMILIES for program in registry.family(family).PROGRAMS]
every_program = pytest.mark.parametrize("program", PROGRAMS, ids=str)
# A graph reads tensors of any strides: of programs that differ in these alone, one is enough.
GRAPHS = [program for program in PROGRAMS if "channels_last" not in program.name]
every_graph = pytest.mark.parametrize("program", GRAPHS, ids=str)


# ---- schemas ---------------------------------------------------------------------------------------------------------
@every_family
def test_opcheck(implementation, family):
    """Schemas, shape functions and dynamic shapes of the raw ops, on inputs that need no gradient."""
    calls = registry.family(family).raw_calls(implementation.device)
    own = {name for name, op in kdfast._kernels.OPS.items() if op.family == family}
    assert {name for name, _ in calls} >= {name for name in own if kdfast._kernels.OPS[name].has_kernels}
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if behaviour.has_graphs(implementation):
        checks.append("test_aot_dispatch_dynamic")
    for name, arguments in calls:
        torch.library.opcheck(getattr(torch.ops.kdfast, name).default, arguments, test_utils=checks)


# ---- autograd --------------------------------------------------------------------------------------------------------
@every_op
def test_double_backward_raises(implementation, op):
    function, leaves = op.of_leaves(op.group.inputs(implementation, op.group.small))
    leaves = behaviour.leaves_of(leaves)
    behaviour.check_refuses_second_derivative(function(*leaves), leaves[0])


@every_op
def test_inplace_change_raises(implementation, op):
    x = op.group.inputs(implementation, op.group.small)
    function, leaves = op.of_leaves(x)
    given = op.collecting(x)
    grads = torch.autograd.grad(op.total(given), registry.tensors(given, op.leaves), allow_unused=True)
    names = [label.split("[")[0] for label, _ in registry.labelled(x, op.leaves)]
    for index, (name, grad) in enumerate(zip(names, grads, strict=True)):
        if name in (op.saved or op.leaves) and grad is not None:
            behaviour.check_refuses_changed_input(function, leaves, index)


@every_op
def test_transforms_refused(implementation, op):
    function, (first, *others) = op.of_leaves(op.group.inputs(implementation, op.group.small))
    behaviour.check_refuses_transforms(lambda t: function(t, *others), first)


@every_op
def test_dtensor_refused(dtensor, op):
    """Of any input but a ramp, named in the message."""
    x = op.group.inputs("cpu", op.group.small, torch.float32)
    for i, (label, _) in enumerate(registry.labelled(x, op.read)):
        changed = [dtensor(t) if i == j else t for j, t in enumerate(registry.tensors(x, op.read))]
        name = re.escape(label if label != "probabilities" else "labels")
        with pytest.raises(TypeError, match=rf"{name} is a DTensor.*{name}.to_local\(\)"):
            op(ops, registry.replaced(x, op.read, changed))


# ---- compilers, autocast ---------------------------------------------------------------------------------------------
@behaviour.every_compiled
@every_program
def test_compile(implementation, program):
    """One graph, forward and backward, with the numbers of the program as it is; through the compiler itself once.

    A sanitizer would watch the compiler's own code, too.
    """
    compiler = "inductor" if program in GRAPHS and "KDFAST_TEST_SANITIZED" not in os.environ else "aot_eager"
    tensors = program.make(implementation.device, program.rows, torch.float32)
    behaviour.check_compiled_for_all(implementation, program.function, tensors, compiler)


@behaviour.every_compiled
@every_graph
def test_compile_dynamic(implementation, program):
    """Another batch size needs no graph break; sizes may be symbols."""
    behaviour.compiles(implementation)
    torch.compiler.reset()
    compiled = torch.compile(program.function, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 6, 7):
        tensors = [t.detach() for t in program.make(implementation.device, rows, torch.float32)]
        torch.testing.assert_close(compiled(*tensors), program.function(*tensors))
        with kdfast.fallback():
            torch.testing.assert_close(compiled(*tensors), program.function(*tensors))


@every_program
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_settings_change_nothing(implementation, program, dtype):
    """Neither autocast nor the precision that torch allows to products: inputs are taken in the dtype they have."""
    behaviour.check_autocast(program.function, program.make(implementation.device, program.rows, dtype))


@every_program
def test_programs_are_deterministic(implementation, program, same_bits):
    """Losses around the ops, too."""
    tensors = program.make(implementation.device, program.rows + 3, torch.float32)

    def run():
        given = behaviour.copies_of(tensors)
        loss = program.function(*given)
        grads = torch.autograd.grad(loss, behaviour.collecting(given), allow_unused=True)
        return [loss.detach(), *(g for g in grads if g is not None)]

    assert same_bits(run)


@pytest.mark.parametrize("implementation", ["fallback", "cpu", "cuda"], indirect=True)
@every_program
def test_deterministic_algorithms_are_enough(implementation, program, deterministic_algorithms):
    tensors = behaviour.copies_of(program.make(implementation.device, program.rows, torch.float32))
    grads = torch.autograd.grad(program.function(*tensors), behaviour.collecting(tensors), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in grads)


# ---- CUDA only -------------------------------------------------------------------------------------------------------
@every_program
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_host_sync(cuda, program, dtype):
    behaviour.check_no_host_sync(program.function, program.make(cuda.device, 64, dtype))


@pytest.mark.parametrize("program", [program for program in PROGRAMS if program.graph], ids=str)
def test_cuda_graph(cuda, program):
    tensors, others = (program.make(cuda.device, 64, torch.float32) for _ in range(2))
    behaviour.check_cuda_graph(program.function, tensors, others)


# ---- errors ----------------------------------------------------------------------------------------------------------
ERRORS = [(family, *case) for family in registry.FAMILIES for case in registry.family(family).ERRORS]


@pytest.mark.parametrize(
    ("family", "call", "error", "message"), ERRORS, ids=[f"{family}: {message}" for family, *_, message in ERRORS]
)
def test_errors(family, call, error, message):
    with kdfast.fallback(), pytest.raises(error, match=message):
        call(*registry.family(family).bad_inputs())
