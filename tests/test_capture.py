"""`kdfast.capture`: the layers' values, what becomes of them, and every way to run a model."""

import copy
import gc
import io
import os
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from copies import DUPLICATES, pickled, saved
from processes import HAVE_GLOO, NO_GLOO, in_processes
from torch import nn
from torch.utils.checkpoint import checkpoint

import kdfast


class Block(nn.Module):
    """A residual block as torchvision's: one ReLU that runs twice and in place, and an addition in place."""

    def __init__(self, channels, inplace=True):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x):
        out = self.conv2(self.relu(self.conv1(x)))
        out += x
        return self.relu(out)


class Net(nn.Module):
    """A stem, two blocks, a layer that takes keywords and returns a tuple, and a layer that need not run."""

    def __init__(self, inplace=True):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(Block(4, inplace), Block(4, inplace))
        self.pool = Pool()
        self.head = nn.Linear(4, 5)
        self.spare = nn.Linear(4, 5)

    def forward(self, x, spare=False):
        mean, _ = self.pool(maps=self.blocks(self.stem(x)))
        return self.spare(mean) if spare else self.head(mean)


class Pool(nn.Module):
    def forward(self, maps):
        return maps.mean((2, 3)), maps.amax((2, 3))


NAMES = ["stem", "blocks.0", "blocks.1.relu:input", "blocks.1", "head"]


def make(seed=0, **arguments):
    torch.manual_seed(seed)
    return Net(**arguments)


def images(seed=0, batch=2):
    return torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def by_hand(net, x):
    """What `NAMES` are for the images x, without a hook."""
    values = [net.stem(x)]
    for block in net.blocks:
        before = block.conv2(F.relu(block.conv1(values[-1]))) + values[-1]
        values += [before, F.relu(before)]
    del values[1]  # the first block's pre-activation is not among NAMES
    return [*values, net.head(values[-1].mean((2, 3)))]


def losses(values):
    return sum(value.square().mean() for value in values)


def check_step(features, run, net, x, rtol=1e-5):
    """One forward and backward: the values of `NAMES`, the model's own output and the gradients are those by hand."""
    output = run(x)
    values = features.values()
    net.zero_grad()
    losses([*values, output]).backward()
    wanted = by_hand(net, x)
    for name, value, want in zip(features, values, wanted, strict=True):
        torch.testing.assert_close(value, want, rtol=rtol, atol=1e-5, msg=name)
    torch.testing.assert_close(output, wanted[-1], rtol=rtol, atol=1e-5)
    parameters = [p for name, p in net.named_parameters() if not name.startswith("spare")]
    for grad, parameter in zip(torch.autograd.grad(losses([*wanted, wanted[-1]]), parameters), parameters, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=rtol, atol=1e-5)


def untouched(net):
    """No hook, and no attribute that the class has not made, is left on any layer."""
    return all(
        not layer._forward_hooks and not layer._forward_pre_hooks and "forward" not in vars(layer)
        for layer in net.modules()
    )


# ---- values ----------------------------------------------------------------------------------------------------------
def test_values_and_gradients():
    net = make()
    with kdfast.capture(net, NAMES) as features:
        assert list(features) == NAMES and len(features) == 5 and "head" in features and "stem:input" not in features
        for seed in range(2):
            check_step(features, net, net, images(seed))
        assert features["head"] is features["head"]
    assert untouched(net)


def test_one_name_without_a_list():
    net, x = make(), images()
    with kdfast.capture(net, "stem:input") as features:
        net(x)
        assert features["stem:input"] is x


def test_losses_take_the_values():
    student, teacher = make(0), make(1)
    names = ["stem", "blocks.1"]
    x = images()
    with kdfast.capture(student, names) as ours, kdfast.capture(teacher, names) as theirs:
        with torch.no_grad():
            teacher(x)
        student(x)
        loss = kdfast.AT()(ours.values(), theirs.values())
    loss.backward()
    assert student.stem.weight.grad.abs().sum() > 0 and teacher.stem.weight.grad is None


