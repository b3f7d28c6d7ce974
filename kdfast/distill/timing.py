"""How long a step and its loss take, measured after a training on its last state, so that no result depends on it."""

import statistics
import time
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kdfast
from kdfast import _kernels

__all__ = ["measure"]

WARM_UP = 3
REPEATS = 30
MIN_REPEATS = 5
LIMIT_S = 1.0  # large images on a slow machine: fewer repeats


def measure(trainer):
    """Medians of one step, its objective and its loss on one batch, as a dict in milliseconds.

    ``step_ms``: batch, teacher, student, objective, backward and optimizer. ``objective_ms``: forward and backward of
    the objective alone (loss and cross-entropy), down to the student's outputs. ``loss_ms`` and ``fallback_ms``: the
    same of the row's loss alone, as it runs here and under `kdfast.fallback()`. ``path`` is "kernel" if all its ops
    have a kernel for this device, "fallback" if one has none, "torch" if it uses no op of kdfast; ``fallback_ms`` is
    None except for "kernel". The steps move the weights: the trainer is of no use afterwards.
    """
    device = trainer.device
    index = torch.arange(trainer.batch_size, device=device)
    trainer.network.train()
    batch = _leaves(trainer.batch(index))

    def gradients(function):
        # The inputs a loss does not read get no gradient, and cost nothing.
        inputs = [x for logits, embedding, maps in batch.students for x in (logits, embedding, *maps)]
        return torch.autograd.grad(function(batch), [*inputs, *trainer.objective.parameters()], allow_unused=True)

    def loss():
        return gradients(trainer.objective.distillation)

    path = _path(loss, device.type)
    times = {
        "step_ms": _median_ms(lambda: trainer.step(index), device),
        "objective_ms": _median_ms(lambda: gradients(trainer.objective), device),
        "loss_ms": _median_ms(loss, device),
        "fallback_ms": None,
        "path": path,
    }
    if path == "kernel":
        with kdfast.fallback():
            times["fallback_ms"] = _median_ms(loss, device)
    return times


def _leaves(batch):
    """The batch with the students' outputs cut from their networks."""
    students = type(batch.students)(_cut(outputs) for outputs in batch.students)
    return replace(batch, student=students[0], students=students)


def _cut(outputs):
    logits, embedding, *maps = (x.detach().requires_grad_() for x in (outputs.logits, outputs.embedding, *outputs.maps))
    return type(outputs)(logits, embedding, maps)


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
    if not recorder.names:
        return "torch"
    return "kernel" if all(paths[name][device_type] == "kernel" for name in recorder.names) else "fallback"


def _median_ms(call, device):
    for _ in range(WARM_UP):
        call()
    times = []
    begin = time.perf_counter()
    while len(times) < REPEATS and (len(times) < MIN_REPEATS or time.perf_counter() - begin < LIMIT_S):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
