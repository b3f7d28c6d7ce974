"""Argument checks shared by the ops: each error names the argument, what came and what was expected."""

import math
import numbers
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
LARGEST_LOG = 1 / 64  # of a log-probability
REDUCTIONS = ("none", "sum", "mean", "batchmean")
_PLAIN = (torch.Tensor, torch.nn.Parameter)
# Looked up once: a check takes less time than finding these names.
_STRIDED, _is_compiling, _transform_level = (
    torch.strided,
    torch.compiler.is_compiling,
    torch._C._functorch.maybe_current_level,
)


def tensor(name: str, x: Any) -> None:
    """`x` is a plain, dense torch.Tensor: no DTensor, no functorch wrapper, no sparse, nested or MKL-DNN layout."""
    if type(x) not in _PLAIN:
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if type(x).__name__ == "DTensor":
            raise TypeError(
                f"{name} is a DTensor, which kdfast does not support: pass {name}.to_local() or .full_tensor()"
            )
    if x.layout is not _STRIDED or x.is_nested:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.").lstrip("_")
        raise TypeError(f"{name} must be a dense tensor, got a {kind} one: pass {name}.to_dense() or a padded tensor")
    if not _is_compiling() and _transform_level() is not None:
        raise RuntimeError(
            f"{name} is inside a torch.func transform (vmap, grad, jvp ...), which kdfast does not support: "
            "call the loss on plain tensors, with reduction='none' for one value per sample"
        )


def unlike_first(tensors: Sequence[Any]) -> list[int]:
    """Indices of the tensors whose type, dtype, shape or device differs from those of the first; 0 first.

    What passes a check of type, shape or device for the first passes for the others: plain tensors that share them.
    """
    first, *others = tensors
    if type(first) not in _PLAIN:
        return list(range(len(tensors)))
    dtype, shape, device = first.dtype, first.shape, first.device
    return [0] + [
        i
        for i, x in enumerate(others, 1)
        if type(x) not in _PLAIN or x.dtype != dtype or x.shape != shape or x.device != device
    ]


def floating(name: str, x: Any) -> None:
    """`x` is a `tensor` of one of the four floating-point types."""
    tensor(name, x)
    _float_type(name, x)


def _float_type(name, x):
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {x.dtype}")


def same_device(name: str, x: Any, other: Tensor, of: str = "the student") -> None:
    """`x` is on the device of `other`, which messages call `of`."""
    if x.device != other.device:
        raise ValueError(f"{name} must be on {of}'s device {other.device}, got {x.device}")


def shaped(name: str, x: Any, shape: Sequence[int], other: Tensor, of: str = "the student", meaning: str = "") -> None:
    """`x` has floating-point numbers of this shape, whose `meaning` messages tell, on the device of `other`."""
    floating(name, x)
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}{meaning}, got {tuple(x.shape)}")
    same_device(name, x, other, of)


def logits(name: str, x: Any) -> None:
    """`x` is a floating-point (B, C) tensor with at least one class."""
    tensor(name, x)
    if x.dim() != 2:
        raise ValueError(
            f"{name} must be 2-D (batch, classes), got shape {tuple(x.shape)}; flatten other dimensions into the "
            "batch, for example x.flatten(0, -2) for (B, L, C) or x.movedim(1, -1).flatten(0, -2) for (B, C, H, W)"
        )
    _float_type(name, x)
    if x.shape[1] == 0:
        raise ValueError(f"{name} must have at least one class, got shape {tuple(x.shape)}")


def rows_of_logits(name: str, x: Any) -> None:
    """`x` is a floating-point (..., C) tensor with at least one leading dimension and one class."""
    tensor(name, x)
    if x.dim() < 2:
        raise ValueError(f"{name} must be (batch, classes) or (..., classes), got shape {tuple(x.shape)}")
    _float_type(name, x)
    if x.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one class, got shape {tuple(x.shape)}")