def test_a_layer_that_runs_several_times_gives_its_last_run():
    net, x = make(), images()
    with kdfast.capture(net, ["blocks.0.relu", "blocks.0.relu:input", "blocks.0"]) as features:
        net(x)
        assert torch.equal(features["blocks.0.relu"], features["blocks.0"])
        assert torch.equal(features["blocks.0.relu"], features["blocks.0.relu:input"].relu())
        assert features["blocks.0.relu:input"].min() < 0


def test_what_is_no_tensor_comes_as_it_is():
    net, x = make(), images()
    with kdfast.capture(net, ["pool", "pool:input", "blocks.1"]) as features:
        net(x)
        assert isinstance(features["pool"], tuple)
        assert torch.equal(features["pool"][1], features["blocks.1"].amax((2, 3)))
        assert features["pool:input"] is features["blocks.1"]  # a keyword is an argument too


def test_the_input_of_a_layer_without_arguments_is_none():
    class Constant(nn.Module):
        def forward(self):
            return torch.ones(3)

    net = nn.ModuleDict({"constant": Constant()})
    net.forward = lambda x: net["constant"]() + x
    with kdfast.capture(net, ["constant", "constant:input"]) as features:
        net(torch.zeros(3))
        assert features["constant"].sum() == 3 and features["constant:input"] is None


def test_names_of_one_layer_shared_by_two_parents():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    net.append(net[0])
    with kdfast.capture(net, ["0", "2"]) as features:
        net(torch.randn(2, 3))
        assert features["0"] is features["2"]  # one layer, whose last run counts


def test_only_runs_in_the_models_forward_count():
    net, x = make(), images()
    with kdfast.capture(net, ["stem"]) as features:
        net(x)
        value = features["stem"]
        net.stem(images(1))
        assert features["stem"] is value
        net(images(1))
        assert features["stem"] is not value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    net, x = make(), images()
    with kdfast.capture(net, ["stem", "blocks.1.relu:input"]) as features, torch.autocast("cpu", dtype=dtype):
        net(x)
        assert features["stem"].dtype == features["blocks.1.relu:input"].dtype == dtype


# ---- changed in place ------------------------------------------------------------------------------------------------
def test_a_value_changed_in_place_is_an_error():
    net = make()
    with kdfast.capture(net, ["blocks.0.conv1", "blocks.0.conv2"]) as features:
        net(images())
        for name in features:  # by the ReLU, and by the addition
            with pytest.raises(RuntimeError, match=f"{name}: the tensor was changed in place .* inplace=False"):
                features[name]
    net = make(inplace=False)
    with kdfast.capture(net, ["blocks.0.conv1", "blocks.0.conv2"]) as features:
        net(images())
        assert features["blocks.0.conv1"].min() < 0
        with pytest.raises(RuntimeError, match="changed in place"):
            features["blocks.0.conv2"]


@pytest.mark.parametrize("keyword", [False, True])
def test_the_input_of_a_layer_that_works_in_place(keyword):
    relu = nn.ReLU(inplace=True)
    net = nn.ModuleDict({"relu": relu})
    net.forward = lambda x: relu(input=x * 2) if keyword else relu(x * 2)
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    with kdfast.capture(net, ["relu:input", "relu"]) as features:
        output = net(x)
        assert features["relu:input"].tolist() == [-2, 4] and output.tolist() == [0, 4]
        assert features["relu"] is output
        (output + 10 * features["relu:input"]).sum().backward()
    assert x.grad.tolist() == [20, 22]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_graph(mode):
    net, x = make(), images()
    with kdfast.capture(net, NAMES) as features, mode():
        net(x)
        for value, want in zip(features.values(), by_hand(net, x), strict=True):
            torch.testing.assert_close(value, want)
            assert not value.requires_grad


