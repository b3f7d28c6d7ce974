"""The training itself: a step, a test, and the state between two steps.

The random numbers of a step (dropout, stochastic depth) depend on (seed, step, rank) alone, the learning rate on the
step: with `Steps` they need no state. What has one is in `state`.
"""

import contextlib
from typing import TYPE_CHECKING, Any

import timm.optim
import timm.scheduler
import timm.utils
import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.runs.determinism import derived_seed
from kdfast.runs.errors import RunError

if TYPE_CHECKING:
    from kdfast.integrations.timm import DistillationTask
    from kdfast.teacher_store import TeacherStore
    from kdfast.training.data import Batch
    from kdfast.training.ranks import Ranks
    from kdfast.training.settings import Settings


__all__ = ["Trainer"]

MOMENTUM = 0.9


class Trainer:
    """A timm `task` in training; `steps` of `an_epoch` a piece are done.

    `normalization` is mean and standard deviation of the student's images, whose pixels are from 0 to 1; `store` the
    TeacherStore that has the teacher's logits, where the task has no teacher.
    """

    def __init__(
        self,
        chosen: "Settings",
        ranks: "Ranks",
        task: "DistillationTask",
        an_epoch: int,
        normalization: tuple[tuple[float, float, float], tuple[float, float, float]],
        store: "TeacherStore | None" = None,
    ) -> None:
        self.chosen = chosen
        self.ranks = ranks
        self.an_epoch = an_epoch
        self.store = store
        self.steps = 0
        self.sums, self.summed = {}, 0  # of the losses since they were last read
        self.layout: torch.memory_format = torch.channels_last if chosen.channels_last else torch.contiguous_format
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) * 255 for values in normalization)
        self.mean: Tensor = mean.to(ranks.device)
        self.std: Tensor = std.to(ranks.device)
        self.task = self._prepared(task)
        self.optimizer = self._optimizer()
        self.scheduler, _ = timm.scheduler.create_scheduler_v2(
            self.optimizer,
            **dict(sched="cosine", num_epochs=chosen.epochs, warmup_epochs=chosen.warmup_epochs, warmup_lr=0.0),
            **dict(step_on_epochs=False, updates_per_epoch=an_epoch),
        )

    def _prepared(self, task):
        chosen, ranks = self.chosen, self.ranks
        for module in task.children():  # timm before 1.0.31 cannot move a task itself to a layout
            module.to(memory_format=self.layout)
        if chosen.ema is not None:
            task.setup_ema(decay=chosen.ema)
        if chosen.compile:
            task.compile()
        if ranks.size > 1:
            ids = [ranks.device.index] if ranks.device.type == "cuda" else None
            task.prepare_distributed(device_ids=ids)
        return task

    def _optimizer(self):
        chosen, known = self.chosen, timm.optim.list_optimizers()
        if chosen.optimizer not in known:
            raise RunError(f"--optimizer: timm has no {chosen.optimizer!r}, expected one of {', '.join(known)}")
        sizes = {"lr": chosen.lr, "weight_decay": chosen.weight_decay, "momentum": MOMENTUM}
        return timm.optim.create_optimizer_v2(self.task.get_trainable_module(), chosen.optimizer, **sizes)

    def warm_up(self, shape: Any) -> Any:
        """Run the task once, on gray images of `shape` (B, 3, H, W); a `state` has to be loaded after it.

        After its first backward, DistributedDataParallel puts the gradients into other buckets, and sums over three or
        more ranks are rounded in another order. With this, no step of the training is the first: none after a restart.
        """
        self.task.train()
        rows = torch.arange(shape[0], device=self.ranks.device)
        with self._autocast():
            images = torch.zeros(shape, device=self.ranks.device).to(memory_format=self.layout)
            known = (
                {}
                if self.store is None
                else {"teacher_logits": images.new_zeros(len(rows), self.store.contents.classes)}
            )
            result = self.task(images, torch.zeros_like(rows), rows, **known)
        result["loss"].backward()
        self.optimizer.zero_grad()

    # ---- a step ------------------------------------------------------------------------------------------------------
    def step(self, batches: "list[Batch]") -> None:
        """One optimizer step on the micro-batches `batches` of this rank."""
        self.task.train()
        torch.manual_seed(derived_seed(self.chosen.seed, self.steps, self.ranks.rank))
        self.scheduler.step_update(self.steps)
        for number, batch in enumerate(batches, 1):
            # The gradients travel once a step.
            with contextlib.nullcontext() if number == len(batches) else self.task.no_sync():
                with self._autocast():
                    stored = self._stored(batch.index, batch.augmentation)
                    result = self.task(self._images(batch.images), *self._targets(batch), **stored)
                (result["loss"] / len(batches)).backward()
            for name, value in result.items():
                if name != "output":
                    self.sums[name] = self.sums.get(name, 0.0) + value.detach().double() / len(batches)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        self.summed += 1
        self.task.update_ema(step=self.steps)

    def _stored(self, index, augmentation):
        """What the store has of these images, as an argument of the task."""
        if self.store is None:
            return {}
        return {"teacher_logits": self.store.logits(index, augmentation).to(self.ranks.device, non_blocking=True)}

    def teacher_logits(self, batch: "Batch") -> Tensor:
        """What the teacher says about a batch in a step."""
        with self._autocast():
            return self.task.taught(self._images(batch.images))["logits"]

    def _images(self, images):
        images = images.to(self.ranks.device, non_blocking=True, memory_format=self.layout)
        return (images - self.mean) / self.std

    def _targets(self, batch):
        return (x.to(self.ranks.device, non_blocking=True) for x in (batch.labels, batch.index))

    def _autocast(self):
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.chosen.amp)

    @property
    def learning_rate(self) -> float:
        """That of the last step."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def losses(self) -> dict[str, float]:
        """Name -> mean over the steps since the last call and over the ranks; all ranks have to call it."""
        self._share_sums()
        losses = {name: value.item() / self.summed for name, value in self.sums.items()}
        self.sums, self.summed = {}, 0
        return losses

    def _share_sums(self):
        """Give every rank the mean over the ranks, so that rank 0's checkpoint is right for all.

        Raises a RunError where it is infinite or NaN: no checkpoint is written of what comes after that.
        """
        if not self.sums:
            return
        sums = torch.stack(list(self.sums.values()))
        if self.ranks.size > 1:
            torch.distributed.all_reduce(sums)
            self.sums = dict(zip(self.sums, sums / self.ranks.size, strict=True))
        if not sums.isfinite().all():
            losses = {name: value.item() for name, value in self.sums.items()}
            raise RunError(f"a loss is not finite before step {self.steps}: {losses}; try a smaller --lr")

    # ---- a test ------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def evaluate(self, batches: Any) -> dict[str, float]:
        """Name -> value of the student, and of its average, on the `batches` of all ranks; top-1, top-5 in percent."""
        self.task.eval()
        names = {"": False} | ({"ema_": True} if self.task.has_ema() else {})
        models = {name: self.task.get_eval_model(ema=ema) for name, ema in names.items()}
        totals = {name: torch.zeros(4, dtype=torch.float64, device=self.ranks.device) for name in names}
        if self.ranks.size > 1:
            for model in models.values():
                timm.utils.distribute_bn(model, self.ranks.size)  # those of rank 0, which the checkpoint has
        for batch in batches:
            readable = batch.labels >= 0
            if not readable.any():
                continue
            images = self._images(batch.images[readable])
            labels = batch.labels[readable].to(self.ranks.device)
            for name, model in models.items():
                with self._autocast():
                    logits = model(images)
                totals[name] += _totals(logits.float(), labels)
        return {f"{name}{key}": x for name in names for key, x in self._metrics(totals[name]).items()}

    def _metrics(self, totals):
        if self.ranks.size > 1:
            torch.distributed.all_reduce(totals)
        loss, top1, top5, images = totals.tolist()
        if not images:
            raise RunError("--data: none of the validation images can be read, see the lines above")
        return {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "loss": loss / images}

    # ---- checkpoints -------------------------------------------------------------------------------------------------
    def state(self) -> dict[str, int]:
        """All that the rest of the training depends on, beside the settings; all ranks have to call it."""
        self._share_sums()
        average = self.task.get_checkpoint_state(ema=True) if self.task.has_ema() else {}
        own = {"steps": self.steps, "sums": self.sums, "summed": self.summed, "optimizer": self.optimizer.state_dict()}
        return own | self.task.get_checkpoint_state() | average

    def load(self, state: dict[str, int]) -> None:
        """Continue from a `state`."""
        self.task.load_checkpoint_state(state["state_dict"], state.get("task_state"))
        if self.task.has_ema():
            self.task.load_checkpoint_state(state["state_dict_ema"], ema=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps: int = state["steps"]
        self.sums: dict[Any, Tensor] = {name: value.to(self.ranks.device) for name, value in state["sums"].items()}
        self.summed: int = state["summed"]


def _totals(logits, labels):
    """Cross-entropy, hits among the first 1 and 5, and images of a batch: sums (4,)."""
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    loss = F.cross_entropy(logits.double(), labels, reduction="sum")
    return torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels), device=loss.device)])
