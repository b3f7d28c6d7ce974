"""Distillation in Transformers' Trainer: language models from hidden states, without either side's logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdfast._extras import require
from kdfast.ops import check
from kdfast.ops.linear import linear_kl

__all__ = ["DistillationTrainer"]

_transformers = require("transformers", extra="llm")


class DistillationTrainer(_transformers.Trainer):
    """A Trainer whose causal language model learns from a teacher with the same vocabulary, and from the labels.

    ``alpha D_beta(p || q) + (1 - alpha) CE(q, labels)`` of the tokens whose label is not -100, as
    :class:`kdfast.LinearKD` has it; the label of a position is the next one's. The average is over the tokens of a
    whole step, however it is accumulated or spread over processes. Hidden states come from both decoders; logits are
    formed some rows at a time, in float32.

    Args:
        model, args, and what else Trainer takes.
        teacher: a causal language model with as many classes. It is moved to the model's device, in eval mode, without
            gradients, and in no checkpoint.
        temperature, beta: of D_beta, without T^2. alpha: from 0 to 1; with 0 the teacher does not run.

    Models whose logits are ``softcap tanh(scale (h W^T + b) / softcap)`` are taken: Llama, Qwen, Mistral, Gemma,
    Cohere, GPT-2 and their like, with tied heads too. Others, vocabularies that differ, label smoothing and heads that
    FSDP has split are a ValueError. Predictions beside the loss (``prediction_loss_only=False``) form all logits.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *more: Any,
        teacher: Any,
        temperature: float = 1.0,
        beta: float = 0.0,
        alpha: float = 0.5,
        **options: Any,
    ) -> None:
        check.positive("temperature", temperature)
        check.number("beta", beta, 0, 1)
        check.number("alpha", alpha, 0, 1)
        super().__init__(model, args, *more, **options)
        if self.args.label_smoothing_factor:
            raise ValueError(f"label_smoothing_factor must be 0, got {self.args.label_smoothing_factor}")
        self.temperature, self.beta, self.alpha = temperature, beta, alpha
        self.model_accepts_loss_kwargs = True  # the loss is divided by the tokens of the whole step
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self._all_logits = False
        heads = [_head(name, network) for name, network in (("model", self.model), ("teacher", self.teacher))]
        sizes = [len(head.weight) for head in heads]
        if sizes[0] != sizes[1]:
            raise ValueError(f"teacher must have the model's {sizes[0]} classes, got {sizes[1]}")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch with input_ids and labels; it divides by `num_items_in_batch` where that is given."""
        if "labels" not in inputs:
            raise ValueError(f"inputs must have labels, got {', '.join(inputs)}")
        labels = inputs["labels"]
        given = {name: x for name, x in inputs.items() if name != "labels"}
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
        loss = self._loss(student, states[-1], given, labels, divisor)
        if divisor is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # which the average over processes divides by
        if not return_outputs:
            return loss
        return loss, {"loss": loss, "logits": outputs["logits"]}

    def _loss(self, student, hidden, given, labels, divisor):
        teacher = _head("teacher", self.teacher, checked=False)
        states, weight, bias = hidden.detach(), student.weight.detach(), None
        if self.alpha:
            with torch.inference_mode():
                states = _last(teacher.decoder(**given, use_cache=False))
            weight, bias = teacher.weight, teacher.bias
        return linear_kl(
            hidden[:, :-1],
            student.weight,
            states[:, :-1],
            weight,
            student_bias=student.bias,
            teacher_bias=bias,
            temperature=self.temperature,
            beta=self.beta,
            labels=labels[:, 1:],
            kl_weight=self.alpha,
            ce_weight=1 - self.alpha,
            student_softcap=student.softcap,
            teacher_softcap=teacher.softcap,
            student_scale=student.scale,
            teacher_scale=teacher.scale,
            divisor=divisor,
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