def test_a_teacher_in_inference_mode():
    """Its values can be saved for the student's backward, and are those of the moment: no changes are counted there."""
    student, teacher, x = make(0), make(1), images()
    names = ["stem", "blocks.0.conv1", "blocks.1.relu:input", "head"]
    with kdfast.capture(student, ["stem"]) as ours, kdfast.capture(teacher, names) as theirs:
        with torch.inference_mode():
            teacher(x)
        student(x)
        assert not any(value.is_inference() for value in theirs.values())
        before = teacher.blocks[0].conv1(teacher.stem(x))
        torch.testing.assert_close(theirs["blocks.0.conv1"], before)
        (ours["stem"] * theirs["stem"]).sum().backward()
        want = torch.autograd.grad((student.stem(x) * teacher.stem(x)).sum(), student.stem.weight)[0]
    torch.testing.assert_close(student.stem.weight.grad, want)


# ---- errors ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["stemm"], ValueError, r"names: the model has no layer 'stemm' \(near: stem\)"),
        (["blocks.0.relu:input", "blocks.2.relu:input"], ValueError, r"'blocks.2.relu' \(near: blocks.\d.relu, "),
        (["hed", "xyz"], ValueError, r"'hed' \(near: head\), no layer 'xyz' \(near: stem, blocks, pool, head, spare\)"),
        (["module.stem"], ValueError, r"'module.stem' \(near: .*stem"),
        ([""], ValueError, "no layer ''"),
        ([], ValueError, "names must have at least one layer"),
        (["stem", "head", "stem"], ValueError, "names must differ from each other, got 'stem' twice"),
        ([3], TypeError, "names must be strings, got int"),
        (None, TypeError, "names must be a list of layer names, got NoneType"),
    ],
)
def test_wrong_names(names, error, message):
    net = make()
    with pytest.raises(error, match=message):
        kdfast.capture(net, names)
    assert untouched(net)


