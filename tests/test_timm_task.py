"""`kdfast.integrations.timm` in timm's own training loop: its optimizers, checkpoints, averages, compile and ranks."""

import copy
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from copies import DUPLICATES
from processes import HAVE_GLOO, NO_GLOO, in_processes
from torch import nn

import kdfast

timm = pytest.importorskip("timm", reason="the [train] extra is not installed")
pytest.importorskip("timm.task", reason="this timm has no training tasks")

from timm.optim import create_optimizer_v2  # noqa: E402
from timm.scheduler import create_scheduler_v2  # noqa: E402
from timm.task import DistillationTeacher, load_task_ema_checkpoint, resume_task_checkpoint  # noqa: E402
from timm.utils import CheckpointSaver, ModelEmaV3, dispatch_clip_grad, unwrap_model  # noqa: E402

from kdfast.integrations.timm import DistillationTask  # noqa: E402
from kdfast.objectives import LOGITS, RECIPES, Term, of_layers, recipe  # noqa: E402
from kdfast.objectives.recipes import embedding, preactivation, stages  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES, N_DATA, SIZE = 7, 40, (3, 64, 64)
STUDENT = {"channels": (8, 8, 8, 16), "stem_width": 8}
FC = ("student.fc:input", "teacher.fc:input")
EQUAL = {"rtol": 1e-6, "atol": 1e-9}


def model(seed, **arguments):
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=CLASSES, **arguments)


def networks(**arguments):
    """A student with fewer channels than its teacher, two of whose stages have bottlenecks."""
    return model(0, **STUDENT, **arguments), model(1, **arguments)


def batch(rows=8, seed=2):
    numbers = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, *SIZE, generator=numbers)
    labels = torch.randint(CLASSES, (rows,), generator=numbers)
    return images, labels, torch.randperm(N_DATA, generator=numbers)[:rows]


def recipe_task(name, student, teacher, **arguments):
    torch.manual_seed(3)
    made = recipe(name, student, teacher, n_data=N_DATA, image_size=SIZE)
    return DistillationTask(student, teacher, made.terms, task_loss_weight=made.cross_entropy, **arguments)


def two_terms():
    """Of logits without, and of layers with layers of their own."""
    vid = kdfast.VID(16, 12, 96, init_variance=1.0)
    return [Term(kdfast.DKD(), 0.5, (*LOGITS, "labels")), Term(vid, 3.0, ("student.layer4", "teacher.layer4"))]


def state(module):
    return {name: x.clone() for name, x in module.state_dict().items()}


def assert_equal_states(got, want):
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert torch.equal(got[name], x), name


# ---- a step ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_learns_a_batch(name):
    student, teacher = networks()
    before = state(teacher)
    task = recipe_task(name, student, teacher).train()
    optimizer = create_optimizer_v2(task.get_trainable_module(), "adamw", lr=1e-3, weight_decay=0.02)
    images, labels, index = batch()
    losses = []
    for _ in range(6):
        result = task(images, labels, index)
        losses.append(result["loss"].item())
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
    assert torch.tensor(losses).isfinite().all() and losses[-1] < losses[0]
    assert all(p.grad is not None for p in task.get_trainable_module().parameters())
    assert_equal_states(teacher.state_dict(), before)
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_the_loss_is_the_sum_of_its_terms():
    student, teacher = networks()
    terms = [*two_terms(), Term(kdfast.AT(), 1000.0, of_layers(["layer3", "layer4"])), Term(kdfast.RKD(), 2.0, FC)]
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    task = DistillationTask(student, teacher, terms, criterion=criterion, task_loss_weight=0.7)
    images, labels, _ = batch()
    result = task(images, labels)
    names = ["layer3", "layer4", "fc:input"]
    with kdfast.capture(student, names) as s, kdfast.capture(teacher, names) as t:
        logits, targets = student(images), teacher(images)
        want = {
            "task_loss": F.cross_entropy(logits, labels, label_smoothing=0.1),
            "dkd_loss": kdfast.DKD()(logits, targets, labels),
            "vid_loss": terms[1].loss(s["layer4"], t["layer4"]),
            "at_loss": sum(kdfast.AT()(s[name], t[name]) for name in names[:2]),
            "rkd_loss": kdfast.RKD()(s["fc:input"], t["fc:input"]),
        }
    assert list(result) == ["loss", "output", *want]
    for name, value in want.items():
        torch.testing.assert_close(result[name], value)
    weights = dict(zip(want, (0.7, 0.5, 3.0, 1000.0, 2.0), strict=True))
    torch.testing.assert_close(result["loss"], sum(weights[name] * want[name] for name in want))
    torch.testing.assert_close(result["output"], logits)
    task.weights["rkd"] = 0.0
    torch.testing.assert_close(task(images, labels)["loss"], result["loss"] - 2.0 * result["rkd_loss"])


