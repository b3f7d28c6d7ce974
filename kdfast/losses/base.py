"""What losses have in common: settings that are checked whenever they are set."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from torch import Tensor, nn

from kdfast.ops import check

Settings: TypeAlias = Mapping[str, Callable[[str, Any], None]]  # name -> check of (name, value)
SHARE = partial(check.number, low=0, high=1)
REDUCTION = partial(check.one_of, choices=check.REDUCTIONS)


def one_of(*choices: str) -> Callable[[str, Any], None]:
    """A check that the setting is one of the strings."""
    return partial(check.one_of, choices=choices)


def or_none(checked: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
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
