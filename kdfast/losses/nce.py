"""Contrastive losses against memory banks. They run on the nce kernels."""

import math
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kdfast import _processor, distributed
from kdfast.losses.base import SHARE, Settings
from kdfast.losses.shared_state import SharedState
from kdfast.ops import check
from kdfast.ops.accumulate import accumulator
from kdfast.ops.gram import inner_products
from kdfast.ops.nce import (
    LARGEST_BANK,
    check_rows,
    class_labels,
    contrast_rows,
    draw_negatives,
    nce,
    nce_log_sums,
    update_bank,
)
from kdfast.ops.patches import unit

BANKS = ("bank_student", "bank_teacher")
CONSTANTS = ("z_student", "z_teacher")
BUFFERS = (*BANKS, *CONSTANTS, "seed")


class CRD(SharedState):
    """CRD - Contrastive Representation Distillation (Tian, Krishnan and Isola, ICLR 2020).

    With unit embeddings v of the student and of the teacher, banks M of those of all `n_data` samples, K negatives:
    ``-1/B sum_b [log P_b0 / (P_b0 + c) + sum_k log (K / n_data) / (P_bk + c)]`` with ``c = K / n_data + 1e-7`` and
    ``P_bk = exp(v_b . M_bk / temperature) / Z``, for the student's v on the teacher's bank plus the teacher's v on the
    student's. Each Z is the mean of exp(.) over the first batch times `n_data`, then constant. After the scores the
    rows of the batch move: ``M = unit(momentum M + (1 - momentum) v)``, in eval mode too; of a repeated sample the last
    row counts. Shapes: student (B, student_dim), teacher (B, teacher_dim), more dimensions are flattened; index (B,)
    int64, the samples' places in the data set; contrast_index (B, K + 1) int64 with the positive in column 0, or None
    to draw `negatives` of them on the device; 0-d. Gradients flow to both networks' outputs and both embeddings, and
    stop at banks and Z.

    `labels` (n_data,) leaves the positive's class out of the draws, as the official data set does. With `sync` all
    ranks of torch.distributed score their own batches, then apply the same updates of the whole batch and the same Z:
    the averaged gradients and the banks are those of one process. To wrap a model that contains CRD in DDP, see
    ``kdfast.distributed.ignore_banks``. All state, the seed of the draws too, is in the state_dict. The official code
    draws negatives in the data loader, reads Z on the host, and embeds a zero row as NaN (here: 0). The embeddings are
    linear layers in the inputs' accumulation type, whatever autocast and torch's setting for TF32 say; they learn only
    if the optimizer has ``crd.parameters()``. One thread at a time may call it. Op: ``nce``.
    Usual weight: 0.8 (torchdistill).

    Args:
        student_dim, teacher_dim: numbers of features.
        n_data: samples in the data set.
        feature_dim: of the embeddings.
        negatives: K, drawn for each sample.
        temperature: of the scores.
        momentum: share of the old row in a bank's update.
        bank_dtype: of the banks, a floating dtype.
        sync: one bank for all ranks, as above.
        labels: (n_data,) integers or None.
    """

    state: ClassVar[tuple[str, ...]] = BUFFERS
    settings: ClassVar[Settings] = {"negatives": check.count, "temperature": check.positive, "momentum": SHARE}

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        n_data: int,
        feature_dim: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        bank_dtype: torch.dtype = torch.float32,
        sync: bool = True,
        labels: Tensor | None = None,
    ) -> None:
        super().__init__()
        sizes = dict(student_dim=student_dim, teacher_dim=teacher_dim, n_data=n_data, feature_dim=feature_dim)
        for name, value in sizes.items():
            check.count(name, value)
        if n_data > LARGEST_BANK:
            raise ValueError(f"n_data must be at most {LARGEST_BANK}, got {n_data}")
        if bank_dtype not in check.FLOATS:
            raise TypeError(f"bank_dtype must be float32, float64, float16 or bfloat16, got {bank_dtype}")
        if labels is not None:
            class_labels("labels", labels, n_data)
        self.student_dim = student_dim
        self.teacher_dim = teacher_dim
        self.n_data = n_data
        self.feature_dim = feature_dim
        self.negatives = negatives
        self.temperature = temperature
        self.momentum = momentum
        self.sync = sync
        self.embed_student: nn.Linear = nn.Linear(student_dim, feature_dim)
        self.embed_teacher: nn.Linear = nn.Linear(teacher_dim, feature_dim)
        _require_memory(n_data, feature_dim, bank_dtype)
        for name in BANKS:
            self.register_buffer(name, _empty_bank(n_data, feature_dim, bank_dtype))
        for name in CONSTANTS:
            self.register_buffer(name, torch.empty((), dtype=torch.float64))
        self.register_buffer("seed", torch.empty((), dtype=torch.int64))
        self.reset_parameters()
        self.register_buffer("labels", None if labels is None else labels.detach().long().clone(), persistent=False)
        if labels is not None:
            self._ddp_params_and_buffers_to_ignore.append("labels")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random banks, Z unset, another seed: the state at the start, also of a module that was made on meta."""
        bound = 1 / math.sqrt(self.feature_dim / 3)  # rows of length about 1, as in the official code
        for name in BANKS:
            getattr(self, name).uniform_(-bound, bound)
        for z in self._z():
            z.fill_(-1.0)
        self.seed.random_(2**62)

    def forward(self, student: Tensor, teacher: Tensor, index: Tensor, contrast_index: Tensor | None = None) -> Tensor:
        counts = self._checked(student, teacher, index, contrast_index)
        anchors = self._anchors(student, teacher)
        drawn = contrast_index is None
        if drawn:
            contrast_index = draw_negatives(index, self.negatives, self.n_data, self.seed, self.labels)
        log_sums = self._log_sums(anchors, contrast_index)
        moves = torch.cat(anchors, 1).detach()
        if counts is not None:
            moves, index_of_all, log_sums = _gather_batch(moves, index, log_sums, counts)
        constants = self._constants(log_sums, contrast_index, counts)
        loss = nce(*anchors, self.bank_student, self.bank_teacher, contrast_index, *constants, self.temperature)
        if counts is not None:
            # A mean over the rank's rows, to be averaged over the ranks: as if it were over all rows.
            loss = loss * (len(counts) * len(index) / max(1, sum(counts)))
            index = index_of_all
        self._advance(moves, index, constants, drawn)
        return loss

    # ---- the parts of a step -----------------------------------------------------------------------------------------
    def _anchors(self, student, teacher):
        return _unit(student, self.embed_student), _unit(teacher, self.embed_teacher)

    def _checked(self, student, teacher, index, contrast_index):
        """Checks the arguments; -> how many rows each rank has, or None if this is the only one."""

        def describe():
            self._check(student, teacher, index, contrast_index)
            for name, rows in (("index", index), ("contrast_index", contrast_index)):
                if self.sync and distributed.world_size() > 1 and rows is not None and rows.device.type == "cpu":
                    check_rows(name, rows, self.n_data)
            columns = 1 + self.negatives if contrast_index is None else contrast_index.shape[1]
            return [len(index), columns, torch.finfo(accumulator(student, *self.parameters())).bits]

        ranks = self.agree(describe, 3)
        for rank, (_, columns, width) in enumerate(ranks or ()):
            if ranks[0][1:] != [columns, width]:
                raise ValueError(
                    "contrast_index must have as many columns, and the inputs the same precision, on every rank, got "
                    f"{ranks[0][1]} columns and {ranks[0][2]} bits on rank 0, {columns} and {width} on rank {rank}"
                )
        return ranks and [rows for rows, *_ in ranks]

    def _check(self, student, teacher, index, contrast_index):
        for name, x, dim in (("student", student, self.student_dim), ("teacher", teacher, self.teacher_dim)):
            check.embeddings(name, x)
            if math.prod(x.shape[1:]) != dim:
                raise ValueError(f"{name} must have {name}_dim = {dim} features, got shape {tuple(x.shape)}")
        check.same_batch("teacher", teacher, student)
        check.same_device("student", student, self.bank_student, of="the bank")
        contrast_rows("index", index, student, self.n_data)
        if contrast_index is not None:
            contrast_rows("contrast_index", contrast_index, student, self.n_data, columns=True)

    def _log_sums(self, anchors, contrast_index):
        """log sum exp of all scores for each direction [2] where its Z is unset, else 0."""
        student, teacher = (x.detach() for x in anchors)
        return nce_log_sums(
            *(student, teacher, self.bank_student, self.bank_teacher, contrast_index.contiguous()),
            *(self.z_student, self.z_teacher, float(self.temperature)),
        )

    def _constants(self, log_sums, contrast_index, counts):
        """Both Z: as they are, or from the first batch."""
        rows = len(contrast_index) if counts is None else sum(counts)
        scores = max(1, rows * contrast_index.shape[1])
        # A graph takes the logarithm itself, and so serves every batch size.
        log = (torch.ones_like(log_sums) * scores).log() if torch.compiler.is_compiling() else math.log(scores)
        means = (log_sums - log).exp() * self.n_data
        first = [(z < 0) & mean.isfinite() & (mean > 0) for z, mean in zip(self._z(), means, strict=True)]
        return [torch.where(f, mean, z) for f, mean, z in zip(first, means, self._z(), strict=True)]

    def _z(self):
        return self.z_student, self.z_teacher

    @torch.no_grad()
    def _advance(self, moves, index, constants, drawn):
        """The state after the step. Whatever can fail has been done, or fails in the first line."""
        for bank, rows in zip((self.bank_student, self.bank_teacher), moves.chunk(2, 1), strict=True):
            update_bank(bank, rows, index, self.momentum)
        for z, constant in zip(self._z(), constants, strict=True):
            z.view(1).copy_(constant)  # torch.compile takes a 0-d float64 for a number, whose change would be lost
        if drawn:
            self.seed.add_(1)

    # ---- state -------------------------------------------------------------------------------------------------------
    def _apply(self, fn, *args, **kwargs):
        """Z stays float64 in whatever type the rest is: it may be as large as exp(1 / temperature) n_data."""
        before = self._z()
        super()._apply(fn, *args, **kwargs)
        for name, z in zip(CONSTANTS, before, strict=True):
            now = self._buffers[name]
            self._buffers[name] = now.double() if z.is_meta else z.to(now.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *others):
        """Refuses a checkpoint of other sizes before anything of it is loaded."""
        for name in BANKS:
            saved, shape = state_dict.get(prefix + name), (self.n_data, self.feature_dim)
            if saved is not None and tuple(saved.shape) != shape:
                raise RuntimeError(
                    f"{prefix}{name} of the checkpoint has n_data x feature_dim = {' x '.join(map(str, saved.shape))}, "
                    f"this CRD has {shape[0]} x {shape[1]}: make it with the checkpoint's sizes"
                )
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        names = ("student_dim", "teacher_dim", "n_data", "feature_dim", "negatives", "temperature", "momentum", "sync")
        labels = None if self.labels is None else f"those of {len(self.labels)} samples"
        shown = [f"{name}={getattr(self, name)}" for name in names]
        return ", ".join([*shown, f"bank_dtype={self.bank_student.dtype}", f"labels={labels}"])


def _unit(x, linear):
    """Rows of x embedded and divided by their lengths, in the accumulation type; a zero row stays zero."""
    for parameter in (linear.weight, linear.bias):
        check.tensor("an embedding's parameter", parameter)
    dtype = accumulator(x, linear.weight)
    return unit(_products(x.flatten(1), linear.weight).to(dtype) + linear.bias.to(dtype))


def _products(x, weight):
    """x weight^T; neither autocast nor a setting for products of float32 reaches it."""
    if x.device.type == "cpu":
        return inner_products(x[None], weight[None])[0]
    # A batch by a few features is too little for kdfast's own product to fill a GPU.
    return x.double() @ weight.double().t()


def _gather_batch(moves, index, log_sums, counts):
    """-> anchors and indices of all ranks' rows, and the log-sums over all ranks."""
    rows = torch.cat([moves.contiguous().view(torch.uint8), index[:, None].contiguous().view(torch.uint8)], 1)
    rows = distributed.gather_rows(rows, counts)
    moves_bytes = moves.shape[1] * moves.element_size()
    log_sums = distributed.gather_rows(log_sums[None], [1] * len(counts))
    everything = rows[:, :moves_bytes].contiguous().view(moves.dtype), rows[:, moves_bytes:].contiguous()
    return everything[0], everything[1].view(torch.int64)[:, 0], log_sums.logsumexp(0)