def test_without_a_task_loss_the_criterion_does_not_run():
    def criterion(logits, labels):
        raise AssertionError("the criterion ran")

    task = DistillationTask(
        *networks(), [Term(kdfast.KD(alpha=0.9), 1.0, (*LOGITS, "labels"))], criterion=criterion, task_loss_weight=0
    )
    images, labels, _ = batch()
    result = task(images, labels)
    assert "task_loss" not in result and torch.equal(result["loss"], result["kd_loss"])
    result["loss"] /= 2  # as timm does to accumulate gradients
    result["loss"].backward()


def test_targets_of_mixup_and_pairs_of_label_and_index():
    student, teacher = networks()
    images, labels, index = batch()
    mixed = 0.7 * F.one_hot(labels, CLASSES) + 0.3 * F.one_hot(labels.flip(0), CLASSES)
    task = DistillationTask(student, teacher, [Term(kdfast.KD(alpha=0.5), 1.0, (*LOGITS, "labels"))])
    result = task(images, mixed)
    torch.testing.assert_close(result["task_loss"], F.cross_entropy(result["output"], mixed))
    separate, together = (recipe_task("crd", *networks()) for _ in range(2))
    want, got = separate(images, labels, index), together(images, torch.stack([labels, index], 1))
    assert torch.equal(got["loss"], want["loss"]) and got["task_loss"] > 0


def test_autocast_and_a_frozen_teacher_in_every_mode():
    task = recipe_task("vid", *networks()).train()
    images, labels, _ = batch()
    with torch.autocast("cpu", torch.bfloat16):
        result = task(images, labels)
    assert result["output"].dtype == torch.bfloat16 and result["loss"].dtype == torch.float32
    result["loss"].backward()
    for mode in (True, False):
        task.train(mode)
        assert task.get_trainable_module().training is mode
        assert not any(module.training for module in task.teacher.modules())


@pytest.mark.parametrize("name", RECIPES)
def test_networks_in_bfloat16(name):
    task = recipe_task(name, *(network.bfloat16() for network in networks()), dtype=torch.bfloat16).train()
    images, labels, index = batch()
    result = task(images.bfloat16(), labels, index)
    result["loss"].backward()
    assert result["output"].dtype == torch.bfloat16 and result["loss"].isfinite()
    assert all(p.grad.isfinite().all() for p in task.get_trainable_module().parameters())


def test_the_teacher_gets_its_own_normalization():
    student, teacher = networks()
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, "mean": mean, "std": std}
    seen = []
    teacher.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    task = DistillationTask(student, DistillationTeacher(teacher), [Term(kdfast.KD())])
    images, labels, _ = batch()
    task(images, labels)

    def column(values):
        return torch.tensor(values).view(1, 3, 1, 1)

    own = (column(student.pretrained_cfg[name]) for name in ("std", "mean"))
    pixels = images * next(own) + next(own)
    torch.testing.assert_close(seen[0], (pixels - column(mean)) / column(std))
    teacher.pretrained_cfg = student.pretrained_cfg
    DistillationTask(student, teacher, [Term(kdfast.KD())])(images, labels)
    assert seen[1] is images


def test_no_gradient_goes_through_the_teacher():
    student, teacher = networks()
    seen = []
    teacher.register_forward_hook(lambda module, arguments, output: seen.append(output.requires_grad))
    images, labels, _ = batch()
    task = DistillationTask(student, teacher, [Term(kdfast.KD())])
    task(images.requires_grad_(), labels)["loss"].backward()
    assert seen == [False] and images.grad.any()


