"""Distillation as a training task of timm: any kdfast losses in timm's training loop, with its checkpoints."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdfast import distributed
from kdfast._extras import require
from kdfast.capture import capture
from kdfast.objectives.terms import Objective, Observed, Term, finite

if TYPE_CHECKING:
    from kdfast.ops.softmax_kl import TopK


__all__ = ["DistillationTask"]

_task = require("timm.task", extra="train")
_models = require("timm.models", extra="train")
_utils = require("timm.utils", extra="train")

# What a model without a pretrained_cfg is taken to expect.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DistillationTask(_task.TrainingTask):
    """A student that learns from the labels and from a frozen teacher, with any losses of layers and logits.

    ``task_loss_weight * criterion(logits, target) + sum term.weight * term.loss(...)``

    Example::

        task = DistillationTask(
            timm.create_model("resnet18"),
            timm.create_model("resnet34", pretrained=True),
            [Term(kdfast.KD(temperature=4.0)), Term(kdfast.AT(), 1000.0, of_layers(["layer3", "layer4"]))],
        )
        optimizer = create_optimizer_v2(task.get_trainable_module(), "sgd", lr=0.1)
        task(images, labels)["loss"].backward()

    student: a timm model, on its device, not wrapped. teacher: a model, its name in timm (with its pretrained weights)
    or timm's DistillationTeacher; None if each batch comes with `teacher_logits` of a store. terms: :class:`Term` s.
    criterion: of the student's logits and the targets, by default the cross-entropy; it does not run where
    task_loss_weight is 0. device: of the losses and the teacher, by default the student's. dtype: of a teacher that is
    made by its name; a loss keeps the type that it has. What the losses read and weigh is an :class:`Objective`'s.

    ``task(input, target, index=None, teacher_logits=None)`` returns a dict: ``loss``, ``output`` (the student's
    logits), ``task_loss`` and ``NAME_loss`` of each term, without its weight. `input` is normalised for the student; a
    teacher of another normalisation gets its own, and does not run where `teacher_logits` (B, C) are given, which may
    be a :class:`kdfast.TopK` for a loss that takes one. Where a term reads the index and a training loop knows nothing
    of it, `target` may be (B, 2) integers, label and index of each sample. ``task.weights``, name of a term -> weight,
    may be changed at any time; a term of weight 0 adds nothing, whatever its value is.

    - The teacher is in eval mode, without gradients, outside of DistributedDataParallel, in any mode of the task.
    - The losses with their layers and banks are in the module that DistributedDataParallel wraps, so
      ``get_trainable_module()`` has all that is trained. The eval model and the checkpoint's ``state_dict`` are the
      student alone, which a plain model of timm loads; the losses' state is the checkpoint's ``task_state``. The moving
      average (EMA) is the student's.
    - ``compile()`` compiles student and teacher, each for itself; losses have compiled kernels without it.
    - With several ranks, losses of relations among samples see the samples of all ranks, see ``Term.gather``.
    - A copy of the task, by copy.deepcopy or from a file, has networks, losses and captured layers of its own.

    Errors: TypeError and ValueError on what is no model, term or layer; ValueError for an index that is missing, and
    for `teacher_logits` where terms read the teacher's layers; a loss's own error on widths and shapes, with the name
    of its term.
    """

    def __init__(
        self,
        student: nn.Module | str,
        teacher: Any,
        terms: "Term | Sequence[Term]",
        *,
        criterion: Callable[..., Any] | nn.Module | None = None,
        task_loss_weight: float = 1.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        if not isinstance(student, nn.Module):
            raise TypeError(f"student must be an nn.Module, got {type(student).__name__}")
        device = next(student.parameters()).device if device is None else torch.device(device)
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        objective = Objective(terms).to(device)
        self.teacher: Any = None if teacher is None else _teacher(teacher, student, device, dtype)
        self.trainable_module = Trainable(student, objective)
        layers = objective.layers("teacher")
        if layers and teacher is None:
            raise ValueError(f"teacher must be a model, whose layers {', '.join(layers)} the terms read, got None")
        self._teacher_features = capture(self.teacher.model, layers) if layers else {}
        self.criterion: Callable[..., Any] = nn.CrossEntropyLoss() if criterion is None else criterion
        self.task_loss_weight: float = finite("task_loss_weight", task_loss_weight)
        if "task" in self.weights:
            raise ValueError("terms must not be named 'task', whose loss is the criterion's")
        if self.teacher is not None:
            self._set_normalization(student)

    def _set_normalization(self, student):
        """The teacher's input is ``scale * input + shift``; `_same_input`: it is the input itself."""
        student, teacher = (_normalization(_utils.unwrap_model(m)) for m in (student, self.teacher.model))
        self._same_input = student == teacher
        (mean, std), (teacher_mean, teacher_std) = (
            [torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in pair]
            for pair in (student, teacher)
        )
        for name, x in (("_scale", std / teacher_std), ("_shift", (mean - teacher_mean) / teacher_std)):
            self.register_buffer(name, x.to(device=self.device, dtype=self.dtype), persistent=False)

    @property
    def weights(self) -> dict[str, float]:
        """Name of a term -> its weight."""
        return self._trainable().objective.weights

    # ---- a step ------------------------------------------------------------------------------------------------------
    def forward(
        self, input: Tensor, target: Tensor, index: Tensor | None = None, teacher_logits: "TopK | Tensor | None" = None
    ) -> dict[str, Tensor]:
        """Losses and logits of a batch: input (B, C, H, W), target (B,) or as the criterion takes it, index (B,)."""
        objective = self._trainable().objective
        labels, index = self._targets(target, index, objective.readers("index"))
        if teacher_logits is not None and self._teacher_features:
            layers = ", ".join(self._teacher_features)
            raise ValueError(f"teacher_logits must be None, for the terms read the teacher's layers {layers}, too")
        taught = self.taught(input) if teacher_logits is None else {"logits": teacher_logits}
        taught = {name: _savable(x) for name, x in taught.items()}
        logits, losses = self.trainable_module(input, taught, labels, index)
        result = {"output": logits}
        loss = objective.total(losses, logits)
        if self.task_loss_weight:
            result["task_loss"] = self.criterion(logits, labels)
            loss = loss + self.task_loss_weight * result["task_loss"]
        return {"loss": loss, **result, **{f"{name}_loss": value for name, value in losses.items()}}

    @staticmethod
    def _targets(target, index, readers):
        if not readers:
            return target, None
        if index is None and target.dim() == 2 and target.shape[1] == 2 and not target.is_floating_point():
            target, index = target.unbind(1)
        if index is None:
            raise ValueError(
                f"index must be the samples' places in the data set, which {', '.join(readers)} reads, "
                "got None; pass it, or a target of (B, 2) integers: label and index"
            )
        return target, index

    @torch.no_grad()
    def taught(self, input: Tensor) -> dict[str, Tensor]:
        """What the teacher says about the images: its logits, and the layers that terms read, by their names."""
        if self.teacher is None:
            raise ValueError("teacher_logits must be given with each batch: the task has no teacher")
        logits = self.teacher(input if self._same_input else input * self._scale + self._shift)
        return {"logits": logits, **self._teacher_features}

    # ---- timm's interface --------------------------------------------------------------------------------------------
    def train(self, mode: bool = True) -> Any:
        """The student's and the losses' mode; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def prepare_distributed(self, device_ids: Any = None, **ddp_kwargs: Any) -> Any:
        """Wrap student and losses in DistributedDataParallel; banks are left to their losses, the teacher is not in."""
        module = distributed.ignore_banks(self.trainable_module)
        self.trainable_module: Trainable = DistributedDataParallel(module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(
        self, backend: Callable[..., Any] | str = "inductor", mode: Any = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compile student and teacher, each in place; returns the student."""
        student = self._trainable().student
        student.compile(backend=backend, mode=mode, **compile_kwargs)
        if self.teacher is not None:
            self.teacher.model.compile(backend=backend, mode=mode, **compile_kwargs)
        return student

    def _trainable(self):
        return _utils.unwrap_model(self.trainable_module)

    def get_eval_model(self, module: Any = None, ema: bool = False) -> Any:
        """The student, or its moving average."""
        resolved = super().get_eval_model(module=module, ema=ema)
        inner = None if resolved is None else _utils.unwrap_model(resolved)
        return inner.student if isinstance(inner, Trainable) else resolved

    def setup_ema(self, decay: float = 0.9999, use_warmup: bool = False, device: Any = None, **kwargs: Any) -> Any:
        """Start a moving average of the student."""
        student = self._trainable().student
        self.trainable_module_ema: Any = _utils.ModelEmaV3(
            student, decay=decay, use_warmup=use_warmup, device=device, **kwargs
        )
        return self.trainable_module_ema

    def update_ema(self, step: int | None = None) -> None:
        """Move the average towards the student."""
        if self.has_ema():
            self.trainable_module_ema.update(self._trainable().student, step=step)

    def get_clip_parameters(self, exclude_head: bool = False) -> list[Tensor]:
        """The parameters whose gradients are clipped; without those of the student's classifier, if excluded."""
        trainable = self._trainable()
        student = list(trainable.student.parameters())
        return [*(student[:-2] if exclude_head else student), *trainable.objective.parameters()]

    def get_task_state(self, module: Any = None, ema: bool = False) -> dict[str, Any]:
        """The state of the losses: their layers, variances and banks."""
        losses = {} if ema else self._trainable().objective.state_dict()
        return {"losses": losses} if losses else {}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: Any = None, ema: bool = False
    ) -> None:
        """Load the losses' state; RuntimeError if it is not there, or another's, unless strict is False."""
        objective = self._trainable().objective
        if ema or not (state or (strict and objective.state_dict())):
            return
        if not state or "losses" not in state:
            raise RuntimeError(
                f"the checkpoint has no task_state of the losses {', '.join(self.weights)}: the student would go on "
                "with untrained ones; load it with strict=False to start so"
            )
        objective.load_state_dict(state["losses"], strict=strict)