def pair(student: Any, teacher: Any, each: Callable[[str, Any], None] = logits) -> None:
    """Student and teacher logits of one shape on one device, each as `each` checks it; dtypes may differ."""
    each("student", student)
    if (
        type(teacher) in _PLAIN
        and teacher.dtype is student.dtype
        and teacher.shape == student.shape
        and teacher.device == student.device
        and teacher.layout is _STRIDED
        and not teacher.is_nested
    ):
        return  # what passed for the student passes for the teacher
    each("teacher", teacher)
    if student.shape != teacher.shape:
        raise ValueError(f"teacher must have the student's shape {tuple(student.shape)}, got {tuple(teacher.shape)}")
    same_device("teacher", teacher, student)


def embeddings(name: str, x: Any) -> None:
    """`x` is a floating-point (B, D) tensor, or (B, ...) to be flattened, with at least one feature."""
    tensor(name, x)
    if x.dim() < 2:
        raise ValueError(f"{name} must be (batch, features) or (batch, ...), got shape {tuple(x.shape)}")
    _float_type(name, x)
    if 0 in x.shape[1:]:
        raise ValueError(f"{name} must have at least one feature, got shape {tuple(x.shape)}")


def same_batch(name: str, x: Any, other: Tensor, of: str = "the student") -> None:
    """Embeddings `x` with as many rows as `other`, on its device."""
    embeddings(name, x)
    if x.shape[0] != other.shape[0]:
        raise ValueError(f"{name} must have {of}'s batch size {other.shape[0]}, got shape {tuple(x.shape)}")
    same_device(name, x, other, of)


def same_shape(name: str, x: Any, other: Tensor, of: str = "the student") -> None:
    """Embeddings `x` of the shape of `other`, on its device; dtypes may differ."""
    embeddings(name, x)
    if x.shape != other.shape:
        raise ValueError(f"{name} must have {of}'s shape {tuple(other.shape)}, got {tuple(x.shape)}")
    same_device(name, x, other, of)


def two_embeddings(student: Any, teacher: Any, fit: Callable[..., None] = same_batch) -> None:
    """Embeddings of student and teacher, with one batch size, or one shape (`fit`)."""
    embeddings("student", student)
    fit("teacher", teacher, student)


def maps(name: str, x: Any) -> None:
    """`x` is a floating-point (B, C, H, W) map with at least one channel and position."""
    embeddings(name, x)
    if x.dim() != 4:
        raise ValueError(f"{name} must be (batch, channels, height, width), got shape {tuple(x.shape)}")


def two_maps(student: Any, teacher: Any) -> None:
    """Maps of student and teacher of one batch size, height and width."""
    maps("student", student)
    maps("teacher", teacher)
    same_batch("teacher", teacher, student)
    if student.shape[2:] != teacher.shape[2:]:
        want, got = tuple(student.shape[2:]), tuple(teacher.shape[2:])
        raise ValueError(f"teacher must have the student's height and width {want}, got {got}")


def layers(
    student: Any,
    teacher: Any,
    each: Callable[[str, Any], None],
    fit: Callable[..., None] = same_batch,
    names: tuple[str, str] = ("student", "teacher"),
    **per_channel: Any,
) -> list[tuple[Any, ...]]:
    """-> tuples (student, teacher, *per_channel), one per layer: of tensors, or of equally long lists of tensors.

    `each(name, x)` checks a map, `fit(name, teacher, student, of)` the two maps of a layer, `channel_values` the rest.
    `names`: of the arguments student and teacher, for messages.
    """
    arguments = {names[0]: student, names[1]: teacher, **per_channel}
    lists = [isinstance(x, (list, tuple)) for x in arguments.values()]
    if any(lists) and not all(lists):
        kinds = _listed(type(x).__name__ for x in arguments.values())
        raise TypeError(f"{_listed(arguments)} must all be tensors, or all lists with one per layer, got {kinds}")
    if not any(lists):
        named = [arguments]
    elif len({len(x) for x in arguments.values()}) > 1 or not student:
        lengths = _listed(str(len(x)) for x in arguments.values())
        raise ValueError(f"{_listed(arguments)} must have as many layers, and at least one, got {lengths}")
    else:
        named = [{f"{name}[{i}]": x[i] for name, x in arguments.items()} for i in range(len(student))]
    for layer in named:
        (name_s, s), (name_t, t), *others = layer.items()
        each(name_s, s)
        each(name_t, t)
        fit(name_t, t, s, of=name_s if any(lists) else f"the {name_s}")
        for name, values in others:
            channel_values(name, values, s)
    return [tuple(layer.values()) for layer in named]