def test_wrong_models():
    with pytest.raises(TypeError, match="model must be an nn.Module, got function"):
        kdfast.capture(lambda x: x, ["stem"])
    with pytest.raises(ValueError, match="nn.DataParallel .* DistributedDataParallel"):
        kdfast.capture(nn.DataParallel(make()), ["stem"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="a scripted model runs without hooks"):
        kdfast.capture(scripted, ["0"])


def test_reading_what_is_not_there():
    net, x = make(), images()
    with kdfast.capture(net, ["stem", "head", "spare"]) as features:
        with pytest.raises(RuntimeError, match="stem: the model has not run since the capture began"):
            features["stem"]
        net.stem(x)
        with pytest.raises(RuntimeError, match="stem: the model has not run"):
            features["stem"]
        net(x)
        with pytest.raises(RuntimeError, match="spare: the layer did not run in the model's last forward"):
            features["spare"]
        net(x, spare=True)
        assert features["spare"].shape == (2, 5)
        with pytest.raises(RuntimeError, match="head: the layer did not run"):
            features["head"]
        with pytest.raises(KeyError, match="blocks is not captured; captured: stem, head, spare"):
            features["blocks"]
    with pytest.raises(RuntimeError, match="stem: the capture has ended"):
        features["stem"]


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_a_forward_that_fails(how):
    """Neither the values of the forward before nor those of the layers that ran are served."""
    net = make()
    run = net if how == "eager" else torch.compile(net, backend="aot_eager")
    with kdfast.capture(net, ["stem", "blocks.1"]) as features:
        run(images())
        for wrong in (images()[:, :2], torch.randn(2, 3, 6, 0)):
            with pytest.raises(RuntimeError):
                run(wrong)
            with pytest.raises(RuntimeError, match="stem: the model's last forward raised an error, or still runs"):
                features["stem"]
            check_stem(features, net, run, images())
    torch._dynamo.reset()
    assert untouched(net)


def test_a_forward_that_fails_after_a_layer():
    net = make()
    handle = net.head.register_forward_hook(lambda *_: 1 / 0)
    with kdfast.capture(net, ["stem", "blocks.1"]) as features:
        with pytest.raises(ZeroDivisionError):
            net(images())
        net.stem(images(1))
        for name in features:
            with pytest.raises(RuntimeError, match=f"{name}: the model's last forward raised an error"):
                features[name]
        handle.remove()
        check_stem(features, net, net, images())


def check_stem(features, net, run, x):
    run(x)
    check_stem_of(features, net, x)


def check_stem_of(features, net, x):
    torch.testing.assert_close(features["stem"], net.stem(x), rtol=1e-5, atol=1e-5)


# ---- what is left ----------------------------------------------------------------------------------------------------
def test_no_activation_is_kept():
    net = make()
    features = kdfast.capture(net, NAMES)
    net(images())
    first = [weakref.ref(value) for value in features.values()]
    running = []
    handle = net.head.register_forward_hook(lambda *_: running.append([value() for value in first]))
    net(images(1))
    handle.remove()
    assert running == [[None] * 5], "values of the last forward lived on in the next"
    second = [weakref.ref(value) for value in features.values()]
    assert all(value() is not None for value in second)
    features.remove()
    assert all(value() is None for value in second) and untouched(net)
    features.remove()  # as the hooks' own handles, twice does nothing


def test_hooks_leave_with_an_error():
    net = make()
    with pytest.raises(ZeroDivisionError):
        with kdfast.capture(net, NAMES):
            1 / 0  # noqa: B018
    assert untouched(net)


def test_other_hooks_and_forwards_stay():
    net = make()
    seen = []
    net.stem.register_forward_hook(lambda layer, args, output: seen.append(output))
    own = net.head.forward = net.head.forward
    with kdfast.capture(net, NAMES) as features:
        net(images())
        assert features["stem"] is seen[0]
    net(images())
    assert len(seen) == 2 and net.head.forward is own


def test_two_captures_of_one_model():
    net = make()
    first = kdfast.capture(net, ["stem", "blocks.1"])
    with kdfast.capture(net, ["stem", "blocks.1.relu:input"]) as second:
        net(images())
        assert first["stem"] is second["stem"]
        assert torch.equal(first["blocks.1"], second["blocks.1.relu:input"].relu())
    check_stem(first, net, net, images(1))
    first.remove()
    assert untouched(net)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
def test_copies_of_the_model_alone_are_not_watched(duplicate):
    """As for a moving average of the weights, in the middle of the training."""
    net, x = make(), images()
    with kdfast.capture(net, NAMES) as features:
        net(x)
        value = features["stem"]
        other = duplicate(net)
        kept = [hook.value for layer in other.modules() for hook in watching(layer) if hasattr(hook, "value")]
        assert len(kept) == len(NAMES)
        with torch.no_grad():
            other.stem.weight.zero_()
            torch.testing.assert_close(other(x), by_hand(other, x)[-1])
        assert features["stem"] is value and value.std() > 0
        assert all(value.content is None for value in kept), "a copy without a capture keeps its activations"
        with kdfast.capture(other, ["stem"]) as second:
            other(x)
            assert torch.equal(second["stem"], other.stem(x)) and features["stem"] is value
    torch.testing.assert_close(other(x), by_hand(other, x)[-1])


def watching(layer):
    return [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]


class Watched(nn.Module):
    """A network and a capture of it."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.features = kdfast.capture(net, NAMES)

    def forward(self, x):
        return self.net(x)


class CaptureFirst(Watched):
    """The capture is copied before the network."""

    def __init__(self, net):
        nn.Module.__init__(self)
        self.__dict__ = {"features": kdfast.capture(net, NAMES), **self.__dict__}
        self.net = net


class OfItself(Net):
    """A network that holds its own capture."""

    def __init__(self):
        super().__init__()
        self.features = kdfast.capture(self, NAMES)
        self.__dict__["net"] = self


MOMENTS = ["before a forward", "after a forward", "after a step", "after an error", "after remove"]


@pytest.mark.parametrize("duplicate", DUPLICATES)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("build", [lambda: Watched(make()), lambda: CaptureFirst(make()), OfItself])
def test_copies_of_a_capture_watch_their_own_model(build, moment, duplicate):
    torch.manual_seed(0)
    module, x = build(), images()
    value = None
    if moment == "after an error":
        with pytest.raises(RuntimeError):
            module(x[:, :2])
    elif moment != "before a forward":
        output = module(x)
        value = module.features["stem"]
        if moment == "after a step":
            losses([output, *module.features.values()]).backward()
            torch.optim.SGD(module.parameters(), lr=0.1).step()
        elif moment == "after remove":
            module.features.remove()
    other = duplicate(module)
    if moment == "after remove":
        other(x)
        with pytest.raises(RuntimeError, match="stem: the capture has ended"):
            other.features["stem"]
        assert untouched(other.net)
        return
    with pytest.raises(RuntimeError, match="stem: the model has not run since the capture began or was copied"):
        other.features["stem"]
    with torch.no_grad():
        other.net.stem.weight.add_(1.0)
    for seed in range(2):  # each serves its own batch, of its own weights
        check_step(other.features, other, other.net, images(seed + 1))
        if value is not None:
            assert module.features["stem"] is value
    theirs = other.features["stem"]
    check_step(module.features, module, module.net, images(3))
    assert other.features["stem"] is theirs
    other.features.remove()
    assert untouched(other.net) and not untouched(module.net)
    check_step(module.features, module, module.net, images(4))
    module.features.remove()
    assert untouched(module.net)


def test_copies_keep_no_activations():
    """Neither do files: those of a capture after a forward are as long as before."""

    def length(module):
        file = io.BytesIO()
        torch.save(module, file)
        return len(file.getvalue())

    module = Watched(make())
    before = length(module)
    module(images(batch=64))
    assert length(module) == before
    other = copy.deepcopy(module)
    other(images())
    values = [weakref.ref(value) for value in other.features.values()]
    del other
    gc.collect()
    assert all(value() is None for value in values)


def test_a_loaded_capture_and_new_hooks(tmp_path):
    """A new process counts its hooks from 0: those that are registered there replace none of the capture's."""
    module = Watched(make())
    torch.save(module, tmp_path / "module.pt")
    code = """
import sys
import torch
import test_capture
module = torch.load(sys.argv[1], weights_only=False)
layers = [layer for layer in module.net.modules() for _ in range(40)]
handles = [add(lambda *_: None) for x in layers for add in (x.register_forward_hook, x.register_forward_pre_hook)]
test_capture.check_step(module.features, module, module.net, test_capture.images())
print("as by hand")
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "module.pt")],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.stdout == "as by hand\n", run.stderr


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    """The values are those of the forward; a recomputation in the backward changes nothing."""

    class Checkpointed(Net):
        def forward(self, x):
            maps = checkpoint(lambda y: self.blocks(self.stem(y)), x, use_reentrant=reentrant)
            return self.head(self.pool(maps)[0])

    torch.manual_seed(0)
    net, x = Checkpointed(), images().requires_grad_()
    with kdfast.capture(net, ["stem", "blocks"]) as features:
        output = net(x)
        value = features["stem"]
        assert value.requires_grad != reentrant
        loss = output.square().sum()
        if not reentrant:
            loss = loss + value.square().sum() + features["blocks"].square().sum()
        loss.backward()
        assert features["stem"] is value
    got, net.stem.weight.grad = net.stem.weight.grad, None
    stem = net.stem(x)
    maps = net.blocks(stem.clone())
    loss = net.head(net.pool(maps)[0]).square().sum()
    if not reentrant:
        loss = loss + stem.square().sum() + maps.square().sum()
    loss.backward()
    torch.testing.assert_close(got, net.stem.weight.grad)


def test_a_wrapper_around_a_layer():
    """The name of a checkpointed layer is that of its wrapper, whose output has a graph."""
    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    net, x = make(), images().requires_grad_()
    net.blocks[0] = wrapper.checkpoint_wrapper(net.blocks[0], checkpoint_impl=wrapper.CheckpointImpl.REENTRANT)
    with kdfast.capture(net, ["blocks.0", "blocks.0.conv1"]) as features:
        net(x)
        assert features["blocks.0"].requires_grad


# ---- torch.compile ---------------------------------------------------------------------------------------------------
def compiled(net, how, backend="aot_eager"):
    """`net` compiled, so that a graph break is an error."""
    if how == "method":
        net.compile(fullgraph=True, backend=backend)
        return net
    return torch.compile(net, fullgraph=True, backend=backend)


@pytest.fixture
def graphs():
    """A function that says how many graphs were compiled in the test so far."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    start = counters["unique_graphs"]
    yield lambda: counters["unique_graphs"] - start
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["function", "method"])
@pytest.mark.parametrize("moment", ["capture, compile", "compile, capture", "compile, run, capture"])
def test_compile(how, moment, graphs):
    net = make()
    if moment == "capture, compile":
        features = kdfast.capture(net, NAMES)
        run = compiled(net, how)
    else:
        run = compiled(net, how)
        if "run" in moment:
            run(images())
        features = kdfast.capture(run, NAMES)
    before = graphs()
    for seed in range(3):
        check_step(features, run, net, images(seed))
    assert graphs() == before + 1, "steps compile anew"
    values = [weakref.ref(value) for value in features.values()]
    features.remove()
    gc.collect()
    assert all(value() is None for value in values)
    torch.testing.assert_close(run(images()), by_hand(net, images())[-1], rtol=1e-5, atol=1e-5)
    assert untouched(net) and all(value.content is None for value in features._forward.values.values())