@pytest.mark.parametrize("loss", [nn.MSELoss(), kdfast.KD()], ids=lambda loss: type(loss).__name__)
def test_a_teacher_in_inference_mode(loss):
    """Whoever runs it, its logits and layers are what a loss can save for its backward."""
    student, teacher = networks()
    images, labels, _ = batch()
    logits = teacher.eval()(images)
    with torch.inference_mode():
        of_inference = teacher(images)
    task = DistillationTask(student, None, [Term(loss, name="kd")])
    got, want = (task(images, labels, teacher_logits=x) for x in (of_inference, logits.detach()))
    assert torch.equal(got["loss"], want["loss"])
    got["loss"].backward()
    assert all(p.grad is not None for p in student.parameters())

    class Inference(DistillationTask):
        @torch.inference_mode()
        def taught(self, input):
            return super().taught(input)

    terms = [Term(loss, name="kd"), Term(kdfast.AT(), 1000.0, of_layers(["layer3", "layer4"]))]
    got, want = (kind(student, teacher, terms).train()(images, labels) for kind in (Inference, DistillationTask))
    assert torch.equal(got["loss"], want["loss"])
    got["loss"].backward()


def test_a_teacher_by_its_name(monkeypatch):
    made = []

    def create_model(model_name, pretrained, **arguments):
        made.append((model_name, pretrained, arguments["num_classes"], arguments["in_chans"]))
        return model(1)

    monkeypatch.setattr("timm.task.distillation.create_model", create_model)
    task = DistillationTask(networks()[0], "test_resnet", [Term(kdfast.KD())])
    assert made == [("test_resnet", True, CLASSES, 3)] and isinstance(task.teacher, DistillationTeacher)
    assert task(*batch()[:2])["loss"].isfinite()


# ---- timm's loop -----------------------------------------------------------------------------------------------------
class Loop:
    """The calls of timm's train.py, in their order: two batches to a step, clipped, averaged, saved each epoch."""

    def __init__(self, folder, name, resume=None):
        self.task = recipe_task(name, *networks())
        self.optimizer = create_optimizer_v2(
            self.task.get_trainable_module(), "sgd", lr=0.01, weight_decay=1e-3, momentum=0.9, layer_decay=0.8
        )
        self.start = 0
        if resume is not None:
            self.start = resume_task_checkpoint(self.task, resume, optimizer=self.optimizer, log_info=False)
        self.task.setup_ema(decay=0.5)
        if resume is not None:
            load_task_ema_checkpoint(self.task, resume)
        self.saver = CheckpointSaver(
            model=self.task.get_trainable_module(),
            optimizer=self.optimizer,
            args=Namespace(model="test_resnet"),
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            task=self.task,
        )
        self.scheduler, _ = create_scheduler_v2(self.optimizer, sched="cosine", num_epochs=4, updates_per_epoch=1)
        if self.start:
            self.scheduler.step(self.start)

    def train(self, epochs):
        for epoch in range(self.start, epochs):
            self.task.get_trainable_module().train()
            self.optimizer.zero_grad()
            for number in (0, 1):
                images, labels, index = batch(seed=10 * epoch + number)
                loss = self.task(images, labels, index)["loss"]
                loss /= 2
                loss.backward()
            dispatch_clip_grad(self.task.get_clip_parameters(exclude_head=True), value=1.0)
            self.optimizer.step()
            self.task.update_ema(step=epoch + 1)
            self.scheduler.step(epoch + 1)
            self.validate()
            self.saver.save_checkpoint(epoch, metric=float(epoch))
        return self

    @torch.inference_mode()
    def validate(self):
        for ema in (False, True):
            network = self.task.get_eval_model(ema=ema).eval()
            assert network(batch()[0]).shape == (8, CLASSES)


