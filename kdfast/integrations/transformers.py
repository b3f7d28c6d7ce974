"""Distillation in Transformers' Trainer: language models from hidden states, without either side's logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdfast._extras import require
from kdfast.integrations.top_k_columns import COLUMNS, StoredTeacher, TopKCollator
from kdfast.ops import check
from kdfast.ops.linear import linear_kl
from kdfast.ops.top_k import TAILS, TopK

__all__ = ["DistillationTrainer", "StoredTeacher", "TopKCollator"]

_transformers = require("transformers", extra="llm")


class DistillationTrainer(_transformers.Trainer):
    """A Trainer whose causal language model learns from a teacher with the same vocabulary, and from the labels.

    ``alpha D_beta(p || q) + (1 - alpha) CE(q, labels)`` of the tokens whose label is not -100, as
    :class:`kdfast.LinearKD` has it; the label of a position is the next one's. The average is over the tokens of a
    whole step, however it is accumulated or spread over processes. Hidden states come from both decoders; logits are
    formed some rows at a time, in float32.

    Args:
        model: the student.
        args: Transformers' TrainingArguments.
        more, options: what else Trainer takes.
        teacher: a causal language model with as many classes. It is moved to the model's device, in eval mode, without
            gradients, and in no checkpoint. None: each sample has the teacher's k log-probabilities of its tokens, in
            the columns teacher_log_probabilities and teacher_indices (tokens, k), the index -1 for padding; row i is
            of token i, as labels[i] is, and row 0 is not read. The data collator gets no more columns than without:
            they are padded after it (:class:`TopKCollator`). :class:`StoredTeacher` has them from a store.
        temperature: of D_beta, without T^2; the columns' log-probabilities are at this temperature.
        beta: of D_beta, from 0 to 1.
        alpha: from 0 to 1; with 0 the teacher does not run, and its columns are not read.
        tail: what becomes of the classes that the columns do not have, see :meth:`kdfast.TopK.of_log_probabilities`.

    Models whose logits are ``softcap tanh(scale (h W^T + b) / softcap)`` are taken: Llama, Qwen, Mistral, Gemma,
    Cohere, GPT-2 and their like, with tied heads too. Others, vocabularies that differ, label smoothing and heads that
    FSDP has split are a ValueError. Predictions beside the loss (``prediction_loss_only=False``) form all logits.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *more: Any,
        teacher: Any = None,
        temperature: float = 1.0,
        beta: float = 0.0,
        alpha: float = 0.5,
        tail: str = "bucket",
        **options: Any,
    ) -> None:
        check.positive("temperature", temperature)
        check.number("beta", beta, 0, 1)
        check.number("alpha", alpha, 0, 1)
        check.one_of("tail", tail, TAILS)
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher must be a causal language model, or None for the columns {' and '.join(COLUMNS)} "
                            f"(StoredTeacher has them from a store), got {type(teacher).__name__}")  # fmt: skip
        super().__init__(model, args, *more, **options)
        if self.args.label_smoothing_factor:
            raise ValueError(f"label_smoothing_factor must be 0, got {self.args.label_smoothing_factor}")
        self.temperature, self.beta, self.alpha, self.tail = temperature, beta, alpha, tail
        self.model_accepts_loss_kwargs = True  # the loss is divided by the tokens of the whole step
        self._all_logits = False
        self.teacher, classes = teacher, len(_head("model", self.model).weight)
        if teacher is None:
            for name in ("train_dataset", "eval_dataset"):
                self._check_stored(name, getattr(self, name), classes)
            if alpha:
                self.data_collator = TopKCollator(self.data_collator, classes)
            return
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        size = len(_head("teacher", self.teacher).weight)
        if size != classes:
            raise ValueError(f"teacher must have the model's {classes} classes, got {size}")

    def _check_stored(self, name, rows, classes):
        """A store that the samples come from says what the loss assumes."""
        if isinstance(rows, dict):
            for key, part in rows.items():
                self._check_stored(f"{name}[{key!r}]", part, classes)
        elif isinstance(rows, StoredTeacher):
            expected = {"classes": classes, "temperature": self.temperature, "tail": self.tail}
            if differences := rows.store.contents.differences(expected):
                raise ValueError(f"{name} has a store that does not fit the trainer: {'; '.join(differences)}")

    def _set_signature_columns_if_needed(self) -> None:
        """Trainer keeps the columns that the model's forward takes, and here the teacher's, too."""
        super()._set_signature_columns_if_needed()
        if self.teacher is None and self.alpha:
            self._signature_columns += [name for name in COLUMNS if name not in self._signature_columns]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch with input_ids and labels; it divides by `num_items_in_batch` where that is given.

        Args:
            model: the student, as Trainer has wrapped it.
            inputs: the batch; without a teacher with both its columns (B, L, k).
            return_outputs: whether the logits come with it.
            num_items_in_batch: tokens that count in the whole step.
        """
        if "labels" not in inputs:
            raise ValueError(f"inputs must have labels, got {', '.join(inputs)}")
        labels = inputs["labels"]
        given = {name: x for name, x in inputs.items() if name not in ("labels", *COLUMNS)}
        student = _head("model", self.accelerator.unwrap_model(model), checked=False)
        keep = {} if self._all_logits else {"logits_to_keep": 1}
        states: list[Tensor] = []
        handle = student.decoder.register_forward_hook(lambda module, args, out: states.append(_last(out)))
        try:
            outputs = model(**given, **keep, use_cache=False)  # by the wrapped model, as its hooks expect
        finally:
            handle.remove()
        divisor = num_items_in_batch
        if isinstance(divisor, Tensor):
            divisor = divisor.reshape(-1)[0]
        loss = self._loss(student, states[-1], self._side(inputs, given), labels, divisor)
        if divisor is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # which the average over processes divides by
        if not return_outputs:
            return loss
        return loss, {"loss": loss, "logits": outputs["logits"]}

    def _side(self, inputs, given):
        """What the loss takes of the teacher."""
        if not self.alpha:
            return None
        if self.teacher is None:
            return _top_k(inputs, self.temperature, self.tail)
        teacher = _head("teacher", self.teacher, checked=False)
        with torch.inference_mode():
            states = _last(teacher.decoder(**given, use_cache=False))
        return states[:, :-1], teacher

    def _loss(self, student, hidden, side, labels, divisor):
        settings: dict[str, Any] = {}
        if side is None:  # of weight 0
            teacher, weight = hidden[:, :-1].detach(), student.weight.detach()
        elif isinstance(side, TopK):
            teacher, weight = side, None
        else:
            teacher, head = side
            weight = head.weight
            settings = {"teacher_bias": head.bias, "teacher_softcap": head.softcap, "teacher_scale": head.scale}
        return linear_kl(
            hidden[:, :-1],
            student.weight,
            teacher,
            weight,
            student_bias=student.bias,
            temperature=self.temperature,
            beta=self.beta,
            labels=labels[:, 1:],
            kl_weight=self.alpha,
            ce_weight=1 - self.alpha,
            student_softcap=student.softcap,
            student_scale=student.scale,
            divisor=divisor,
            **settings,
        )

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *more: Any, **options: Any
    ) -> Any:
        """As Trainer's; logits only where they are asked for."""
        self._all_logits = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, *more, **options)
        finally:
            self._all_logits = False


