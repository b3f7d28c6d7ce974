"""Noise-contrastive estimation against memory banks: one positive and K negatives for each anchor, read once.

With the score s_k = anchor . bank[index_k] / T, the constant Z and c = K / N + 1e-7 (N rows in the bank), the paper's
P_k = exp(s_k) / Z is compared with noise of the density 1 / N. In logits, v_k = s_k - log(Z c), nothing overflows:

    positive    -log(P_0 / (P_0 + c))         = softplus(-v_0)
    negatives   -log((K / N) / (P_k + c))     = softplus(v_k) + log(1 + 1e-7 N / K)
    gradient    sum_k w_k bank[index_k] / T,    w_0 = -sigmoid(-v_0), w_k = sigmoid(v_k)

The student's anchors meet the teacher's bank, and the teacher's anchors the student's, at the same rows.
Negatives come from Philox 4x32-10, a function of (seed, positive row, column): the same on every device and rank.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdfast._kernels import op
from kdfast.ops import check, shapes
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.elementwise import sigmoid
from kdfast.ops.saved import save, saved

__all__ = ["alias_table", "draw_negatives", "nce", "update_bank"]

BLOCK = 2**18  # elements of a temporary; a number fixed by shapes alone keeps results independent of the machine
EPS = 1e-7  # beside the density of the noise, as in the official code
ATTEMPTS = 256  # draws before a negative of another class is looked for in the rows that follow the last one
LARGEST_BANK = 2**31 - 1  # rows that a draw can reach


# ---- plain PyTorch: the readable definition --------------------------------------------------------------------------
def rows_error(name: str, position: Sequence[int], value: int, rows: int) -> str:
    """What the CPU kernel says of an index outside the bank, too."""
    return f"{name}[{', '.join(map(str, position))}] is {value}, expected a row from 0 to {rows - 1}"


def check_rows(name: str, index: Tensor, rows: int) -> None:
    """Every entry of `index` is a row of the bank. On CUDA this waits for the device."""
    wrong = (index < 0) | (index >= rows)
    if wrong.any():
        position = wrong.nonzero()[0].tolist()
        raise IndexError(rows_error(name, position, int(index[tuple(position)]), rows))


def _log_noise(negatives, rows):
    """log(c), and the constant log(1 + 1e-7 N / K) of each negative."""
    density = negatives / rows
    return math.log(density + EPS), math.log1p(EPS / density) if negatives else 0.0


def _chunks(index, dim):
    """Slices of the columns of `index` whose bank rows make one temporary."""
    step = max(1, BLOCK // max(1, index.shape[0] * dim))
    return [slice(start, min(start + step, index.shape[1])) for start in range(0, index.shape[1], step)]


def _scores(anchors, bank, index, temperature):
    """-> bank rows [B, n, D] and scores s [B, n] in the anchors' dtype; an index outside the bank scores NaN."""
    inside = (index >= 0) & (index < bank.shape[0])
    rows = bank[torch.where(inside, index, 0)].to(anchors.dtype)
    return rows, torch.where(inside, fixed_sum(rows * anchors[:, None]) / temperature, math.nan)


def _direction(anchors, bank, index, z, temperature, need_grad, scores):
    """-> sum of the terms over the batch (float64), its gradient in the anchors; fills `scores` [B, K + 1] if given."""
    log_c, constant = _log_noise(index.shape[1] - 1, bank.shape[0])
    shift = (z.double().log() + log_c).to(anchors.dtype)
    total = anchors.new_full((), constant * (index.shape[1] - 1) * index.shape[0], dtype=torch.float64)
    grad = torch.zeros_like(anchors)
    for columns in _chunks(index, bank.shape[1]):
        rows, s = _scores(anchors, bank, index[:, columns], temperature)
        if scores is not None:
            scores[:, columns] = s
        # softplus and sigmoid of v for the negatives, of -v for the positive.
        sign = torch.ones_like(s[:1])
        sign[:, : max(0, 1 - columns.start)] = -1
        v = sign * (s - shift)
        total = total + fixed_sum(fixed_sum(v.clamp(min=0) + (-v.abs()).exp().log1p()).double())
        if need_grad:
            grad += ((sign * sigmoid(v))[..., None] * rows).sum(1)
    return total, grad / temperature


def _loss_gradients_and_scores(student, teacher, bank_student, bank_teacher, index, need_grad, need_scores, **_):
    def sums(shape):
        return shapes.sums(shape, student, teacher, bank_student, bank_teacher)

    grad = student.shape if need_grad else 0
    return sums(()), sums(grad), sums(grad), sums((2, *index.shape) if need_scores else 0)