@pytest.mark.parametrize("name", ["kd", "vid", "fitnets", "crd"])
def test_timms_loop_goes_on_from_its_checkpoint(name, tmp_path):
    whole = Loop(tmp_path, name).train(2)
    (tmp_path / "again").mkdir()
    resumed = Loop(tmp_path / "again", name, resume=tmp_path / "checkpoint-0.pth.tar")
    assert resumed.start == 1
    resumed.train(2)
    assert_equal_states(
        resumed.task.get_trainable_module().state_dict(), whole.task.get_trainable_module().state_dict()
    )
    for ema in (False, True):
        got, want = (unwrap_model(loop.task.get_eval_model(ema=ema)).state_dict() for loop in (resumed, whole))
        assert_equal_states(got, want)
    assert not torch.equal(got["fc.weight"], whole.task.get_eval_model().state_dict()["fc.weight"])


def test_a_checkpoint_is_a_plain_students(tmp_path):
    task = Loop(tmp_path, "crd").train(1).task
    saved = torch.load(tmp_path / "last.pth.tar", weights_only=False)
    assert {"bank_student", "bank_teacher", "z_student", "seed"} <= {
        name.split(".")[-1] for name in saved["task_state"]["losses"]
    }
    assert "task_state_ema" not in saved
    images, _, _ = batch()
    for kind, ema in (("state_dict", False), ("state_dict_ema", True)):
        plain = model(5, **STUDENT).eval()
        plain.load_state_dict(saved[kind])
        assert torch.equal(plain(images), task.get_eval_model(ema=ema).eval()(images))
    loaded = timm.create_model(
        "test_resnet", num_classes=CLASSES, checkpoint_path=str(tmp_path / "last.pth.tar"), **STUDENT
    )
    assert_equal_states(loaded.state_dict(), saved["state_dict_ema"])


def test_a_checkpoint_without_the_losses_is_refused():
    task = recipe_task("vid", *networks())
    plain = state(model(5, **STUDENT))
    with pytest.raises(RuntimeError, match="no task_state of the losses vid: .*strict=False"):
        task.load_checkpoint_state(plain)
    task.load_checkpoint_state(plain, strict=False)
    assert_equal_states(task.get_eval_model().state_dict(), plain)
    recipe_task("kd", *networks()).load_checkpoint_state(plain)  # has no state of its own
    other = recipe_task("fitnets", *networks()).get_checkpoint_state()["task_state"]
    with pytest.raises(RuntimeError, match="Missing key"):
        task.load_checkpoint_state(plain, other)


def test_averages_and_clipped_parameters():
    task = recipe_task("vid", *networks())
    trained = task.get_trainable_module()
    task.setup_ema(decay=0.75)
    before = state(trained.student)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1.0)
    task.update_ema()
    for name, parameter in task.get_eval_model(ema=True).module.named_parameters():
        torch.testing.assert_close(parameter, before[name] + 0.25)
    losses, student = list(trained.objective.parameters()), list(trained.student.parameters())
    for exclude_head, kept in ((False, student), (True, student[:-2])):
        got = list(task.get_clip_parameters(exclude_head=exclude_head))
        assert [id(p) for p in got] == [id(p) for p in [*kept, *losses]]


def test_parameter_groups_of_the_student_are_those_of_timm():
    student, teacher = networks()
    task = recipe_task("vid", student, teacher)
    arguments = {"opt": "adamw", "lr": 1.0, "weight_decay": 0.1, "layer_decay": 0.5}

    def groups(trained):
        names = {parameter: name for name, parameter in trained.named_parameters()}
        return {
            names[parameter].removeprefix("student."): (group["lr_scale"], group["weight_decay"])
            for group in create_optimizer_v2(trained, **arguments).param_groups
            for parameter in group["params"]
        }

    got, want = groups(task.get_trainable_module()), groups(student)
    assert {name: got[name] for name in want} == want
    losses = {name: value for name, value in got.items() if name.startswith("objective.")}
    assert len(losses) == len(list(task.get_trainable_module().objective.parameters()))
    assert {scale for scale, _ in losses.values()} == {1.0}
    vit = timm.create_model("test_vit", num_classes=CLASSES)
    made = recipe("rkd", vit, teacher)
    module = DistillationTask(vit, teacher, made.terms).get_trainable_module()
    assert module.no_weight_decay() == {f"student.{name}" for name in vit.no_weight_decay()} != set()


