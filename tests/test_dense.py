"""Dense prediction: the official code of losses with layers of their own, and what no contract of all losses says."""

import copy
import itertools
import math

import oracles
import pytest
import torch
from official import Official, every_file

import kdfast
from kdfast.losses.detection import box_masks

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def made(name, p):
    """The module that a golden file names."""
    sizes = p["student_channels"], p["teacher_channels"]
    if name == "fgd":
        return kdfast.FGD(*sizes, p["temp"], p["alpha"], p["beta"], p["gamma"], p["lambda"])
    if name == "mgd":
        return kdfast.MGD(*sizes, p["lambda_mgd"])
    if name == "reviewkd":
        return kdfast.ReviewKD(*sizes, p["mid_channels"])
    return kdfast.SimKD(*sizes, p["factor"])


@every_file("fgd", "mgd", "reviewkd", "simkd")
@DTYPES
def test_matches_official_code(path, dtype):
    """The loss, every gradient, and the state of the batch norms; parameters lie in the order of the file."""
    x = Official(path, dtype)
    p = x.parameters
    module = made(x.name, p).to(dtype).train(p.get("train", True))
    parameters = dict(zip((name for name, _ in module.named_parameters()), map(x, p["names"]), strict=True))
    if x.name == "reviewkd":
        arguments = x("s*"), x("t*")
    else:
        arguments = x("s"), x("t")
    if x.name == "mgd":
        arguments += (x("mask"),)
    if x.name == "fgd":
        arguments += list(x("boxes").split(x("counts").tolist())), x("sizes").tolist()
    loss = torch.func.functional_call(module, parameters, arguments)
    x.assert_close("loss", loss, x["loss"], x.of_type(1e-11, 2e-5), 1e-14)
    largest = max(g.abs().max() for g in x.results("grad_").values())
    for name, grad in x.gradients(loss).items():
        # A bias in front of a softmax or a norm has no gradient: what the official code has there is rounding.
        x.assert_close(name, grad, x[f"grad_{name}"], x.of_type(1e-10, 5e-5), x.of_type(1e-13, 1e-5) * float(largest))
    for name, want in x.results("state_after_").items():
        got = torch.cat([b.flatten() for key, b in module.named_buffers() if key.endswith(name)])
        x.assert_close(name, got, want, x.of_type(1e-11, 1e-5), 1e-12)
    if x.name == "simkd":
        module.load_state_dict(parameters, strict=False)
        projected = module.project(x("s"), x("t").shape[2])
        x.assert_close("projected", projected, x["out_projected"], x.of_type(1e-11, 1e-5), x.of_type(1e-13, 1e-5))


# ---- MGD -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_mgd_draws_a_mask_in_every_call(mode):
    """Of positions, another for each image, with a share of 1 - mask_ratio; an identity network shows it."""
    module = getattr(kdfast.MGD(2, 2), mode)().requires_grad_(False)
    for layer in (module.generation[0], module.generation[2]):
        layer.weight.zero_()
        layer.bias.zero_()
        layer.weight[[0, 1], [0, 1], 1, 1] = 1.0
    x = torch.ones(3, 2, 64, 64, requires_grad=True)
    kept = [torch.autograd.grad(module(x, torch.zeros_like(x)), x)[0] * 3 / 2 for _ in range(2)]
    for mask in kept:
        assert ((mask == 0) | (mask == 1)).all() and torch.equal(mask[:, 0], mask[:, 1])
        # A share of 4096 draws has a standard deviation of 0.0075.
        assert ((mask.mean((1, 2, 3)) - 0.35).abs() < 0.04).all()
        assert not torch.equal(mask[0], mask[1])
    assert not torch.equal(*kept)


# ---- FGD: boxes ------------------------------------------------------------------------------------------------------
BOXES = {
    "none": [],
    "one cell": [[8, 8, 8, 8]],
    "the image": [[0, 0, 80, 40]],
    "overlapping": [[0, 0, 80, 40], [10, 10, 30, 30], [20, 5, 25, 39]],
    "beyond the image": [[-50, -5, 30, 100]],
    "outside": [[100, 100, 120, 120]],
}