def test_compile_with_inductor(graphs):
    net = make()
    with kdfast.capture(net, NAMES) as features:
        run = compiled(net, "function", "inductor")
        for seed in range(2):
            check_step(features, run, net, images(seed), rtol=1e-4)
    assert graphs() == 1


def test_compiled_values_are_never_changed_in_place(graphs):
    net, x = make(), images()
    with kdfast.capture(net, ["blocks.0.conv1", "blocks.0.conv2"]) as features:
        compiled(net, "function")(x)
        first = net.blocks[0].conv1(net.stem(x))
        torch.testing.assert_close(features["blocks.0.conv1"], first)
        torch.testing.assert_close(features["blocks.0.conv2"], net.blocks[0].conv2(first.relu()))


def test_compiled_networks_of_one_class(graphs):
    """torch.compile shares code between modules that are alike; each capture has the values of its own."""
    x = images()
    born_again = [make(seed) for seed in range(3)]
    runs = [compiled(net, "function") for net in born_again]
    features = kdfast.capture(born_again[0], ["stem"])
    for _ in range(2):
        for run in runs:
            run(images(1))
        check_stem(features, born_again[0], runs[0], x)
    with kdfast.capture(born_again[1], ["stem"]) as second:
        for _ in range(2):
            check_stem(second, born_again[1], runs[1], x)
            runs[2](images(1))
            torch.testing.assert_close(features["stem"], born_again[0].stem(x))
            check_stem(features, born_again[0], runs[0], x)
    features.remove()
    runs[0](x)
    assert all(map(untouched, born_again))


