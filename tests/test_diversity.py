"""DiversityCooperation, which is plain PyTorch with a written gradient."""

import behaviour
import oracles
import pytest
import torch

import kdfast

RELATIONS = ("l2", "cos", "js", "distil")
SHAPES = [
    (2, 1, 2),
    (2, 5, 1),  # one class, the label's: nothing is left
    (3, 5, 9),
    (5, 33, 1025),  # one class more than the 1024 that are summed at a time
    (1, 5, 9),  # one head
    (4, 0, 7),
]


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device(request.param)


def make(device, heads, rows, cols, dtype=torch.float64, scale=3.0):
    logits = [(torch.randn(rows, cols, dtype=torch.float64) * scale).to(dtype).to(device) for _ in range(heads)]
    return logits, torch.randint(cols, (rows,), device=device)


def check(logits, labels, relation, temperature=1.0, rtol=1e-12, grad_tol=1e-12):
    leaves = behaviour.leaves_of(logits)
    loss = kdfast.DiversityCooperation(relation, temperature)(leaves, labels)
    wide = [x.detach().double().requires_grad_() for x in logits]
    want = oracles.DiversityCooperation(wide, labels, relation, temperature)
    torch.testing.assert_close(loss.double(), want, rtol=rtol, atol=1e-15)
    grads = [torch.autograd.grad(x, y) for x, y in ((loss, leaves), (want, wide))]
    for x, got, expected in zip(leaves, *grads, strict=True):
        assert got.dtype == x.dtype
        largest = max(g.abs().max().item() if g.numel() else 0.0 for g in grads[1])
        half = torch.finfo(got.dtype).eps if got.dtype in behaviour.HALVES else 0.0
        torch.testing.assert_close(got.double(), expected, rtol=half, atol=grad_tol * largest + half * 1e-4 + 1e-15)


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_oracle(device, relation, shape):
    check(*make(device, *shape), relation)
    check(*make(device, *shape), relation, 5.0)
    check(*make(device, *shape, dtype=torch.float32), relation, 1.0, rtol=1e-5, grad_tol=1e-5)


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(device, relation, dtype):
    logits, labels = make(device, 3, 5, 33, dtype=dtype)
    assert kdfast.DiversityCooperation(relation)(logits, labels).dtype == torch.float32
    check(logits, labels, relation, 2.0, rtol=1e-5, grad_tol=1e-5)