# ---- compile ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["dkd", "vid", "ofd", "crd"])
def test_compiled_networks_give_the_same_loss(name):
    plain, compiled = (recipe_task(name, *networks()).train() for _ in range(2))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    assert compiled.compile(backend=backend) is compiled.get_eval_model()
    parameters = [name for name, _ in compiled.get_trainable_module().named_parameters()]
    assert parameters == [name for name, _ in plain.get_trainable_module().named_parameters()]
    for seed in (2, 3):
        want, got = (task(*batch(seed=seed)) for task in (plain, compiled))
        want["loss"].backward()
        got["loss"].backward()
        torch.testing.assert_close(got["loss"], want["loss"])
        for one, other in zip(*(task.get_trainable_module().parameters() for task in (compiled, plain)), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    assert len(graphs) == 2  # one of the student, one of the teacher
    compiled.setup_ema()
    with torch.no_grad():
        compiled.get_eval_model(ema=True)(batch()[0])


# ---- ranks -----------------------------------------------------------------------------------------------------------
def ranked_task(gather=None):
    """Losses of samples and of relations, and CRD, in float64, on a student whose norms know no batch."""
    student, teacher = (network.double() for network in networks(norm_layer="groupnorm1"))
    torch.manual_seed(3)
    terms = [
        Term(kdfast.KD(), 0.9),
        Term(kdfast.DIST(), 2.0, gather=gather),
        Term(kdfast.RKD(), 1.0, FC, gather=gather),
        Term(kdfast.SP(), 30.0, ("student.layer4", "teacher.layer4"), gather=gather),
        Term(kdfast.VID(16, 12, 96), 1.0, ("student.layer4", "teacher.layer4")),
        Term(kdfast.CRD(16, 96, N_DATA, feature_dim=8, negatives=9), 0.8, (*FC, "index")),
    ]
    task = DistillationTask(student, teacher, terms, dtype=torch.float64).to(torch.float64)
    assert task.teacher.model.fc.weight.dtype == torch.float64
    return task


def descend(task, mine=slice(None)):
    """Two steps -> the losses and the state of all that is trained."""
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05)
    losses = []
    for step in range(2):
        images, labels, index = batch(seed=step)
        result = task(images[mine].double(), labels[mine], index[mine])
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        losses.append({name: value.detach() for name, value in result.items() if name != "output"})
    return losses, state(unwrap_model(task.get_trainable_module()))


KINDS = {"gathered": {}, "compiled": {}, "apart": {"gather": False}}


def of_rank(rank):
    seen = {}
    for kind, arguments in KINDS.items():
        task = ranked_task(**arguments)
        if rank:  # rank 0 has the parameters and the banks that count
            trained = task.get_trainable_module()
            with torch.no_grad():
                for x in (*trained.parameters(), trained.objective.crd.bank_student):
                    x.mul_(0.5)
        if kind == "compiled":
            task.compile(backend="aot_eager")
        assert task.prepare_distributed(broadcast_buffers=True) is task
        assert isinstance(task.get_trainable_module(), nn.parallel.DistributedDataParallel)
        ignored = task.get_trainable_module().parameters_to_ignore
        assert {"objective.crd.bank_student", "objective.crd.bank_teacher"} <= set(ignored)
        assert task.no_sync().__class__.__name__ == "_GeneratorContextManager"
        seen[kind] = descend(task, slice(4 * rank, 4 * rank + 4))
    return seen


