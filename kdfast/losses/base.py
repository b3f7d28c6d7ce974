"""What losses have in common: settings that are checked whenever they are set."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import dataclass_transform

from kdfast.ops import check

Check: TypeAlias = Callable[[str, Any], None]  # of (name, value)
Settings: TypeAlias = Mapping[str, Check]
SHARE = partial(check.number, low=0, high=1)
AT_LEAST_0 = partial(check.number, low=0)


def _temperature(name, value):
    check.floating(name, value) if isinstance(value, Tensor) else check.positive(name, value)


TEMPERATURE: Check = _temperature  # a number above 0, or a tensor, whose shape and values are the op's to check
REDUCTION = partial(check.one_of, choices=check.REDUCTIONS)


def one_of(*choices: str) -> Check:
    """A check that the setting is one of the strings."""
    return partial(check.one_of, choices=choices)


def or_none(checked: Check) -> Check:
    """`checked` of a setting that may be None."""
    return lambda name, value: None if value is None else checked(name, value)


class Loss(nn.Module):
    """A module whose `settings`, name -> check of (name, value), are checked in the constructor and when set later."""

    settings: ClassVar[Settings] = {}

    if TYPE_CHECKING:  # a module's call gives anything, a loss's a tensor

        def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.settings:
            self.settings[name](name, value)
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """Every argument of the constructor that became an attribute of its name."""
        names = [name for name in inspect.signature(type(self).__init__).parameters if name in vars(self)]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def in_own_type(layers: nn.Module, x: Tensor) -> Tensor:
    """``layers(x)`` in the type of their weights, whatever autocast says."""
    dtype = next((weight.dtype for weight in layers.parameters()), x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return layers(x.to(dtype))


class RowLoss(Loss):
    """A loss on logits (..., C) of student and teacher, of the rows that count; `compute` says which."""

    def compute(self, student: Tensor, teacher: Any, **of_rows: Any) -> Tensor:
        """The loss; of_rows: mask, weight and divisor, as the op takes them."""
        raise NotImplementedError

    def forward(
        self,
        student: Tensor,
        teacher: Any,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        divisor: float | Tensor | None = None,
    ) -> Tensor:
        return self.compute(student, teacher, mask=mask, weight=weight, divisor=divisor)


@dataclass(frozen=True)
class _Setting:
    default: Any
    checked: Check | None


def setting(default: Any, checked: Check | None = None) -> Any:
    """A setting in the body of a class that is `made_of_settings`: its default, and the check of its values, if any."""
    return _Setting(default, checked)


T = TypeVar("T", bound=type[Loss])


@dataclass_transform()
def made_of_settings(cls: T) -> T:
    """The class with a constructor of its settings, in their order; they are the attributes of its instances."""
    declared = {name: x for name, x in vars(cls).items() if isinstance(x, _Setting)}
    for name in declared:
        delattr(cls, name)
    cls.settings = {name: x.checked for name, x in declared.items() if x.checked}
    # As source, for torch.compile, help() and messages on wrong arguments.
    arguments = ", ".join(f"{name}=declared[{name!r}].default" for name in declared)
    body = "".join(f"\n    self.{name} = {name}" for name in declared)
    found = {"declared": declared, "cls": cls}
    exec(f"def __init__(self, {arguments}):\n    super(cls, self).__init__(){body}", found)
    cls.__init__ = found["__init__"]
    cls.__init__.__qualname__, cls.__init__.__module__ = f"{cls.__qualname__}.__init__", cls.__module__
    cls.__init__.__annotations__ = {**{name: cls.__annotations__[name] for name in declared}, "return": None}
    return cls