def test_second_capture_of_a_compiled_layer(graphs):
    net = make()
    run = compiled(net, "function")
    with kdfast.capture(net, ["stem"]) as first:
        check_stem(first, net, run, images())
        with kdfast.capture(net, ["stem", "stem:input"]) as second:
            check_stem(second, net, run, images())
            check_stem(first, net, run, images())
        check_stem(first, net, run, images())
    run(images())
    assert untouched(net)


def test_compiled_copies_are_not_watched(graphs):
    net, x = make(), images()
    run = compiled(net, "function")
    with kdfast.capture(net, ["stem"]) as features:
        check_stem(features, net, run, x)
        other = copy.deepcopy(net)
        with torch.no_grad():
            other.stem.weight.zero_()
        compiled(other, "function")(x)
        torch.testing.assert_close(features["stem"], net.stem(x))
        check_stem(features, net, run, images(1))


@pytest.mark.parametrize("inside", [False, True])
def test_compiled_copies_of_a_capture(inside, graphs):
    """The network is compiled inside of the module that is copied, or the copy's for itself."""
    net = make()
    run = compiled(net, "function")
    module = Watched(run if inside else net)
    check_step(module.features, run, net, images())
    other = copy.deepcopy(module)
    own = other.net._orig_mod if inside else other.net
    run_copy = other.net if inside else compiled(own, "function")
    with torch.no_grad():
        own.stem.weight.add_(1.0)
    for seed in range(2):
        check_step(other.features, run_copy, own, images(seed))
        check_step(module.features, run, net, images(seed + 2))
        check_stem_of(other.features, own, images(seed))