@pytest.mark.parametrize("names", [[name] for name in BOXES] + [list(BOXES)], ids=str)
def test_fgd_boxes(names):
    """Beside a loop over boxes and cells; images have different numbers of boxes."""
    boxes = [torch.tensor(BOXES[name], dtype=torch.float32).reshape(-1, 4) for name in names]
    sizes = [(40, 80)] * len(boxes)
    maps = torch.zeros(len(boxes), 3, 5, 8, dtype=torch.float64)
    inside, outside = box_masks(boxes, sizes, maps)
    for i, (of_image, size) in enumerate(zip(boxes, sizes, strict=True)):
        want = oracles.box_masks(of_image, size, 5, 8)
        torch.testing.assert_close((inside[i], outside[i]), want, rtol=1e-15, atol=0)
    if names == ["the image"]:
        torch.testing.assert_close(inside.sum(), torch.tensor(40 / 54, dtype=torch.float64))


def test_fgd_rows_of_inf_are_no_boxes():
    """So that one graph serves every number of boxes."""
    torch.compiler.reset()
    module, (student, teacher, *_) = kdfast.FGD(3, 4), maps_of("FGD", torch.float32)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    sizes = [(40, 80)] * 2
    with torch._dynamo.config.patch(recompile_limit=1):
        for counts in itertools.product((0, 1, 3), repeat=2):
            boxes = [torch.tensor(BOXES["overlapping"])[:n] for n in counts]
            padded = torch.full((2, 4, 4), math.inf)
            for rows, of_image in zip(padded, boxes, strict=True):
                rows[: len(of_image)] = of_image
            masks = box_masks(boxes, sizes, student)
            assert all(map(torch.equal, box_masks(padded, sizes, student), masks))
            torch.testing.assert_close(
                compiled(student, teacher, padded, sizes), module(student, teacher, boxes, sizes)
            )


def test_fgd_nan_in_a_box():
    boxes = torch.tensor([[0.0, 0, float("nan"), 5], [1, 1, 2, 2]])
    maps = [torch.randn(2, 4, 3, 3) for _ in range(2)]
    loss = kdfast.FGD(4, 4)(*maps, [boxes, boxes[1:]], [(9, 9)] * 2)
    assert loss.isnan()


def test_fgd_of_equal_networks_is_its_relation():
    """0 at the start, where the blocks add nothing."""
    x = torch.randn(2, 4, 3, 5, requires_grad=True)
    loss = kdfast.FGD(4, 4)(x, x.detach(), [torch.tensor([[0.0, 0, 5, 5]])] * 2, [(9, 9)] * 2)
    loss.backward()
    assert loss == 0 and not x.grad.any()


def official_fgd_sums(student, teacher, temperature=0.5):
    """The attention of the official code in the dtype of the maps: products of roots, and a sum of squares."""
    (batch, _, height, width), x = teacher.shape, teacher.abs()
    places = (x.mean(1).flatten(1) / temperature).softmax(1).view(batch, 1, height, width) * (height * width)
    channels = (x.mean((2, 3)) / temperature).softmax(1)[:, :, None, None] * x.shape[1]
    s, t = (z * places.sqrt() * channels.sqrt() for z in (student, teacher))
    return (s - t).square().sum()


