"""Losses that need no kernel of their own: plain PyTorch, with the gradient written out."""

import torch
from torch import Tensor

from kdfast.losses.base import Loss, made_of_settings, setting
from kdfast.ops import check
from kdfast.ops.accumulate import fixed_sum
from kdfast.ops.saved import save, saved


def _pearson(a, b):
    """Rows correlated: -> r [rows], and d r / d a, d r / d b [rows, cols]; the denominator is |a| |b| + 1e-8."""
    a = a - fixed_sum(a)[:, None] / a.shape[1]
    b = b - fixed_sum(b)[:, None] / b.shape[1]
    norm_a, norm_b = fixed_sum(a * a).sqrt()[:, None], fixed_sum(b * b).sqrt()[:, None]
    dot, floor = fixed_sum(a * b)[:, None], norm_a * norm_b + 1e-8
    # A constant row has norm 0; there the numerators are 0 as well, and so is the slope.
    slope = dot / (floor * floor)
    grad_a = b / floor - slope * norm_b * a / torch.where(norm_a > 0, norm_a, 1.0)
    grad_b = a / floor - slope * norm_a * b / torch.where(norm_b > 0, norm_b, 1.0)
    return (dot / floor)[:, 0], grad_a, grad_b


class _Dist(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, beta, gamma, temperature):
        save(ctx, student, teacher)
        ctx.constants = (beta, gamma, temperature)
        return _Dist.evaluate(student, teacher, beta, gamma, temperature)[0]

    @staticmethod
    def evaluate(student, teacher, beta, gamma, temperature):
        """-> loss, student and teacher softmax q and p, d loss / d q, d loss / d p."""
        dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        q, p = ((x.to(dtype) / temperature).softmax(1) for x in (student, teacher))
        loss, grad_q, grad_p = q.new_zeros(()), torch.zeros_like(q), torch.zeros_like(p)
        # Rows are compared, then columns.
        for weight, sides in ((beta, (q, p)), (gamma, (q.t(), p.t()))):
            if not weight or not q.shape[0]:
                continue
            r, slope_q, slope_p = _pearson(*sides)
            share = temperature**2 * weight / len(r)
            loss = loss + share * fixed_sum(1 - r)
            transposed = sides[0] is not q
            grad_q = grad_q - share * (slope_q.t() if transposed else slope_q)
            grad_p = grad_p - share * (slope_p.t() if transposed else slope_p)
        return loss, q, p, grad_q, grad_p

    @staticmethod
    def backward(ctx, grad):
        check.first_derivative_only("DIST")
        beta, gamma, _ = ctx.constants
        student, teacher = saved(ctx)
        _, q, p, grad_q, grad_p = _Dist.evaluate(student, teacher, *ctx.constants)
        scale = grad / ctx.constants[2]
        grads = []
        for x, prob, slope, need in ((student, q, grad_q, 0), (teacher, p, grad_p, 1)):
            inner = scale * prob * (slope - fixed_sum(prob * slope)[:, None])
            # A nearly constant column has slopes of up to 1e8, more than float16 can say.
            inner = inner.clamp(-torch.finfo(x.dtype).max, torch.finfo(x.dtype).max).to(x.dtype)
            if not beta and not gamma:  # whatever the networks are
                inner = torch.zeros_like(x)
            grads.append(inner if ctx.needs_input_grad[need] else None)
        return *grads, None, None, None


@made_of_settings
class DIST(Loss):
    """DIST - Knowledge Distillation from A Stronger Teacher (Huang et al., NeurIPS 2022).

    ``T^2 [beta (1 - mean_b r_b) + gamma (1 - mean_c r_c)]``: r_b is the Pearson correlation of the student's and the
    teacher's softmax over the classes of sample b, r_c that over the batch at class c, denominators + 1e-8 as in the
    official code (so that equal networks leave a small positive value). Shapes: student, teacher (B, C) logits, or
    (B, C, H, W), where every position is a sample; 0-d. Gradients flow to both. The official segmentation version has
    no temperature: keep it at 1 there. With one sample the second term is the constant gamma T^2. Plain PyTorch.

    Args:
        beta: weight of the correlations between the classes of a sample.
        gamma: weight of those within a class.
        temperature: T, above 0.
    """

    beta: float = setting(1.0, check.number)
    gamma: float = setting(1.0, check.number)
    temperature: float = setting(1.0, check.positive)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check.tensor("student", student)
        check.tensor("teacher", teacher)
        if student.dim() == 4 and teacher.dim() == 4:
            student, teacher = (x.movedim(1, -1).flatten(0, -2) for x in (student, teacher))
        check.pair(student, teacher)
        return _Dist.apply(student, teacher, float(self.beta), float(self.gamma), float(self.temperature))