class Trainable(nn.Module):
    """All that is trained: the student and the losses with their layers, in one forward, which DDP wraps."""

    def __init__(self, student: nn.Module, objective: "Objective") -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self._observed: Observed = objective.observed("student", student)

    def forward(
        self, input: Tensor, taught: dict[str, Any], labels: Tensor, index: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """-> the student's logits and the losses by their names. `taught`: what the teacher says."""
        said = self._observed(input)
        return said["logits"], self.objective.losses(said, taught, labels, index=index)

    def no_weight_decay(self) -> set[str]:
        """The names of parameters that the student wants without weight decay, which timm's optimizers ask for."""
        names = getattr(_utils.unwrap_model(self.student), "no_weight_decay", set)()
        return {f"student.{name}" for name in names}

    def group_matcher(self, coarse: bool = False) -> Callable[..., Any]:
        """timm's grouping of parameters into layers, for a decay of learning rates: losses go with the last layer."""
        student = _utils.unwrap_model(self.student)
        groups = _models.group_parameters(student, student.group_matcher(coarse=coarse), reverse=True)
        last = max(groups.values(), default=0)
        return lambda name: groups.get(name.removeprefix("student."), last)


def _teacher(teacher, student, device, dtype):
    """A frozen timm DistillationTeacher of a model or of its name."""
    if not isinstance(teacher, _task.DistillationTeacher):
        student = _utils.unwrap_model(student)
        sizes = {"num_classes": student.num_classes, "in_chans": student.in_chans} if isinstance(teacher, str) else {}
        teacher = _task.DistillationTeacher(teacher, **sizes, device=device, dtype=dtype)
    trained = set(student.parameters())
    if any(parameter in trained for parameter in teacher.parameters()):
        raise ValueError(
            "teacher must share no parameters with the student, which would be frozen with it; pass a copy"
        )
    return teacher.to(device).requires_grad_(False).eval()


def _savable(x):
    """x, or a copy of what torch.inference_mode has made, which no backward can save."""
    return x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x


def _normalization(model):
    """Mean and standard deviation (C,) of the images that a model expects."""
    config = getattr(model, "pretrained_cfg", {})
    return tuple(config.get("mean", IMAGENET_MEAN)), tuple(config.get("std", IMAGENET_STD))
