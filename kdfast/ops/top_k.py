"""A teacher's k largest classes of each row in place of all: what it holds, and the student's probabilities of them.

The student's k + 1 outcomes are the kept classes and all others as one. Their log-probabilities are a small matrix, and
any divergence of two distributions applies to it; only `outcomes` and its gradient read the student's logits.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast._kernels import op
from kdfast.ops import check, shapes
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.blocks import by_block
from kdfast.ops.differentiable import statistics_kept
from kdfast.ops.reduction import rows_of
from kdfast.ops.rows import INF, maxima, row_stats, softmax

TAILS = ("bucket", "renormalise", "drop")
LEAST_TAIL = 1e-7  # mass of the classes that are left out, whatever rounding made of it


class TopK(NamedTuple):
    """A teacher's k largest logits or log-probabilities of each row; :func:`kdfast.ops.softmax_kl` says how they count.

    Attributes:
        values: (..., k) logits, any floating-point dtype, or log-probabilities at `temperature`: `tail` tells which.
        indices: (..., k) their classes, integers, each class at most once in a row; of log-probabilities -1 is padding.
        rest: (...) one logit for all other classes: ``T logsumexp_j(z_j / T)`` over them, -inf if there are none.
            None: the teacher gives them no probability, at any temperature.
        temperature: the T of `rest` or of the log-probabilities. What belongs to one T does not tell that at another.
        tail: "rest" for logits; "bucket", "renormalise" or "drop", see :meth:`of_log_probabilities`.
    """

    values: torch.Tensor
    indices: torch.Tensor
    rest: torch.Tensor | None = None
    temperature: float = 1.0
    tail: str = "rest"

    @classmethod
    def of(cls, logits: Tensor, k: int, temperature: float = 1.0) -> "TopK":
        """The k largest of logits (..., C), with the rest at `temperature` in the accumulation type.

        Example::

            loss = kdfast.KD(temperature=4.0)(student, kdfast.TopK.of(teacher, 50, temperature=4.0))

        Raises: TypeError, ValueError naming the argument.
        """
        check.rows_of_logits("logits", logits)
        check.count("k", k)
        check.positive("temperature", temperature)
        if k > logits.shape[-1]:
            raise ValueError(f"k must be at most the number of classes {logits.shape[-1]}, got {k}")
        logits = logits.detach()
        values, indices = logits.topk(k, dim=-1)
        others = logits.to(accumulator(logits)).scatter(-1, indices, -INF)
        top, total = row_stats(rows_of(others), temperature, others.dtype)
        rest = top + temperature * total.log()
        return cls(values, indices, rest.reshape(logits.shape[:-1]), float(temperature))

    @classmethod
    def of_log_probabilities(
        cls, log_probabilities: Tensor, indices: Tensor, temperature: float = 1.0, tail: str = "bucket"
    ) -> "TopK":
        """A teacher that gives k log-probabilities (..., k) at `temperature`, as servers and stores do.

        Args:
            indices: (..., k) their classes; -1 is a slot of padding, whose log-probability is not looked at.
            tail: "bucket": the other classes are one more outcome with the mass that is missing (by log1p and expm1;
                at least 1e-7; none where the student has no other class). "renormalise": the k alone, on both sides.
                "drop": the sum over the k, not renormalised, which may be negative.

        Raises: TypeError, ValueError naming the argument.
        """
        check.floating("log_probabilities", log_probabilities)
        check.positive("temperature", temperature)
        check.one_of("tail", tail, TAILS)
        return cls(log_probabilities.detach(), indices, None, float(temperature), tail)

    def to(self, *args: Any, **kwargs: Any) -> "TopK":
        """The same on another device or in another dtype, as ``torch.Tensor.to``; indices keep their dtype."""
        values = self.values.to(*args, **kwargs)
        indices = self.indices.to(values.device, non_blocking=kwargs.get("non_blocking", False))
        rest = None if self.rest is None else self.rest.to(*args, **kwargs)
        return self._replace(values=values, indices=indices, rest=rest)


# ---- the student's outcomes ------------------------------------------------------------------------------------------
def _slots(indices, classes):
    """-> columns to gather and to scatter to, and which slots are no padding. A padding slot repeats another one."""
    real = indices >= 0
    last = indices.clamp(max=classes - 1).amax(1, keepdim=True).clamp(min=0)
    return torch.where(real, indices, last).clamp(max=classes - 1), real


def _others(z, column, real):
    """Logits with -inf at the kept classes; without any, as they are."""
    return z.scatter(1, column, torch.where(real.any(1, keepdim=True), -INF, z.gather(1, column)))


def _outcome_shapes(student, indices, **_):
    slots, rows = indices.shape[1] + 1, len(student)
    return shapes.sums((rows, slots), student), shapes.sums((rows, slots + 2), student)


@op("softmax_kl", _outcome_shapes, has_kernels=False)
def _topk_outcomes(student: Tensor, indices: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """-> log-probabilities of the outcomes, and beside them the maximum and the sum of the other classes."""
    dtype = accumulator(student)

    def block(student, indices):
        column, real = _slots(indices, student.shape[1])
        top = maxima(student, dtype)
        z = student.to(dtype)
        top_r, sum_r = row_stats(_others(z, column, real), temperature, dtype)
        kept = torch.where(real, (z.gather(1, column) - top[:, None]) / temperature, -INF)
        rest = (top_r - top) / temperature + sum_r.log()
        log_q = torch.cat([kept, rest[:, None]], 1)
        log_q -= fixed_sum(log_q.exp()).log()[:, None]
        wrong = check.unusable_rows(indices, student.shape[1], True)
        log_q = torch.where(wrong[:, None], float("nan"), log_q)
        return log_q, torch.cat([log_q, top_r[:, None], sum_r[:, None]], 1)

    return by_block(block, student, indices)


@op("softmax_kl", lambda student, **_: shapes.gradient(student), has_kernels=False)
def _topk_outcomes_backward(
    grad: Tensor, student: Tensor, indices: Tensor, stats: Tensor, temperature: float
) -> Tensor:
    """-> gradient of the student; 0 in a row of upstream 0, whatever it holds."""
    log_q, (top_r, sum_r) = stats[:, :-2], stats[:, -2:].unbind(1)
    grad = torch.where(grad == 0, 0.0, grad)
    slope = grad - torch.where((grad == 0).all(1, keepdim=True), 0.0, log_q.exp() * fixed_sum(grad)[:, None])

    def block(student, indices, slope, top_r, sum_r):
        column, real = _slots(indices, student.shape[1])
        slope, of_rest = slope[:, :-1] / temperature, slope[:, -1:] / temperature
        others = torch.where(of_rest == 0, 0.0, softmax(student, top_r, sum_r, temperature) * of_rest)
        # Slots of padding repeat a kept one: each class gets the sum, the kept classes nothing of the others.
        others = others.scatter(1, column, torch.where(real.any(1, keepdim=True), 0.0, others.gather(1, column)))
        return (others.scatter_add_(1, column, torch.where(real, slope, 0.0)).to(student.dtype),)

    return by_block(block, student, indices, slope, top_r, sum_r)[0]


_outcomes_function = statistics_kept(_topk_outcomes, _topk_outcomes_backward)


def outcomes(student: Tensor, indices: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [rows, k + 1] of student rows at T: of the kept classes (-inf: padding), of all others."""
    return _outcomes_function((float(temperature),), student, indices)


