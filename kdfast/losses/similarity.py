"""Losses on similarities as distributions: to a queue of the teacher's embeddings, and between patches of an image."""

from typing import ClassVar

import torch
from torch import Tensor

from kdfast import distributed
from kdfast._types import Tensors
from kdfast.losses.base import Loss, Settings, made_of_settings, or_none, setting
from kdfast.losses.shared_state import SharedState
from kdfast.ops import check
from kdfast.ops.accumulate import total
from kdfast.ops.gram import inner_products
from kdfast.ops.linear import linear_kl
from kdfast.ops.patches import patch_kl, unit
from kdfast.ops.softmax_kl import softmax_kl

AT_ONCE = 2**22  # similarities of a layer that are formed together


class QueueKL(SharedState):
    """SEED - Self-supervised Distillation for Visual Representation (Fang et al., ICLR 2021).

    ``KL(p || q)`` averaged over the batch: p and q are the softmaxes of the teacher's and the student's cosines to a
    queue of the teacher's last `size` embeddings, over `teacher_temperature` and `temperature`. The batch's own rows
    enter the queue first. Shapes: student, teacher (B, dim), more dimensions are flattened; 0-d, in nats. Gradients
    flow to both, and stop at the queue. The similarities, B x size, are never stored.

    Args:
        dim: of both embeddings; a student of another width needs a linear layer of yours.
        size: rows of the queue, random unit vectors at the start.
        temperature, teacher_temperature: None for the same; SEED's code has 0.07 and 1e-4, its paper 0.2 and 0.01.
        sync: all ranks of torch.distributed add the rows of the whole batch, in one order.

    The queue and its position are in the state_dict. Official code: SEED compares each row with its own embedding and
    those of earlier batches, and takes the cross-entropy, which differs by the teacher's entropy; the batch size has to
    divide its queue. lightly-train's queue has the batch, as here. One thread at a time may call it. Op: ``linear_kl``.
    """

    state: ClassVar[tuple[str, ...]] = ("queue", "position")
    settings: ClassVar[Settings] = {"temperature": check.positive, "teacher_temperature": or_none(check.positive)}

    def __init__(
        self,
        dim: int,
        size: int = 65536,
        temperature: float = 0.07,
        teacher_temperature: float | None = None,
        sync: bool = True,
    ) -> None:
        super().__init__()
        check.count("dim", dim)
        check.count("size", size)
        self.dim: int = dim
        self.size: int = size
        self.temperature: float = temperature
        self.teacher_temperature: float | None = teacher_temperature
        self.sync: bool = sync
        self.register_buffer("queue", torch.empty(size, dim))
        self.register_buffer("position", torch.empty((), dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A random queue: the state at the start, also of a module that was made on meta."""
        self.queue.copy_(unit(torch.randn_like(self.queue)))
        self.position.zero_()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        ranks = self.agree(lambda: self._describe(student, teacher), 1)
        student, teacher = unit(student.flatten(1)), unit(teacher.flatten(1))
        rows, share = teacher.detach(), 1.0
        if ranks is not None:
            counts = [n for (n,) in ranks]
            share = len(counts) * len(student) / max(1, sum(counts))  # to be averaged over the ranks
            rows = distributed.gather_rows(rows.to(self.queue.dtype).contiguous(), counts)
        self._enqueue(rows)
        loss = linear_kl(
            student,
            self.queue,
            teacher,
            self.queue,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
        )
        return loss if ranks is None else loss * share

    def _describe(self, student, teacher):
        for name, x in (("student", student), ("teacher", teacher)):
            check.embeddings(name, x)
            if x[:1].numel() not in (0, self.dim):
                raise ValueError(f"{name} must have dim = {self.dim} features, got shape {tuple(x.shape)}")
        check.same_batch("teacher", teacher, student)
        check.same_device("student", student, self.queue, of="the queue")
        return [len(student)]

    @torch.no_grad()
    def _enqueue(self, rows):
        rows = rows[-self.size :]
        places = (self.position + torch.arange(len(rows), device=rows.device)) % self.size
        self.queue.index_copy_(0, places, rows.to(self.queue.dtype))
        self.position.add_(len(rows)).remainder_(self.size)


@made_of_settings
class PatchKL(Loss):
    """Patch affinity KL - the local term of lightly-train's distillation v3 (Lightly, 2025).

    ``KL(p || q)`` averaged over images and patches: row i of p is the softmax of the cosines of patch i to all patches
    of its image over the temperature, for the teacher; q for the student. Shapes: student (B, C, H, W), teacher
    (B, C', H, W), or equally long lists, whose losses are added; tokens by :class:`kdfast.objectives.AsMaps`. 0-d, in
    nats. Gradients flow to both. Similarities, N x N of each image with N = H W, are formed some rows at a time where
    they would take more than 16 MiB a side, and not kept.
    Op: ``linear_kl``, once for each image, or ``inner_products`` and ``softmax_kl``.

    Args:
        temperature: of the softmaxes, above 0.
    """

    temperature: float = setting(0.07, check.positive)

    def forward(self, student: Tensors, teacher: Tensors) -> Tensor:
        pairs = check.layers(student, teacher, check.maps, _same_positions)
        return total(self._of_layer(s, t) for s, t in pairs)

    def _of_layer(self, student, teacher):
        if student.shape[0] * (student.shape[2] * student.shape[3]) ** 2 > AT_ONCE:
            return patch_kl(student.flatten(2), teacher.flatten(2), self.temperature)
        units = [unit(x.flatten(2).transpose(1, 2)) for x in (student, teacher)]
        return softmax_kl(*(inner_products(x) / self.temperature for x in units))  # one call for all images


def _same_positions(name, teacher, student, of="the student"):
    check.same_batch(name, teacher, student, of)
    check.maps(name, teacher)
    if teacher.shape[2:] != student.shape[2:]:
        raise ValueError(f"{name} must have {of}'s height and width, got shape {tuple(teacher.shape)}")