def _listed(words):
    """The words as a sentence has them: a, b and c."""
    *first, last = words
    return f"{', '.join(first)} and {last}"


def channel_values(name: str, values: Any, maps: Tensor) -> None:
    """`values` has one floating-point number for each channel of `maps`, as (C,) or (1, C, 1, 1), on its device."""
    floating(name, values)
    channels = maps.shape[1]
    if values.shape not in ((channels,), (1, channels), (1, channels, 1), (1, channels, 1, 1)):
        raise ValueError(f"{name} must be ({channels},) or (1, {channels}, 1, 1), got shape {tuple(values.shape)}")
    same_device(name, values, maps)


def class_indices(labels: Any, student: Tensor, ignore_index: int | None = None) -> Tensor:
    """Integer labels, one a row, on the student's device, as int64; values are the kernel's to check: `label_range`."""
    tensor("labels", labels)
    leading = student.shape[:-1]
    if labels.dtype not in INTEGERS:
        got = f"got {labels.dtype} of shape {tuple(labels.shape)}"
        raise TypeError(f"labels must be integers of shape {tuple(leading)}, {got}")
    if labels.shape != leading:
        raise ValueError(f"labels must have shape {tuple(leading)}, got {tuple(labels.shape)}")
    same_device("labels", labels, student)
    if labels.is_cuda and not torch.compiler.is_compiling() and os.environ.get("KDFAST_CHECK") == "1":
        label_range(labels.flatten(), student.shape[-1], ignore_index)
    return labels if labels.dtype == torch.int64 else labels.long()


def label_range(labels: Tensor, classes: int, ignore_index: int | None = None) -> None:
    """Every label is a class or `ignore_index`. On CUDA this waits for the device."""
    wrong = (labels < 0) | (labels >= classes)
    if ignore_index is not None:
        wrong &= labels != ignore_index
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(label_message(row, int(labels[row]), classes, ignore_index))