def test_fgd_where_attention_underflows():
    """Activations of 300 in float32: the root's gradient is NaN, the product's is that of float64."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 4, 4) * 300, torch.randn(2, 6, 4, 4) * 300
    leaf = teacher.clone().requires_grad_()
    assert torch.autograd.grad(official_fgd_sums(student, leaf), leaf)[0].isnan().any()
    module, boxes = kdfast.FGD(6, 6), [torch.tensor([[0.0, 0, 8, 8]])] * 2
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = teacher.to(dtype, copy=True).requires_grad_()
        loss = copy.deepcopy(module).to(dtype)(student.to(dtype), leaf, boxes, [(16, 16)] * 2)
        results.append((loss.double(), torch.autograd.grad(loss, leaf)[0].double()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-5 * float(results[1][1].abs().max()))


# ---- half precision --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["CWD", "PKD", "FGD"])
def test_maps_under_autocast(name, dtype):
    """Maps of the low dtype, up to 6e4 in float16: finite, and that of float64 on the same numbers."""
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 4, 6, 5) for _ in range(2))
    student, teacher = ((x / x.abs().max() * (6e4 if name == "PKD" else 100)).to(dtype) for x in (student, teacher))
    more = ([torch.tensor([[0.0, 0, 8, 8]])] * 2, [(16, 16)] * 2) if name == "FGD" else ()
    module = kdfast.FGD(4, 4) if name == "FGD" else getattr(kdfast, name)()
    leaf = student.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        loss = module(leaf, teacher, *more)
    want = copy.deepcopy(module).double()(student.double(), teacher.double(), *more)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want.detach(), rtol=1e-5, atol=0)
    assert torch.autograd.grad(loss, leaf)[0].isfinite().all()


def test_cwd_where_the_published_form_is_not_finite():
    """The logarithm of a softmax of float32 is -inf from gaps of 103 on, and its product with 0 is NaN."""
    student, teacher = (torch.tensor([0.0, 150.0, 0.0, 0.0]).roll(i).view(1, 1, 2, 2) for i in range(2))
    p, q = (x.flatten(2).softmax(2) for x in (teacher, student))
    assert not (p * (p.log() - q.log())).sum().isfinite()
    loss = kdfast.CWD(temperature=1.0)(student, teacher)
    torch.testing.assert_close(loss, torch.tensor(150.0))


def test_sums_in_float16_overflow_where_ours_do_not():
    """What mmrazor's users see as NaN under AMP: a sum of squares beyond 65504."""
    student, teacher = (torch.full((1, 4, 16, 16), x, dtype=torch.float16) for x in (40.0, 10.0))
    assert official_fgd_sums(student, teacher).isinf()
    results = []
    for dtype in (torch.float16, torch.float64):
        leaf, module = student.to(dtype, copy=True).requires_grad_(), kdfast.FGD(4, 4)  # what is drawn adds nothing yet
        module = module.double() if dtype == torch.float64 else module
        loss = module(leaf, teacher.to(dtype), [torch.zeros(0, 4)], [(16, 16)])
        results.append((loss.double(), torch.autograd.grad(loss, leaf)[0].double()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=2**-10, atol=2**-24)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["MGD", "FGD", "SimKD", "ReviewKD"])
def test_layers_take_the_largest_half(name, dtype):
    """Maps up to 6e4, in and out of autocast: the loss of float64 on the same numbers, and finite gradients."""
    torch.manual_seed(0)
    module, (student, teacher, *more) = MODULES[name][0](), maps_of(name, torch.float32)
    several = isinstance(student, list)
    student, teacher = (
        [(x / x.abs().max() * 6e4).to(dtype) for x in (side if several else [side])] for side in (student, teacher)
    )
    more = [x.to(torch.float64) if isinstance(x, torch.Tensor) else x for x in more]
    pair = [side if several else side[0] for side in ([x.double() for x in student], [x.double() for x in teacher])]
    want = copy.deepcopy(module).double()(*pair, *more)
    for autocast in (False, True):
        leaves = [x.clone().requires_grad_() for x in student]
        with torch.autocast("cpu", dtype, enabled=autocast):
            loss = module(*((leaves, teacher) if several else (leaves[0], teacher[0])), *more)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
        for g in torch.autograd.grad(loss, [*leaves, *module.parameters()]):
            assert g.isfinite().all()