def test_compiled_layers(graphs):
    """Layers compiled one by one keep their names."""
    net = make()
    for index, block in enumerate(net.blocks):
        net.blocks[index] = compiled(block, "function")
    with kdfast.capture(net, NAMES) as features:
        for seed in range(2):
            check_step(features, net, net, images(seed))
    assert untouched_but_compiled(net)


def untouched_but_compiled(net):
    return not any(layer._forward_hooks or layer._forward_pre_hooks for layer in net.modules())


def test_compiled_training_step(graphs):
    """Forward, reading and loss in one graph."""
    net, x = make(), images()
    features = kdfast.capture(net, ["stem", "blocks.1.relu:input"])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x):
        output = net(x)
        return losses([output, *features.values()])

    loss = step(x)
    want = by_hand(net, x)
    torch.testing.assert_close(loss, losses([want[-1], want[0], want[2]]), rtol=1e-5, atol=1e-5)
    step(images(1))
    assert graphs() == 1


def test_compile_with_autocast_and_without_a_graph(graphs):
    net, x = make(), images()
    run = compiled(net, "function")
    with kdfast.capture(run, NAMES) as features:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run(x)
            assert features["stem"].dtype == torch.bfloat16 and features["stem"].requires_grad
        with torch.no_grad():
            run(x)
            assert features["stem"].dtype == torch.float32 and not features["stem"].requires_grad


# ---- distributed -----------------------------------------------------------------------------------------------------
def of_rank(rank):
    gradients = []
    for compile_ in (False, True):
        net = make()
        del net.spare
        run = torch.compile(nn.parallel.DistributedDataParallel(net), backend="aot_eager", disable=not compile_)
        with kdfast.capture(run, NAMES) as features:
            for seed in range(2):
                net.zero_grad()
                output = run(images(seed, batch=4)[2 * rank : 2 * rank + 2])
                losses([output, *features.values()]).backward()
        assert untouched(net)
        gradients.append([parameter.grad for parameter in net.parameters()])
    return gradients


@pytest.mark.skipif(not HAVE_GLOO, reason=NO_GLOO)
def test_ddp(tmp_path):
    """Two processes with half of the batch each have the gradients of one process, compiled and not."""
    ranks = in_processes(2, tmp_path, of_rank)
    net = make()
    del net.spare
    x = images(1, batch=4)
    values = by_hand(net, x)
    want = torch.autograd.grad(losses([values[-1], *values]), list(net.parameters()))
    for rank in ranks:
        for gradients in rank:
            for got, grad in zip(gradients, want, strict=True):
                torch.testing.assert_close(got, grad, rtol=1e-5, atol=1e-6)