@pytest.mark.skipif(not HAVE_GLOO, reason=NO_GLOO)
def test_two_ranks_are_one_process_with_the_whole_batch(tmp_path):
    losses, want = descend(ranked_task())
    ranks = in_processes(2, tmp_path, of_rank)
    for kind in ("gathered", "compiled"):
        for got in (seen[kind][1] for seen in ranks):
            assert got.keys() == want.keys()
            for name, x in want.items():
                torch.testing.assert_close(got[name], x, **EQUAL, msg=lambda text, at=(kind, name): f"{at}: {text}")
        for step, whole in enumerate(losses):
            of_ranks = [seen[kind][0][step] for seen in ranks]
            for name, x in whole.items():
                mean = sum(values[name] for values in of_ranks) / 2
                torch.testing.assert_close(mean, x, **EQUAL, msg=lambda text, at=(kind, name): f"{at}: {text}")
            assert torch.equal(*(values["rkd_loss"] for values in of_ranks))
    # Each rank for itself is another loss, of which the ranks' students are still equal.
    apart = sum(seen["apart"][0][0]["rkd_loss"] for seen in ranks) / 2
    assert (apart - losses[0]["rkd_loss"]).abs() > 1e-3
    assert_equal_states(*(seen["apart"][1] for seen in ranks))


# ---- layers and errors -----------------------------------------------------------------------------------------------
def test_layers_of_architectures():
    names = {"test_resnet": "layer", "test_convnext": "stages.", "test_efficientnet": "blocks."}
    for name, prefix in names.items():
        network = timm.create_model(name, num_classes=CLASSES)
        found = stages(network)
        assert list(found) == [4, 8, 16, 32] and all(layer.startswith(prefix) for layer in found.values())
        with kdfast.capture(network.eval(), [*found.values(), embedding(network)]) as features:
            logits = network(torch.zeros(1, *SIZE))
            for stride, layer in found.items():
                assert features[layer].shape[2] == SIZE[1] // stride
            classifier = network.get_submodule(embedding(network).removesuffix(":input"))
            assert torch.equal(classifier(features[embedding(network)]), logits)
    teacher = model(1)
    layer, norm = preactivation(teacher, "layer3")
    assert layer == "layer3.0.act3:input" and norm is teacher.layer3[0].bn3
    with pytest.raises(ValueError, match="stages.1 of ConvNeXt does not end with batch norm and ReLU"):
        preactivation(timm.create_model("test_convnext"), "stages.1")


@pytest.mark.parametrize("student", ["test_vit", "test_convnext", "test_efficientnet"])
@pytest.mark.parametrize("name", ["kd", "rkd", "sp", "crd", "at", "fitnets", "vid"])
def test_recipes_across_architectures(student, name):
    student, teacher = (
        timm.create_model(student, num_classes=CLASSES, img_size=64)
        if "vit" in student
        else (timm.create_model(student, num_classes=CLASSES)),
        model(1),
    )
    images, labels, index = batch()
    if name in ("at", "fitnets", "vid") and hasattr(student, "patch_embed"):
        with pytest.raises(
            ValueError, match=r"student must have stages of maps \(B, C, H, W\), got shape \(1, 1[67], "
        ):
            recipe_task(name, student, teacher)
        return
    recipe_task(name, student, teacher)(images, labels, index)["loss"].backward()
    assert all(p.grad is not None for p in student.parameters())


def test_wrong_recipes():
    student, teacher = networks()
    with pytest.raises(ValueError, match="name must be one of kd, dkd, .*, got 'kdd'"):
        recipe("kdd", student, teacher)
    with pytest.raises(TypeError, match="teacher must be an nn.Module, got str"):
        recipe("kd", student, "resnet50")
    with pytest.raises(ValueError, match="n_data must be the number of samples of the training set"):
        recipe("crd", student, teacher, image_size=SIZE)
    with pytest.raises(ValueError, match="lists no stages in feature_info: .* those of Sequential are in 0, 1"):
        recipe("at", nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), teacher)
    with pytest.raises(ValueError, match="names no classifier in pretrained_cfg: .* are in 0"):
        recipe("rkd", nn.Sequential(nn.Conv2d(3, 4, 1)), teacher)
    before = [module.training for module in student.modules()]
    recipe("vid", student, teacher, image_size=SIZE)
    assert [module.training for module in student.modules()] == before
    labels = torch.arange(N_DATA) % CLASSES
    crd = recipe("crd", student, teacher, n_data=N_DATA, labels=labels, image_size=SIZE).terms[0].loss
    assert torch.equal(crd.labels, labels) and crd.student_dim == 16 and crd.teacher_dim == 96