def _missing_mass(log_p):
    """log(1 - sum p), at least that of LEAST_TAIL."""
    return torch.log(-torch.expm1(torch.logsumexp(log_p, 1).clamp(max=-LEAST_TAIL)))


def of_outcomes(student: Tensor, teacher: TopK, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of student and teacher rows at T: over the slots, and over the rest unless it is left out."""
    if teacher.tail == "renormalise":
        column, real = _slots(teacher.indices, student.shape[1])
        kept = student.gather(1, column).to(accumulator(student, teacher.values)) / temperature
        log_q = torch.cat([torch.where(real, kept, -INF), torch.full_like(kept[:, :1], -INF)], 1)
    else:
        log_q = outcomes(student, teacher.indices, temperature)
    return of_slots(log_q, teacher, temperature)


def of_slots(log_q: Tensor, teacher: TopK, temperature: float) -> tuple[Tensor, Tensor]:
    """The same from the student's log-probabilities [rows, k + 1], of the slots and of the rest."""
    values, indices, rest, stored, tail = teacher
    dtype = accumulator(log_q, values)
    log_q, values = log_q.to(dtype), torch.where(indices >= 0, values.to(dtype), -INF)
    if tail == "renormalise":
        return log_q[:, :-1].log_softmax(1), (values * (stored / temperature)).log_softmax(1)
    if tail == "drop":
        return log_q[:, :-1], values
    if tail == "rest":
        rest = torch.full_like(values[:, 0], -INF) if rest is None else rest.to(dtype)
        return log_q, torch.cat([values, rest[:, None]], 1).div(temperature).log_softmax(1)
    rest = torch.where(log_q[:, -1].detach() == -INF, -INF, _missing_mass(values))
    return log_q, torch.cat([values, rest[:, None]], 1)


def truncated(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """D_beta of each row where the probabilities need not sum to 1: the plain sum, which may be negative."""
    kept = log_p > -INF
    log_q, log_p = (torch.where(kept, x, 0.0) for x in (log_q, log_p))
    p, q = torch.where(kept, log_p.exp(), 0.0), torch.where(kept, log_q.exp(), 0.0)
    if beta == 0:
        return fixed_sum(torch.where(p == 0, 0.0, p * (log_p - log_q)))
    if beta == 1:
        return fixed_sum(torch.where(q == 0, 0.0, q * (log_q - log_p)))
    shares = torch.tensor([beta, 1 - beta], dtype=log_p.dtype, device=log_p.device).log()
    log_m = torch.logaddexp(log_p + shares[0], log_q + shares[1])
    return fixed_sum(beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m))


def topk_overlap(student: Tensor, topk: TopK) -> tuple[Tensor, Tensor, Tensor]:
    """How much of both networks the kept classes hold, row by row, at temperature 1: three (...) tensors.

    -> the student's mass on the kept classes, the teacher's (of log-probabilities at their temperature; of logits with
    their rest), and how many of them are among the student's own k largest, k being the row's slots without padding.

    Args:
        student: logits (..., C). topk: a :class:`TopK`; without gradients.

    Raises: TypeError, ValueError naming the argument.
    """
    check.rows_of_logits("student", student)
    topk = TopK(*topk)
    shape, rows = student.shape[:-1], rows_of(student.detach())
    indices = rows_of(check.top_k(topk.values, topk.indices, topk.rest, student, padded=True))
    values, real = rows_of(topk.values), indices >= 0
    dtype = accumulator(student, values)
    student_mass = fixed_sum(outcomes(rows, indices, 1.0)[:, :-1].exp()).to(dtype)
    log_p = torch.where(real, values.to(dtype), -INF)
    if topk.tail == "rest":
        rest = rows.new_full((len(rows),), -INF) if topk.rest is None else topk.rest.reshape(-1)
        log_p = torch.cat([log_p, rest.to(dtype)[:, None]], 1).div(topk.temperature).log_softmax(1)[:, :-1]
    largest = rows.topk(min(indices.shape[1], rows.shape[1]), dim=1).indices
    among = torch.arange(largest.shape[1], device=rows.device) < real.sum(1, keepdim=True)
    found = ((indices[:, :, None] == largest[:, None, :]) & among[:, None, :]).any(2)
    results = student_mass, fixed_sum(log_p.exp()), found.sum(1)
    return tuple(x.reshape(shape) for x in results)
