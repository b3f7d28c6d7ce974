"""Born-Again Networks: the two losses that take the teacher's dark knowledge apart."""

import torch
from torch import Tensor

from kdfast.losses.base import Loss, made_of_settings, one_of, setting
from kdfast.ops import check
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.rows import row_stats
from kdfast.ops.softmax_kl import cross_entropy, softmax_kl


class CWTM(Loss):
    """CWTM - Born-Again Neural Networks, Confidence-Weighted by Teacher Max (Furlanello et al., ICML 2018).

    ``-sum_b w_b log softmax(student)_b[y_b]``, ``w_b = max_c p_b / sum_b max_c p_b`` with p = softmax(teacher): the
    labels' cross-entropy, in which samples count by the teacher's confidence. The weights sum to 1, so nothing is
    divided by B once more. Shapes: student, teacher (B, C) logits, labels (B,) integers; 0-d, in nats.
    No gradient to the teacher. There is no official code. Op: ``cross_entropy``.
    """

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        check.pair(student, teacher)
        labels, wrong = check.known_classes(labels, student)
        rows = cross_entropy(student, labels, reduction="none")
        with torch.no_grad():
            _, total = row_stats(teacher, 1.0, accumulator(student, teacher))
            confidence = torch.where(total == 0, 0.0, 1 / total)  # 0: a row that is -inf everywhere
            whole = fixed_sum(confidence)
            weight = torch.where(wrong, float("nan"), confidence / torch.where(whole == 0, 1.0, whole))
        return fixed_sum(torch.where(weight == 0, 0.0, weight * rows))


@made_of_settings
class DKPP(Loss):
    """DKPP - Born-Again Neural Networks, Dark Knowledge with Permuted Predictions (Furlanello et al., ICML 2018).

    ``T^2 KL(p || q)`` averaged over the batch, q = softmax(student / T), p the softmax of the teacher's logits at T, of
    which all but one class per sample have changed places: the student learns how sure the teacher is, not of what.
    `keep` is that class, the "label" as in the public code, or the teacher's "argmax" as in the paper.
    Shapes: student, teacher (B, C) logits, labels (B,) integers, permutation (B, C) integers or None: drawn anew for
    each sample. 0-d, in nats. Gradients flow to both. There is no official code. Op: ``softmax_kl``.

    Args:
        temperature: T, above 0.
        keep: the class that stays, "label" or "argmax".
    """

    temperature: float = setting(1.0, check.positive)
    keep: str = setting("label", one_of("label", "argmax"))

    def permute(self, teacher: Tensor, labels: Tensor, permutation: Tensor | None = None) -> Tensor:
        """``teacher.gather(1, q)``: q is `permutation` after one swap per row, which gives ``q[b, kept] == kept``."""
        check.logits("teacher", teacher)
        labels, wrong = check.known_classes(labels, teacher)
        kept = (labels if self.keep == "label" else teacher.argmax(1))[:, None]
        if permutation is None:
            permutation = torch.rand(teacher.shape, device=teacher.device).argsort(1)
        else:
            check.permutation(permutation, teacher)
            permutation = permutation.long()
        q = torch.where(permutation == kept, permutation.gather(1, kept), permutation)
        q = torch.where(torch.arange(teacher.shape[1], device=teacher.device) == kept, kept, q)
        return torch.where(wrong[:, None], float("nan"), teacher.gather(1, q))

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor, permutation: Tensor | None = None) -> Tensor:
        check.pair(student, teacher)
        return softmax_kl(student, self.permute(teacher, labels, permutation), self.temperature)