def _top_k(inputs, temperature, tail):
    """The teacher of tokens 1, 2, ... that the columns of a batch have."""
    if absent := [name for name in COLUMNS if name not in inputs]:
        raise ValueError(f"inputs must have {' and '.join(absent)} where teacher is None, got {', '.join(inputs)}")
    tokens, columns = inputs["labels"].shape, [inputs[name] for name in COLUMNS]
    for name, x in zip(COLUMNS, columns, strict=True):
        check.tensor(name, x)
        if x.dim() != 3 or x.shape[:2] != tokens:
            raise ValueError(f"{name} must be ({', '.join(map(str, tokens))}, k) as labels are, got {tuple(x.shape)}")
    values, indices = columns
    if values.shape != indices.shape:
        raise ValueError(f"{COLUMNS[1]} must have the shape of {COLUMNS[0]} {tuple(values.shape)}, got "
                         f"{tuple(indices.shape)}")  # fmt: skip
    return TopK.of_log_probabilities(values[:, 1:], indices[:, 1:], temperature, tail)


class _Head(NamedTuple):
    """How a model's logits follow from its decoder's last hidden states."""

    decoder: nn.Module
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float

    def logits(self, hidden):
        z = self.scale * nn.functional.linear(hidden, self.weight, self.bias)
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def _head(name, network, checked=True):
    layer, config = network.get_output_embeddings(), network.config.get_text_config()
    if layer is None or not isinstance(getattr(layer, "weight", None), Tensor):
        raise ValueError(f"{name} must be a causal language model with a head, got {type(network).__name__}")
    if hasattr(layer.weight, "full_tensor"):
        raise ValueError(f"{name} must have a whole head on each process, got one that is split")
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    softcap = getattr(config, "final_logit_softcapping", None)
    head = _Head(network.get_decoder(), layer.weight, getattr(layer, "bias", None), softcap, scale)
    if checked:
        _check_logits(name, network, head)
    return head


@torch.no_grad()
def _check_logits(name, network, head):
    """The model's own logits of a few tokens are the head's."""
    tokens, training = torch.arange(4, device=head.weight.device)[None] % len(head.weight), network.training
    network.eval()
    try:
        want, hidden = network(input_ids=tokens).logits, _last(head.decoder(input_ids=tokens))
    finally:
        network.train(training)
    got = head.logits(hidden.to(head.weight.dtype))
    close = 1e-3 if want.dtype == torch.float32 else 5e-2
    if got.shape != want.shape or (got.float() - want.float()).abs().max() > close * (1 + want.float().abs().max()):
        raise ValueError(f"{name} must have logits that are its head's of the last hidden states; these of "
                         f"{type(network).__name__} are not")  # fmt: skip


def _last(out):
    return out[0] if isinstance(out, tuple) else out.last_hidden_state
