"""A language model's teacher as two columns of the data: k log-probabilities and their classes for each token.

Row i of a sample is what the teacher said of token i, having read those before it, as ``labels[i]`` is token i. So the
first row is not read.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdfast.ops import check
from kdfast.teacher_store import TeacherStore

__all__ = ["COLUMNS", "StoredTeacher", "TopKCollator"]

COLUMNS = "teacher_log_probabilities", "teacher_indices"


class StoredTeacher(Dataset[dict[str, Any]]):
    """The samples of a data set, each with the two columns that a store of its teacher's log-probabilities has of it.

    Example::

        rows = StoredTeacher(rows, kdfast.teacher_store.TeacherStore("store"))
        DistillationTrainer(student, args, train_dataset=rows, temperature=rows.store.contents.temperature).train()

    Args:
        rows: a data set with a length, whose samples are mappings, in the order of the store.
        store: of sequences of log-probabilities, see :class:`kdfast.teacher_store.Contents`.
        augmentation: which one of the store's.

    Raises: TypeError, ValueError naming the argument; what :meth:`TeacherStore.logits` raises.
    """

    def __init__(self, rows: Any, store: TeacherStore, augmentation: int = 0) -> None:
        if not isinstance(store, TeacherStore):
            raise TypeError(f"store must be a TeacherStore, got {type(store).__name__}")
        contents = store.contents
        if contents.longest is None or contents.tail == "rest":
            kind = "logits" if contents.tail == "rest" else "log-probabilities"
            each = "image" if contents.longest is None else "sequence"
            raise ValueError(f"store must have sequences of log-probabilities, got {kind} with tail={contents.tail!r} "
                             f"of each {each}")  # fmt: skip
        if len(rows) != contents.samples:
            raise ValueError(f"rows must be the store's {contents.samples} samples, got {len(rows)}")
        check.count("augmentation", augmentation, 0, contents.augmentations - 1)
        self.rows, self.store, self.augmentation = rows, store, augmentation

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be from 0 to {len(self) - 1}, got {index}")
        (top,) = self.store.logits(index, self.augmentation)
        return {**self.rows[index], **dict(zip(COLUMNS, (top.values, top.indices.long()), strict=True))}


class TopKCollator:
    """A collator around another one, which pads the teacher's columns as that pads the tokens.

    Where a row has fewer slots than the widest, and where a token is padding, the index is -1.

    Args:
        collator: samples without the teacher's columns -> a batch with input_ids and labels (B, L), each sample's
            tokens in its own row, padded on either side.
        classes: of the student.

    Raises: TypeError, ValueError that name the sample of the batch and the column: lengths that are not those of
    input_ids, what is no class or no log-probability, and a token that counts and has no class.
    """

    def __init__(self, collator: Callable[[list[Any]], Any], classes: int) -> None:
        check.count("classes", classes)
        self.collator, self.classes = collator, classes
        if hasattr(collator, "tokenizer"):
            self.tokenizer = collator.tokenizer  # which Trainer saves with the model

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> Any:
        """A batch with both columns (B, L, k)."""
        teachers = [_columns(f"samples[{i}]", sample, self.classes) for i, sample in enumerate(samples)]
        batch = self.collator([{k: x for k, x in sample.items() if k not in COLUMNS} for sample in samples])
        for name in ("input_ids", "labels"):
            x = batch.get(name)
            if not isinstance(x, Tensor) or x.dim() != 2 or len(x) != len(samples):
                got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"data_collator must give {name} of shape ({len(samples)}, tokens), got {got}")
        shape = *batch["labels"].shape, max(len(values[0]) if len(values) else 1 for values, _ in teachers)
        dtype = reduce(torch.promote_types, (values.dtype for values, _ in teachers))
        columns = torch.full(shape, -float("inf"), dtype=dtype), torch.full(shape, -1)
        left = getattr(getattr(self, "tokenizer", None), "padding_side", "right") == "left"
        for i, (sample, teacher) in enumerate(zip(samples, teachers, strict=True)):
            tokens = torch.as_tensor(sample["input_ids"])
            begin = _begin(i, tokens, batch["input_ids"][i], left)
            for column, x in zip(columns, teacher, strict=True):
                column[i, begin : begin + len(x), : x.shape[1]] = x
        missing = (batch["labels"][:, 1:] != -100) & (columns[1][:, 1:] < 0).all(2)
        if missing.any():
            i, token = missing.nonzero()[0].tolist()
            raise ValueError(f"samples[{i}]: teacher_indices must have a class for each token that counts, got only "
                             f"padding for token {token + 1} of the batch")  # fmt: skip
        batch.update(zip(COLUMNS, columns, strict=True))
        return batch


def _columns(name, sample, classes):
    """The teacher's columns of a sample: (tokens, k) each."""
    if absent := [column for column in (*COLUMNS, "input_ids") if column not in sample]:
        raise ValueError(f"{name} must have {', '.join(absent)}, got {', '.join(sample)}")
    found = []
    for column in COLUMNS:
        try:
            found.append(torch.as_tensor(sample[column]))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name}: {column} must be (tokens, k) numbers, got {error}") from error
    values, indices = found
    expected = len(sample["input_ids"])
    for column, x in zip(COLUMNS, found, strict=True):
        if x.dim() != 2 or len(x) != expected or not x.shape[1]:
            raise ValueError(f"{name}: {column} must be ({expected}, k), a row for each of input_ids, got shape "
                             f"{tuple(x.shape)}")  # fmt: skip
    if indices.shape != values.shape:
        raise ValueError(f"{name}: {COLUMNS[1]} must have the shape of {COLUMNS[0]} {tuple(values.shape)}, got "
                         f"{tuple(indices.shape)}")  # fmt: skip
    check.floating(f"{name}: {COLUMNS[0]}", values)
    if indices.dtype not in check.INTEGERS:
        raise TypeError(f"{name}: {COLUMNS[1]} must be integers, got {indices.dtype}")
    check.distinct_classes(indices, classes, True, f"{name}: {COLUMNS[1]}")
    check.log_probabilities(f"{name}: {COLUMNS[0]}", values.masked_fill(indices < 0, -float("inf")))
    return values, indices


def _begin(i, tokens, row, left):
    """Where the sample's tokens begin in its row of the batch."""
    last = len(row) - len(tokens)
    for begin in (last, 0) if left else (0, last):
        if begin >= 0 and torch.equal(row[begin : begin + len(tokens)], tokens.to(row.dtype)):
            return begin
    raise ValueError(f"data_collator must keep the {len(tokens)} tokens of samples[{i}] at the begin or the end of its "
                     f"row, got other tokens in a row of {len(row)}")  # fmt: skip