# ---- the layers ------------------------------------------------------------------------------------------------------
MODULES = {
    "MGD": (lambda: kdfast.MGD(3, 4), ((2, 3, 5, 4), (2, 4, 5, 4))),
    "FGD": (lambda: kdfast.FGD(3, 4), ((2, 3, 5, 4), (2, 4, 5, 4))),
    "SimKD": (lambda: kdfast.SimKD(3, 4), ((2, 3, 5, 4), (2, 4, 5, 4))),
    "ReviewKD": (
        lambda: kdfast.ReviewKD([3, 4], [4, 2]),
        ([(2, 3, 7, 5), (2, 4, 3, 2)], [(2, 4, 9, 6), (2, 2, 3, 2)]),
    ),
}


def maps_of(name, dtype=torch.float64):
    x = [[torch.randn(s, dtype=dtype) for s in side] if isinstance(side, list) else torch.randn(side, dtype=dtype)
         for side in MODULES[name][1]]  # fmt: skip
    if name == "FGD":
        return [*x, [torch.tensor([[0.0, 0, 8, 8]], dtype=dtype), torch.zeros(0, 4, dtype=dtype)], [(16, 16)] * 2]
    return [*x, torch.rand(2, 1, 5, 4) < 0.5] if name == "MGD" else x


@pytest.mark.parametrize("name", MODULES)
def test_gradients(name):
    """Also of the parameters."""
    module, (student, teacher, *more) = MODULES[name][0]().double(), maps_of(name)
    several = isinstance(student, list)
    leaves = [x.requires_grad_() for x in (student if several else [student])]
    names, parameters = zip(*module.named_parameters(), strict=True)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn_like(p) * 0.1)  # off the zeros of the start

    def loss(*tensors):
        values, of_module = tensors[: len(leaves)], dict(zip(names, tensors[len(leaves) :], strict=True))
        state = {**of_module, **{k: v.clone() for k, v in module.named_buffers()}}
        return torch.func.functional_call(module, state, (list(values) if several else values[0], teacher, *more))

    torch.autograd.gradcheck(loss, (*leaves, *parameters), atol=1e-6)


@pytest.mark.parametrize("name", MODULES)
def test_copies_and_state(name):
    module, x = MODULES[name][0]().double().eval(), maps_of(name)
    other = MODULES[name][0]().double().eval()
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(*x), other(*x)) and torch.equal(module(*x), copy.deepcopy(module)(*x))
    assert module.to(torch.bfloat16)(*maps_of(name, torch.float32)).isfinite()


@pytest.mark.parametrize("name", MODULES)
def test_compiled(name):
    torch.compiler.reset()
    module, x = MODULES[name][0](), maps_of(name, torch.float32)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*x), module(*x))


def test_simkd_is_used_with_the_teachers_classifier():
    module = kdfast.SimKD(3, 4).eval()
    student = torch.randn(2, 3, 6, 6)
    assert module.project(student).shape == (2, 4, 6, 6) and module.project(student, 3).shape == (2, 4, 3, 3)


@pytest.mark.parametrize("shape", [(2, 4, 6, 5), (2, 4, 3, 4), (2, 4, 8, 8)], ids=str)
def test_simkd_that_refuses_a_width_leaves_the_statistics(shape):
    """Of a teacher as high as the student, lower and higher."""
    module = kdfast.SimKD(3, 4)
    with pytest.raises(ValueError, match="teacher must have the student's width"):
        module(torch.randn(2, 3, 6, 7), torch.randn(shape))
    assert all(norm.num_batches_tracked == 0 for norm in module.modules() if isinstance(norm, torch.nn.BatchNorm2d))


