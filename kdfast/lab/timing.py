"""How long a step and its loss take, measured after a training on its last state, so that no result depends on it."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer

import kdfast
from kdfast import _kernels

__all__ = ["measure"]

SECONDS = 0.05  # of each figure


def measure(trainer: Any) -> dict[str, float]:
    """Medians of one step, its objective and its loss on one batch, as a dict in milliseconds.

    ``step_ms``: batch, teachers, students, objective, backward and optimizer. ``objective_ms``: forward and backward of
    the objective alone (loss and cross-entropy), down to the students' outputs. ``loss_ms`` and ``fallback_ms``: the
    same of the row's loss alone, as it runs here and under `kdfast.fallback()`. ``path`` is "kernel" if all its ops
    have a kernel for this device, "fallback" if one has none, "torch" if it uses no op of kdfast; ``fallback_ms`` is
    None except for "kernel". Where the student learns from its teacher's features in a pre-stage, the times are of that
    stage; the objective of a loss of Jacobians goes down to the students' weights, there being no outputs to stop at.
    The steps move the weights: the trainer is of no use afterwards.
    """
    device, objective = trainer.device, trainer.objectives[0]
    if not objective.reads("student"):
        objective = trainer.objective
    index = torch.arange(trainer.batch_size, device=device)
    trainer.network.train()
    batch = trainer.batch(index, objective)
    if objective.readers("images"):
        ends = list(trainer.network.parameters())
    else:
        # Without their graph, each requiring a gradient.
        cut = [{name: x.detach().requires_grad_() for name, x in said.items()} for said in batch["student"]]
        batch["student"], ends = cut, [x for said in cut for x in said.values()]

    def gradients(value):
        # The inputs a loss does not read get no gradient, and cost nothing.
        inputs = [*ends, *objective.parameters()]
        return torch.autograd.grad(value, inputs, allow_unused=True, retain_graph=True)

    alone = objective.terms[0]  # without the cross-entropy
    arguments = alone.arguments(objective.values(**batch))

    def loss():
        return gradients(alone.loss(*arguments))

    path = _path(loss, device.type)
    times = {
        "objective_ms": _median_ms(lambda: gradients(objective(**batch))),
        "loss_ms": _median_ms(loss),
        "fallback_ms": None,
        "path": path,
    }
    if path == "kernel":
        with kdfast.fallback():
            times["fallback_ms"] = _median_ms(loss)
    # Last, because it changes the weights that the graph of `batch` needs.
    times["step_ms"] = _median_ms(lambda: trainer.step(index, objective))
    return times


class _OpRecorder(TorchDispatchMode):
    """Collects the names of the kdfast ops that run inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == _kernels.NAMESPACE.ns:
            self.names.add(function._opname)
        return function(*args, **(kwargs or {}))


def _path(loss, device_type):
    with _OpRecorder() as recorder:
        loss()
    paths = _kernels.paths()
    taken = {paths[name][device_type] for name in recorder.names if name in paths}
    return "torch" if not taken else "fallback" if "fallback" in taken else "kernel"


def _median_ms(call):
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())  # it waits for a GPU
    return 1e3 * timer.blocked_autorange(min_run_time=SECONDS).median