def known_classes(labels: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """-> (B,) int64 labels clamped to classes of `logits`, rows whose label is none: an error on CPU, elsewhere NaN."""
    labels = class_indices(labels, logits)
    classes = logits.shape[1]
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        label_range(labels, classes)
    return labels.clamp(0, classes - 1), (labels < 0) | (labels >= classes)


def label_message(row: int, label: int, classes: int, ignore_index: int | None = None) -> str:
    """What the CPU kernel says of a bad label, too."""
    but = "" if ignore_index is None else f" or ignore_index={ignore_index}"
    return f"labels[{row}] is {label}, expected a class from 0 to {classes - 1}{but}"


def top_k(values: Any, indices: Any, rest: Any, student: Tensor, padded: bool = False) -> Tensor:
    """A top-k teacher (..., k), (..., k), (...) or None on the student's device, without gradient -> indices as int64.

    padded: slots may have the index -1, and there may be more of them than classes.
    """
    floating("teacher.values", values)
    leading, classes = student.shape[:-1], student.shape[-1]
    if values.shape[:-1] != leading or not 1 <= values.shape[-1] <= (values.shape[-1] if padded else classes):
        raise ValueError(
            f"teacher.values must be ({', '.join(map(str, leading))}, k) with k from 1 to {classes} for a student of "
            f"shape {tuple(student.shape)}, got {tuple(values.shape)}"
        )
    tensor("teacher.indices", indices)
    if indices.dtype not in INTEGERS:
        raise TypeError(
            f"teacher.indices must be integers, got {indices.dtype}: a tuple as the teacher is a TopK, (values, indices"
            "[, rest[, temperature]]); of a model that returns (logits, ...) pass the logits"
        )
    if indices.shape != values.shape:
        raise ValueError(
            f"teacher.indices must have the shape of teacher.values {tuple(values.shape)}, got {tuple(indices.shape)}"
        )
    given = {"teacher.values": values, "teacher.indices": indices}
    if rest is not None:
        floating("teacher.rest", rest)
        if rest.shape != leading:
            raise ValueError(f"teacher.rest must have shape {tuple(leading)}, got {tuple(rest.shape)}")
        given["teacher.rest"] = rest
    for name, x in given.items():
        same_device(name, x, student)
        if x.requires_grad:
            raise ValueError(f"{name} must not require a gradient: a top-k teacher gets none, pass {name}.detach()")
    look = padded and indices.device.type == "cpu" or indices.is_cuda and os.environ.get("KDFAST_CHECK") == "1"
    if look and not torch.compiler.is_compiling():
        distinct_classes(indices.reshape(-1, indices.shape[-1]), classes, padded)
    return indices if indices.dtype == torch.int64 else indices.long()


def unusable_rows(indices: Tensor, classes: int, padded: bool = False) -> Tensor:
    """-> (B,) whether an index of the row is no class (nor, if `padded`, -1), or comes twice."""
    ordered = indices.sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    return (ordered[:, 0] < (-1 if padded else 0)) | (ordered[:, -1] >= classes) | twice.any(1)


def distinct_classes(indices: Tensor, classes: int, padded: bool = False, name: str = "teacher.indices") -> None:
    """Every index is a class (or, if `padded`, -1), none of them twice in a row. On CUDA this waits for the device."""
    wrong = unusable_rows(indices, classes, padded)
    if not wrong.any():
        return
    row = int(wrong.nonzero()[0])
    seen = set()
    for i, index in enumerate(indices[row].tolist()):
        if padded and index == -1:
            continue
        if not 0 <= index < classes or index in seen:
            raise ValueError(top_k_message(row, i, index, classes, name))
        seen.add(index)


def log_probabilities(name: str, values: Tensor) -> None:
    """No NaN, and at most 0, but for what bfloat16 rounds to a little more. On CUDA this waits for the device."""
    if not (values <= LARGEST_LOG).all():
        largest = values.max()  # NaN if there is one
        raise ValueError(f"{name} must be log-probabilities, numbers of at most 0, got {largest:g}")


def top_k_message(row: int, i: int, index: int, classes: int, name: str = "teacher.indices") -> str:
    """What the CPU kernel says of a bad index, too."""
    twice = 0 <= index < classes
    return f"{name}[{row}, {i}] is {index}" + (
        ", which the row has already: expected each class at most once"
        if twice
        else f", expected a class from 0 to {classes - 1}"
    )


def permutation(permutation: Any, logits: Tensor) -> None:
    """(B, C) integers, on CPU each row with every class once; elsewhere that is the caller's to see to."""
    tensor("permutation", permutation)
    if permutation.dtype not in INTEGERS:
        raise TypeError(f"permutation must be integers, got {permutation.dtype}")
    if permutation.shape != logits.shape:
        raise ValueError(f"permutation must have the shape {tuple(logits.shape)}, got {tuple(permutation.shape)}")
    same_device("permutation", permutation, logits, "the teacher")
    if permutation.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (permutation.sort(1).values != torch.arange(logits.shape[1], device=permutation.device)).any(1)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(f"permutation[{row}] must have every class from 0 to {logits.shape[1] - 1} once")


def class_probabilities(name: str, probabilities: Any, student: Tensor) -> None:
    """Floating-point target probabilities of the student's shape on its device, without gradient."""
    floating(name, probabilities)
    if probabilities.dim() == student.dim() - 1 and name == "labels":
        raise TypeError(
            f"labels must be integers of shape {tuple(student.shape[:-1])}, or probabilities of shape "
            f"{tuple(student.shape)}, got {probabilities.dtype} of shape {tuple(probabilities.shape)}"
        )
    if probabilities.shape != student.shape:
        raise ValueError(
            f"{name} must have the student's shape {tuple(student.shape)}, got {tuple(probabilities.shape)}"
        )
    same_device(name, probabilities, student)


def refuse_mass_below_0(masses: Tensor) -> None:
    """An error that names a row of target probabilities whose sum is below 0."""
    row = int(masses.argmin())
    raise ValueError(mass_message(row, float(masses[row])))


def mass_message(row: int, mass: float) -> str:
    """What the CPU kernel says of such a row, too."""
    return (
        f"labels[{row}] are probabilities that sum to {mass:.6g}, expected 0 or more: pass probabilities, not logits "
        "or log-probabilities"
    )


def row_weight(weight: Any, student: Tensor) -> None:
    """Floating-point weights, one a row, on the student's device, without gradient."""
    shaped("weight", weight, student.shape[:-1], student)
    if weight.requires_grad:
        raise ValueError("weight must not require a gradient: use reduction='none' and multiply the values instead")


def row_mask(mask: Any, student: Tensor) -> None:
    """Booleans, one a row, on the student's device."""
    tensor("mask", mask)
    leading = tuple(student.shape[:-1])
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor of shape {leading}, True for rows that count, got {mask.dtype}")
    if mask.shape != leading:
        raise ValueError(f"mask must have shape {leading}, got {tuple(mask.shape)}")
    same_device("mask", mask, student)


def divisor(value: Any) -> None:
    """`value` is a number above 0, or a tensor of one, whose value is not looked at: that would wait for a device."""
    if not isinstance(value, torch.Tensor):
        return positive("divisor", value)
    tensor("divisor", value)
    if value.numel() != 1 or value.requires_grad:
        raise ValueError(f"divisor must be a number or a 0-d tensor without gradient, got shape {tuple(value.shape)}")


def temperatures(name: str, value: Any, student: Tensor) -> None:
    """`value` is a number above 0, or a tensor of one or of one a row, whose values are not looked at."""
    if not isinstance(value, torch.Tensor):
        return positive(name, value)
    floating(name, value)
    if value.dim() and value.shape != student.shape[:-1]:
        leading = tuple(student.shape[:-1])
        raise ValueError(f"{name} must be a number, a 0-d tensor or one of shape {leading}, got {tuple(value.shape)}")
    same_device(name, value, student)


def positive(name: str, value: Any) -> None:
    """`value` is a finite number above zero."""
    _real(name, value)
    if not 0 < value < math.inf:  # plain comparisons: a compiled graph may have a symbol here
        raise ValueError(f"{name} must be finite and above 0, got {value}")


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """`value` is a finite number from `low` to `high`."""
    _real(name, value)
    if not (low <= value <= high and -math.inf < value < math.inf):
        between = "finite" if low == -math.inf and high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{name} must be {between}, got {value}")


def one_number(name: str, values: Tensor) -> float:
    """-> the number that all entries of a tensor are. On CUDA this waits for the device."""
    if values.numel() == 0 or (values != values.flatten()[0]).any():
        raise ValueError(f"{name} must be one number, got a tensor of {values.numel()} that differ or are none")
    return float(values.flatten()[0])


def count(name: str, value: Any, least: int = 1, most: float = math.inf) -> None:
    """`value` is an int from `least` to `most`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")


def _real(name, value):
    """`value` is a number, Python's or NumPy's."""
    # Python's come first: a compiled graph knows these types, and may have a symbol here.
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return
    if isinstance(value, (bool, torch.Tensor)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    """`value` is one of the strings `choices`."""
    if value not in tuple(choices):
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def reduction(value: Any) -> None:
    """`value` is a known reduction."""
    one_of("reduction", value, REDUCTIONS)


def first_derivative_only(op: str) -> None:
    """Called in a backward: gradients are recorded there only for a second derivative, which no kernel has."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"kdfast.{op} has no second derivative: call backward or torch.autograd.grad without create_graph=True "
            "(for a gradient penalty, use the loss written in plain PyTorch)"
        )