# ---- bad input -------------------------------------------------------------------------------------------------------
def fgd(s, t, boxes=None, sizes=None):
    boxes = [torch.zeros(0, 4)] * 2 if boxes is None else boxes
    return kdfast.FGD(3, 4)(s, t, boxes, [(16, 16)] * 2 if sizes is None else sizes)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s, t: kdfast.MGD(4, 4)(s, t), ValueError, r"student must have student_channels=4 channels"),
        (lambda s, t: kdfast.MGD(3, 4)(s, t[..., :3]), ValueError, "teacher must have the student's height and width"),
        (lambda s, t: kdfast.MGD(3, 4)(s, t, torch.ones(2, 1, 5, 3)), ValueError, "mask must be bool or floating and"),
        (lambda s, t: kdfast.MGD(3, 4)(s, t, torch.ones(2, 1, 5, 4).long()), ValueError, "mask must be bool or float"),
        (lambda s, t: kdfast.MGD(3, 4, 1.5), ValueError, "mask_ratio must be"),
        (lambda s, t: kdfast.MGD(0, 4), ValueError, "student_channels must be"),
        (lambda s, t: kdfast.FGD(3, 1), ValueError, "teacher_channels must be"),
        (lambda s, t: kdfast.FGD(3, 4, foreground=-1.0), ValueError, "foreground must be"),
        (lambda s, t: fgd(s, t, [torch.zeros(0, 4)]), ValueError, "boxes must have one entry for each of the 2 images"),
        (lambda s, t: fgd(s, t, [torch.zeros(4)] * 2), ValueError, r"boxes\[0\] must be \(n, 4\), got shape \(4,\)"),
        (lambda s, t: fgd(s, t, [[1, 2, 3, 4]] * 2), TypeError, r"boxes\[0\] must be a torch.Tensor, got list"),
        (lambda s, t: fgd(s, t, sizes=[(16, 16)]), ValueError, "image_sizes must have one entry"),
        (lambda s, t: fgd(s, t, [torch.ones(1, 4).bool()] * 2), TypeError, r"boxes\[0\] must be floating or integers"),
        (lambda s, t: fgd(s, t, [torch.ones(1, 4).cfloat()] * 2), TypeError, r"boxes\[0\] must be floating or intege"),
        (lambda s, t: fgd(s, t, sizes=[16, 16]), ValueError, r"image_sizes\[0\] must be \(height, width\), got 16"),
        (lambda s, t: fgd(s, t, sizes=[(16, 16, 3)] * 2), ValueError, r"image_sizes\[0\] must be \(height, width\)"),
        (lambda s, t: fgd(s, t, sizes=[(16, 0)] * 2), ValueError, r"image_sizes\[0\]\[1\] must be finite and above 0"),
        (lambda s, t: fgd(s, t, sizes=[(math.nan, 9)] * 2), ValueError, r"image_sizes\[0\]\[0\] must be finite and ab"),
        (lambda s, t: fgd(s, t, sizes=[("a", 9)] * 2), TypeError, r"image_sizes\[0\]\[0\] must be"),
        (lambda s, t: fgd(s, t, sizes=torch.ones(2, 3)), ValueError, r"image_sizes must be \(2, 2\)"),
        (lambda s, t: kdfast.ReviewKD([3], [4, 5]), ValueError, "one entry for each stage"),
        (lambda s, t: kdfast.ReviewKD([3], [4])([s, s], [t, t]), ValueError, "student must be a list of 1 maps, got 2"),
        (lambda s, t: kdfast.ReviewKD([3], [3])([s], [t]), ValueError, r"teacher\[0\] must have 3 channels"),
        (lambda s, t: kdfast.SimKD(3, 4)(s, t[..., :3]), ValueError, "teacher must have the student's width 4"),
        (lambda s, t: kdfast.SimKD(3, 4, factor=5), ValueError, "factor must be"),
        (lambda s, t: kdfast.SimKD(3, 4).project(s, 0), ValueError, "size must be at least 1, got 0"),
        (lambda s, t: kdfast.SimKD(3, 4).project(s, 2.5), TypeError, "size must be an int, got float"),
        (lambda s, t: kdfast.PKD()(s, t), ValueError, "teacher must have the student's 3 channels"),
        (lambda s, t: kdfast.PKD()(t, t[..., :3]), ValueError, "teacher must have the student's width 4 where the hei"),
        (lambda s, t: kdfast.PKD()(t[:1, :, :1, :1], t[:1, :, :1, :1]), ValueError, "more than one value a channel"),
        (lambda s, t: kdfast.CWD()(s, t), ValueError, "teacher must have the student's shape"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 3, 5, 4), torch.randn(2, 4, 5, 4))