def test_wrong_tasks():
    student, teacher = networks()
    images, labels, _ = batch()
    with pytest.raises(TypeError, match="student must be an nn.Module, got str"):
        DistillationTask("resnet18", teacher, [])
    with pytest.raises(TypeError, match="int"):
        DistillationTask(student, 3, [Term(kdfast.KD())])
    with pytest.raises(ValueError, match="teacher must share no parameters with the student"):
        DistillationTask(student, student, [Term(kdfast.KD())])
    assert all(parameter.requires_grad for parameter in student.parameters())
    with pytest.raises(ValueError, match="terms must not be named 'task'"):
        DistillationTask(student, teacher, [Term(kdfast.KD(), name="task")])
    with pytest.raises(ValueError, match=r"no layer 'layer5' \(near: layer"):
        DistillationTask(student, teacher, [Term(kdfast.AT(), 1.0, of_layers(["layer5"]))])
    task = DistillationTask(student, teacher, [Term(kdfast.FitNets(), 1.0, ("student.layer2", "teacher.layer2"))])
    with pytest.raises(ValueError, match=r"term fitnets of \(8, 8, 8, 8\), \(8, 48, 8, 8\): teacher must have"):
        task(images, labels)
    task = recipe_task("at", student, teacher)
    with pytest.raises(ValueError, match="teacher_logits must be None, for the terms read the teacher's layers layer"):
        task(images, labels, teacher_logits=torch.zeros(8, CLASSES))
    for weight, error, message in (
        ("1", TypeError, "a number, got str"),
        (float("nan"), ValueError, "finite, got nan"),
    ):
        with pytest.raises(error, match=f"task_loss_weight must be {message}"):
            DistillationTask(student, teacher, [Term(kdfast.KD())], task_loss_weight=weight)
    task = recipe_task("crd", student, teacher)
    with pytest.raises(
        ValueError, match="index must be the samples' places in the data set, which crd reads, got None"
    ):
        task(images, labels)


# ---- copies ----------------------------------------------------------------------------------------------------------
def timms_average(task):
    return ModelEmaV3(task).module.train()


def loss_by_hand(task, images):
    """Of AT, which reads layers of both networks, in new networks with the task's weights."""
    student, teacher = networks()
    student.load_state_dict(task.get_eval_model().state_dict())
    teacher.load_state_dict(task.teacher.model.state_dict())
    student.train(task.training)
    teacher.eval()
    (term,) = task.get_trainable_module().objective.terms
    sides = [[read.partition(".")[2] for read in side] for side in term.reads]
    with kdfast.capture(student, sides[0]) as s, kdfast.capture(teacher, sides[1]) as t:
        student(images), teacher(images)
        return sum(kdfast.AT()(s[a], t[b]) for a, b in zip(*sides, strict=True))


@pytest.mark.parametrize("duplicate", [*DUPLICATES, timms_average])
@pytest.mark.parametrize("moment", ["before a forward", "after a forward", "after a step"])
def test_copies_have_layers_of_their_own(moment, duplicate):
    """The losses of a task and of its copy are those of their own networks and batches, in turns."""
    task = recipe_task("at", *networks()).train()
    images, labels, _ = batch()
    if moment != "before a forward":
        result = task(images, labels)
        if moment == "after a step":
            optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01)
            result["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    other = duplicate(task)
    with torch.no_grad():
        for parameter in (*other.get_eval_model().parameters(), *other.teacher.parameters()):
            parameter.mul_(0.9)
    for seed in range(2):
        for number, each in enumerate((other, task)):
            x, _, _ = batch(seed=10 * seed + number)
            want = loss_by_hand(each, x)
            torch.testing.assert_close(each(x, labels)["at_loss"], want)
    other(images, labels)["loss"].backward()
    assert all(p.grad is not None for p in other.get_trainable_module().parameters())
    assert all(p.grad is None for p in task.get_trainable_module().parameters())


def test_copies_of_the_student_are_not_watched():
    task = recipe_task("at", *networks())
    copied = copy.deepcopy(task.get_eval_model())
    images, labels, _ = batch()
    want = task.eval()(images, labels)["loss"]
    copied(torch.zeros_like(images))
    assert torch.equal(task(images, labels)["loss"], want)