@pytest.mark.parametrize("relation", RELATIONS)
def test_stacked_heads(device, relation):
    logits, labels = make(device, 3, 4, 5)
    stacked = torch.stack(logits, 2).movedim(2, 0).requires_grad_()  # heads last in memory, as the official code has it
    leaves = behaviour.leaves_of(logits)
    loss = kdfast.DiversityCooperation(relation)
    a, b = loss(stacked, labels), loss(leaves, labels)
    assert torch.equal(a, b)
    assert torch.equal(torch.autograd.grad(a, stacked)[0], torch.stack(torch.autograd.grad(b, leaves)))
    assert torch.equal(kdfast.DiversityCooperation(relation, sign=-1)(logits, labels), -b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_edges(device, dtype):
    """Equal heads are exactly alike; masked classes, confident and huge logits give finite numbers."""
    logits, labels = make(device, 3, 6, 9, dtype=dtype)
    leaves = behaviour.leaves_of([logits[0]] * 3)
    loss = kdfast.DiversityCooperation("l2")(leaves, labels)
    assert loss == 0 and not any(g.any() for g in torch.autograd.grad(loss, leaves))
    masked = [x.clone().index_fill_(1, torch.tensor([2, 5], device=device), -float("inf")) for x in logits]
    confident = [torch.nn.functional.one_hot((labels + i) % 9, 9).to(dtype) * 1000 for i in range(3)]
    huge = [x * 1e3 for x in logits]
    empty = [logits[0], torch.full_like(logits[0], -float("inf")), logits[2]]
    for heads in (masked, confident, huge, empty):
        for relation in RELATIONS:
            leaves = behaviour.leaves_of(heads)
            loss = kdfast.DiversityCooperation(relation)(leaves, labels)
            assert loss.isfinite() or (relation == "distil" and heads is empty and loss == float("inf"))
            assert all(g.isfinite().all() for g in torch.autograd.grad(loss, leaves))


def test_close_heads_keep_their_digits(device):
    """float32: l2 of heads 1e-3 apart, cos of heads that share nothing but 1e-4."""
    base, labels = make(device, 1, 8, 50)
    near = [(base[0] + 1e-3 * torch.randn_like(base[0])).float() for _ in range(4)]
    check(near, labels, "l2", rtol=3e-4, grad_tol=1e-3)
    apart = [(20 * torch.eye(50, device=device)[8 * i : 8 * i + 8]).float() for i in range(4)]
    check([x + 0.1 * torch.randn_like(x) for x in apart], torch.full_like(labels, 49), "cos", rtol=1e-5, grad_tol=1e-5)


def test_no_tensor_of_pairs(device):
    """16 heads need a few tensors of their own size, not one of all pairs."""
    heads, rows, cols = 16, 8, 1024
    logits, labels = make(device, heads, rows, cols, dtype=torch.float32)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                self.elements = max(self.elements, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    for relation in RELATIONS:
        with Largest() as seen:
            leaves = behaviour.leaves_of(logits)
            kdfast.DiversityCooperation(relation)(leaves, labels).backward()
        assert seen.elements == heads * rows * cols


@pytest.mark.parametrize("relation", RELATIONS)
def test_behaviour(device, relation, same_bits):
    logits, labels = make(device, 3, 64, 100, dtype=torch.float32)
    loss = kdfast.DiversityCooperation(relation)

    def function(*heads):
        return loss(heads, labels)

    behaviour.check_loss(function, logits, same_bits, changed=(1,))


def test_compiled_without_gradient(device):
    """Evaluation, for any number of networks."""
    logits, labels = make(device, 4, 5, 6)
    for count in range(1, 5):
        torch.compiler.reset()
        z = logits[:count]
        compiled = torch.compile(
            lambda z: kdfast.DiversityCooperation()(z, labels), fullgraph=True, backend="aot_eager"
        )
        torch.testing.assert_close(compiled(z), kdfast.DiversityCooperation()(z, labels))


def test_labels_that_are_no_class():
    logits, labels = make("cpu", 2, 4, 5)
    labels[1] = 5
    with pytest.raises(ValueError, match=r"labels\[1\] is 5, expected a class from 0 to 4"):
        kdfast.DiversityCooperation()(logits, labels)


def test_errors(dtensor):
    logits, labels = make("cpu", 2, 4, 5)
    for wrong, error, message in (
        (logits[0], ValueError, r"logits must be a list of \(B, C\) tensors or one \(M, B, C\) tensor, got shape"),
        ([], ValueError, "logits must have from 1 to 128 networks, got 0"),
        ([logits[0], logits[1][:, :3]], ValueError, r"logits\[1\] must have logits\[0\]'s batch and classes \(4, 5\)"),
        ([logits[0], logits[1].long()], TypeError, r"logits\[1\] must be float32"),
        ([logits[0], "x"], TypeError, r"logits\[1\] must be a torch.Tensor, got str"),
        (7, TypeError, "logits must be a list"),
        ([dtensor(logits[0])], TypeError, r"logits\[0\] is a DTensor"),
    ):
        with pytest.raises(error, match=message):
            kdfast.DiversityCooperation()(wrong, labels)
    for options, message in (
        ({"relation": "jsd"}, "relation must be one of l2, cos, js, distil, got 'jsd'"),
        ({"temperature": 0}, "temperature must be finite and above 0"),
        ({"sign": 2}, "sign must be 1 or -1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            kdfast.DiversityCooperation(**options)