def _empty_bank(rows, cols, dtype):
    bank = torch.empty(rows, cols, dtype=dtype)
    if bank.device.type == "cpu":
        _processor.advise_huge_pages(bank.data_ptr(), bank.nbytes)
    return bank


def _available_memory(device):
    """Bytes that can be allocated on `device`; infinite where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return math.inf
    try:
        with open("/proc/meminfo") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
        return math.prod(map(os.sysconf, names)) if set(names) <= set(os.sysconf_names) else math.inf


def _require_memory(n_data, feature_dim, dtype):
    needed, available = 2 * n_data * feature_dim * dtype.itemsize, _available_memory(torch.get_default_device())
    if needed > available:
        raise MemoryError(
            f"n_data = {n_data} rows of feature_dim = {feature_dim} in {dtype} need {needed} bytes for both banks, and "
            f"{available} are available: take a smaller bank_dtype (torch.bfloat16) or feature_dim"
        )


# ---- the official checkpoints ----------------------------------------------------------------------------------------
def load_repdistiller_crd(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Fill the CRD `module` from the state_dict of RepDistiller's CRDLoss: both embeddings, both banks and Z.

    Temperature, momentum and the number of negatives stay the constructor's. Raises KeyError naming a missing key, and
    ValueError naming an entry of another size, before anything is changed.
    """
    names = {
        f"embed_{side[0]}.linear.{part}": getattr(getattr(module, f"embed_{side}"), part)
        for side in ("student", "teacher")
        for part in ("weight", "bias")
    }
    names |= {"contrast.memory_v1": module.bank_student, "contrast.memory_v2": module.bank_teacher}
    for name in (*names, "contrast.params"):
        if name not in state_dict:
            raise KeyError(f"state_dict has no {name}, which RepDistiller's CRDLoss saves")
        shape = tuple(names[name].shape) if name in names else (5,)
        if tuple(state_dict[name].shape) != shape:
            raise ValueError(f"{name} must have shape {shape} like the module, got {tuple(state_dict[name].shape)}")
    with torch.no_grad():
        for name, target in names.items():
            target.copy_(state_dict[name])
        for z, saved in zip((module.z_student, module.z_teacher), state_dict["contrast.params"][2:4], strict=True):
            z.copy_(saved)
    module._shared = False