@op("nce", _loss_gradients_and_scores)
def _nce(
    student: Tensor,
    teacher: Tensor,
    bank_student: Tensor,
    bank_teacher: Tensor,
    index: Tensor,
    z_student: Tensor,
    z_teacher: Tensor,
    temperature: float,
    need_grad: bool,
    need_scores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> loss (0-d), gradients of both anchors [B, D], scores [2, B, K + 1]; empty where not needed."""
    if index.device.type == "cpu":
        check_rows("contrast_index", index, len(bank_student))
    dtype, batch = accumulator(student, teacher, bank_student, bank_teacher), max(1, index.shape[0])
    scores = student.new_empty((2, *index.shape) if need_scores else 0, dtype=dtype)
    loss, grads = 0.0, []
    sides = (student, bank_teacher, z_student), (teacher, bank_student, z_teacher)
    for side, (anchors, bank, z) in enumerate(sides):
        filled = scores[side] if need_scores else None
        total, grad = _direction(anchors.to(dtype), bank, index, z, temperature, need_grad, filled)
        loss = loss + total / batch
        grads.append(grad / batch if need_grad else grad.new_empty(0))
    return loss.to(dtype), *grads, scores


@op("nce", lambda student, **_: student.new_empty(2, dtype=torch.float64))
def nce_log_sums(
    student: Tensor,
    teacher: Tensor,
    bank_student: Tensor,
    bank_teacher: Tensor,
    index: Tensor,
    z_student: Tensor,
    z_teacher: Tensor,
    temperature: float,
) -> Tensor:
    """-> log of the sum of all exp(score / T) of either direction [2], float64; 0 where its constant is set already."""
    if index.device.type == "cpu":
        check_rows("contrast_index", index, len(bank_student))
    sums = []
    for anchors, bank, z in ((student, bank_teacher, z_student), (teacher, bank_student, z_teacher)):
        if z.device.type == "cpu" and z >= 0:
            sums.append(z.new_zeros((), dtype=torch.float64))
            continue
        anchors = anchors.to(accumulator(student, teacher, bank_student, bank_teacher))
        parts = [
            _scores(anchors, bank, index[:, columns], temperature)[1].double().flatten().logsumexp(0)
            for columns in _chunks(index, bank.shape[1])
        ]
        sums.append(torch.where(z >= 0, 0.0, torch.stack(parts).logsumexp(0)))
    return torch.stack(sums)


@op("nce", lambda **_: None, mutates=("bank",))
def _update_bank(bank: Tensor, rows: Tensor, index: Tensor, momentum: float) -> None:
    """Moves the rows `index` of the bank [N, D] towards `rows` [B, D], in place, to unit length."""
    if index.device.type == "cpu":
        check_rows("index", index, len(bank))
    if not len(index):
        return
    dtype = accumulator(bank, rows)
    # Of equal indices all get the last one's row, so that the order of the copies does not matter.
    sorted_index, order = index.sort(stable=True)
    last = order[torch.searchsorted(sorted_index, index, right=True) - 1]
    old = bank[index].to(dtype)
    moved = momentum * old + (1 - momentum) * rows[last].to(dtype)
    norm = fixed_sum(moved.square()).sqrt()[:, None]
    has_direction = (norm > 0) & (norm < math.inf)
    moved = torch.where(has_direction, moved / norm, old)
    bank.index_copy_(0, index, moved.to(bank.dtype))


def philox(seed: Tensor, row: Tensor, column: Tensor, attempt: int) -> list[Tensor]:
    """Philox 4x32-10 (Salmon et al., SC 2011) of the key `seed` and the counter (column, attempt, row): four words."""
    low = 0xFFFFFFFF
    words = [column.expand_as(row), torch.full_like(row, attempt), row & low, (row >> 32) & low]
    key = [seed & low, (seed >> 32) & low]
    for _ in range(10):
        # A product of two words wraps around in int64, with the right bits.
        a, b = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [((b >> 32) & low) ^ words[1] ^ key[0], b & low, ((a >> 32) & low) ^ words[3] ^ key[1], a & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return words


def _draw(row, column, attempt, n_data, seed, table):
    """One row of the bank for each entry: uniform, or by the alias table."""
    words = philox(seed, row, column, attempt)
    drawn = (words[0] * n_data + ((words[1] * n_data) >> 32)) >> 32  # 64 random bits times n_data / 2^64
    if table is None:
        return drawn
    threshold, alias = table[drawn].unbind(-1)
    return torch.where(words[2] < threshold, drawn, alias)


@op("nce", lambda index, k, **_: index.new_empty((index.shape[0], k + 1)))
def _draw_negatives(
    index: Tensor, k: int, n_data: int, seed: Tensor, labels: Tensor | None, table: Tensor | None
) -> Tensor:
    """-> [B, K + 1] indices: the positive, then k draws that depend on the seed and the positive alone."""
    if index.device.type == "cpu":
        check_rows("index", index, n_data)
    out = torch.cat([index[:, None], index.new_empty((len(index), k))], 1)
    step = max(1, BLOCK // max(1, k))
    for start in range(0, len(index) if k else 0, step):
        row = index[start : start + step, None].expand(-1, k).contiguous()
        column = torch.arange(k, device=index.device)
        drawn = _draw(row, column, 0, n_data, seed, table)
        if labels is not None:
            _redraw(drawn, row, column.expand_as(row), n_data, seed, labels, table)
        out[start : start + step, 1:] = drawn
    return out


def _redraw(drawn, row, column, n_data, seed, labels, table):
    """Draw again, in place, what has the class of its row."""
    own = labels[row]
    for attempt in range(1, ATTEMPTS):
        again = labels[drawn] == own
        if not again.any():
            return
        drawn[again] = _draw(row[again], column[again], attempt, n_data, seed, table)
    for _ in range(n_data):
        again = labels[drawn] == own
        if not again.any():
            return
        drawn[again] = (drawn[again] + 1) % n_data
    raise ValueError(no_negatives(int(row[again][0])))


def no_negatives(row: int) -> str:
    """What the CPU kernel says where no row is left to draw, too."""
    return f"labels has one class only, that of row {row}: there is no negative to draw"


# ---- public functions ------------------------------------------------------------------------------------------------
# Written out: through `differentiable.py` a small call would take 8 % longer, and one flag is for both gradients.
class _NCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, *others):
        loss, student_grad, teacher_grad, scores = _nce(student, teacher, *others)
        # The anchors are kept only so that a change in place is noticed.
        save(ctx, student, teacher, student_grad, teacher_grad)
        ctx.mark_non_differentiable(scores)
        return loss, scores

    @staticmethod
    def backward(ctx, grad, _):
        check.first_derivative_only("nce")
        student, teacher, *grads = saved(ctx)
        sides = zip((student, teacher), grads, ctx.needs_input_grad, strict=False)
        grads = [(grad * g).to(anchors.dtype) if need else None for anchors, g, need in sides]
        return *grads, *[None] * 8


def nce(
    student: Tensor,
    teacher: Tensor,
    bank_student: Tensor,
    bank_teacher: Tensor,
    contrast_index: Tensor,
    z_student: Tensor,
    z_teacher: Tensor,
    temperature: float = 0.07,
    *,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """CRD's contrastive loss in both directions, mean over the batch: each gathered row of the banks is read once.

    Args:
        student, teacher: anchors (B, D), usually unit rows; float32, float64, float16 or bfloat16.
        bank_student, bank_teacher: (N, D), of the same four types.
        contrast_index: (B, K + 1) int64, rows of the banks: the positive in column 0, then K negatives.
        z_student, z_teacher: 0-d and positive, the constants Z of the student's anchors (on the teacher's bank) and of
            the teacher's.
        temperature: divides the scores.
        return_scores: also return the scores anchor . row / temperature, (2, B, K + 1), the student's first, without a
            gradient.

    Returns: 0-d in the accumulation type: float64 if an anchor or a bank is float64, else float32. With `return_scores`
    a tuple (loss, scores).

    Gradients flow to the anchors alone; there is no second derivative (RuntimeError).

    Raises: TypeError, ValueError naming the argument; IndexError naming an index outside the bank (CUDA: NaN, or the
    error with KDFAST_CHECK=1).
    """
    anchors_and_banks(student, teacher, bank_student, bank_teacher)
    contrast_rows("contrast_index", contrast_index, student, len(bank_student), columns=True)
    for name, z in (("z_student", z_student), ("z_teacher", z_teacher)):
        check.floating(name, z)
        check.same_device(name, z, student)
        if z.dim():
            raise ValueError(f"{name} must be 0-d, got shape {tuple(z.shape)}")
    check.positive("temperature", temperature)
    need_grad = (student.requires_grad or teacher.requires_grad) and torch.is_grad_enabled()
    banks = bank_student.detach().contiguous(), bank_teacher.detach().contiguous()
    constants = z_student.detach(), z_teacher.detach(), float(temperature)
    loss, scores = _NCE.apply(
        student, teacher, *banks, contrast_index.contiguous(), *constants, need_grad, bool(return_scores)
    )
    return (loss, scores) if return_scores else loss


def update_bank(bank: Tensor, rows: Tensor, index: Tensor, momentum: float = 0.5) -> None:
    """``bank[index] = unit(momentum bank[index] + (1 - momentum) rows)``, in place and without a gradient.

    Of equal indices the last row counts, on every device; all start from the old row. Where the new row has no
    direction (zero, or not finite) the old one stays.

    Args:
        bank: (N, D), contiguous; float32, float64, float16 or bfloat16.
        rows: (B, D), of the same four types.
        index: (B,) int64.

    Raises: TypeError, ValueError naming the argument; IndexError naming an index outside the bank (CUDA: that row is
    left out, or the error with KDFAST_CHECK=1).
    """
    check.embeddings("bank", bank)
    if bank.dim() != 2 or not bank.is_contiguous():
        raise ValueError(f"bank must be 2-D and contiguous, got shape {tuple(bank.shape)}, strides {bank.stride()}")
    check.embeddings("rows", rows)
    if rows.shape[1:] != bank.shape[1:]:
        raise ValueError(f"rows must have shape (B, {bank.shape[1]}) like those of bank, got {tuple(rows.shape)}")
    check.same_device("rows", rows, bank, of="bank")
    contrast_rows("index", index, rows, len(bank))
    check.number("momentum", momentum, 0, 1)
    with torch.no_grad():
        _update_bank(bank, rows.detach(), index.contiguous(), float(momentum))


def draw_negatives(
    index: Tensor, k: int, n_data: int, seed: int | Tensor, labels: Tensor | None = None, table: Tensor | None = None
) -> Tensor:
    """-> contrast_index (B, k + 1): `index` in column 0, then k rows drawn from all n_data with replacement.

    A draw depends on (seed, the row in `index`, column) alone: it is the same on CPU and CUDA, on any number of ranks,
    and for a row that is twice in the batch.

    Args:
        index: (B,) int64, the positives.
        seed: an int, or a 0-d int64 tensor on the device of `index`.
        labels: (n_data,) integers; rows of the positive's class are left out. ``torch.arange(n_data)`` leaves out the
            positive alone. Without labels nothing is left out, as in the official code.
        table: from :func:`alias_table`, for rows of unequal weights.

    Raises: TypeError, ValueError naming the argument; IndexError naming an index outside the bank; ValueError if every
    row has the positive's class (CUDA: the row -1, which :func:`nce` answers with NaN).
    """
    check.tensor("index", index)
    check.count("k", k)
    check.count("n_data", n_data)
    if n_data > LARGEST_BANK:
        raise ValueError(f"n_data must be at most {LARGEST_BANK}, got {n_data}")
    contrast_rows("index", index, index, n_data)
    if isinstance(seed, int):
        seed = torch.full((), seed, dtype=torch.int64, device=index.device)
    check.tensor("seed", seed)
    if seed.dim() or seed.dtype != torch.int64:
        raise TypeError(f"seed must be an int or a 0-d int64 tensor, got {seed.dtype} of shape {tuple(seed.shape)}")
    check.same_device("seed", seed, index, of="index")
    if labels is not None:
        class_labels("labels", labels, n_data)
        check.same_device("labels", labels, index, of="index")
        labels = labels.long().contiguous()
    if table is not None:
        check.tensor("table", table)
        if table.dtype != torch.int64 or table.shape != (n_data, 2):
            raise ValueError(
                f"table must be alias_table's, int64 ({n_data}, 2), got {table.dtype} {tuple(table.shape)}"
            )
        check.same_device("table", table, index, of="index")
        table = table.contiguous()
    return _draw_negatives(index.contiguous(), k, n_data, seed, labels, table)


def alias_table(weights: Tensor) -> Tensor:
    """The alias table of `weights`, for :func:`draw_negatives`: (n, 2) int64 on the weights' device.

    Row i holds how often, in 2^32, i itself is kept, and which row is taken otherwise. Weights are any nonnegative
    numbers with a positive sum, (n,); shares are exact to 2^-32 / n. Takes O(n log n), without a Python loop.

    Raises: TypeError, ValueError naming the argument.
    """
    check.tensor("weights", weights)
    if weights.dim() != 1 or not 0 < len(weights) <= LARGEST_BANK:
        raise ValueError(f"weights must be (n,) with n from 1 to {LARGEST_BANK}, got shape {tuple(weights.shape)}")
    check.floating("weights", weights)
    wide = weights.detach().double().cpu()
    if not (wide.isfinite().all() and (wide >= 0).all() and 0 < wide.sum() < math.inf):
        raise ValueError("weights must be finite, at least 0, and with a positive finite sum")
    return _alias_table(wide).to(weights.device)


def _alias_table(weights):
    """Robin Hood in one sweep: whatever the poor lack comes from the rich in turn, found by their running sums.

    In whole units, 2^32 to a row, so that the sums are exact.
    """
    rows, whole = len(weights), 2**32
    running = weights.cumsum(0)
    ends = (running / running[-1] * (rows * whole)).round().long()
    share = ends.diff(prepend=ends.new_zeros(1))
    poor, rich = (share < whole).nonzero()[:, 0], (share >= whole).nonzero()[:, 0]
    lack, excess = (whole - share[poor]).cumsum(0), (share[rich] - whole).cumsum(0)
    table = torch.stack([share, torch.arange(rows, device=share.device)], 1)
    # A poor row takes from the first rich one that no poor row before it has overdrawn.
    before = lack - (whole - share[poor])
    giver = torch.searchsorted(excess, before)
    table[poor, 1] = rich[giver.clamp(max=len(rich) - 1)]
    # The poor row that overdraws a rich one leaves it with less than a whole: the next rich one makes that up.
    taken = torch.searchsorted(lack, excess, right=True)
    overdrawn = taken < len(lack)
    table[rich, 0] = whole
    table[rich[overdrawn], 0] = whole + excess[overdrawn] - lack[taken[overdrawn]]
    following = rich.roll(-1)
    table[rich[overdrawn], 1] = following[overdrawn]
    return table


# ---- checks ----------------------------------------------------------------------------------------------------------
def anchors_and_banks(student: Tensor, teacher: Tensor, bank_student: Tensor, bank_teacher: Tensor) -> None:
    """Anchors (B, D) and banks (N, D) on one device."""
    check.embeddings("student", student)
    if student.dim() != 2:
        raise ValueError(f"student must be (batch, features), got shape {tuple(student.shape)}")
    check.same_shape("teacher", teacher, student)
    for name, bank in (("bank_student", bank_student), ("bank_teacher", bank_teacher)):
        check.embeddings(name, bank)
        if bank.dim() != 2 or bank.shape[1] != student.shape[1] or not len(bank):
            raise ValueError(f"{name} must have shape (rows, {student.shape[1]}), got {tuple(bank.shape)}")
        check.same_device(name, bank, student)
    if len(bank_student) != len(bank_teacher):
        raise ValueError(
            f"bank_teacher must have as many rows as bank_student, {len(bank_student)}, got {len(bank_teacher)}"
        )


def contrast_rows(name: str, index: Tensor, batch: Tensor, rows: int, columns: bool = False) -> None:
    """`index` is int64 (B,), with `columns` (B, K + 1), on the device of `batch`; for its values see `check_rows`."""
    check.tensor(name, index)

    def expected():  # only for a message: of a graph's symbol it makes a number
        return f"({batch.shape[0]}, K + 1)" if columns else f"({batch.shape[0]},)"

    if index.dtype != torch.int64:
        raise TypeError(f"{name} must be int64 of shape {expected()}, got {index.dtype} of shape {tuple(index.shape)}")
    if index.dim() != 1 + columns or index.shape[0] != batch.shape[0] or 0 in index.shape[1:]:
        raise ValueError(f"{name} must have shape {expected()}, got {tuple(index.shape)}")
    check.same_device(name, index, batch)
    if index.is_cuda and not torch.compiler.is_compiling() and os.environ.get("KDFAST_CHECK") == "1":
        check_rows(name, index, rows)


def class_labels(name: str, labels: Any, n_data: int) -> None:
    """(n_data,) integers."""
    check.tensor(name, labels)
    if labels.dtype not in check.INTEGERS or labels.shape != (n_data,):
        raise ValueError(f"{name} must be integers of shape ({n_data},), got {labels.dtype} {tuple(labels.shape)}")
