"""Maps that a layer lays out in another way than (B, C, H, W)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["AsMaps", "as_map"]


class AsMaps(nn.Module):
    """A loss of maps (B, C, H, W), on layers that lay them out in another way.

    Of student and teacher, the layout is "NCHW", "NHWC" (Swin), or (H, W): tokens (B, T, C) with one for each place of
    a map of this size, row by row, behind class and register tokens, which are left out (ViT). A list of layouts is
    for a loss of lists, one for each layer.

    Example::

        Term(AsMaps(kdfast.AT(), student=(14, 14), teacher="NHWC"), 1000.0, ("student.blocks.11", "teacher.layers.2"))
    """

    def __init__(
        self, loss: Any, student: Sequence[Any] | str | tuple[int, int] = "NCHW", teacher: Sequence[str] | str = "NCHW"
    ) -> None:
        super().__init__()
        for name, layouts in (("student", student), ("teacher", teacher)):
            for layout in layouts if isinstance(layouts, list) else [layouts]:
                if layout not in ("NCHW", "NHWC") and not _is_size(layout):
                    raise ValueError(
                        f"{name} must be NCHW, NHWC or the map's (H, W), or a list of these, got {layout!r}"
                    )
        self.loss = loss
        self.student = student
        self.teacher = teacher

    def forward(self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor], *more: Any) -> Tensor:
        """The loss of the maps; `more` is what it takes beside them."""
        return self.loss(self._maps("student", student), self._maps("teacher", teacher), *more)

    def _maps(self, name, outputs):
        layouts = getattr(self, name)
        if isinstance(outputs, torch.Tensor):
            return as_map(outputs, layouts)
        if not isinstance(layouts, list):
            layouts = [layouts] * len(outputs)
        if len(layouts) != len(outputs):
            raise ValueError(f"{name} must have {len(layouts)} layers, as many as layouts, got {len(outputs)}")
        return [as_map(x, layout) for x, layout in zip(outputs, layouts, strict=True)]


def _is_size(layout):
    return isinstance(layout, tuple) and len(layout) == 2 and all(isinstance(n, int) and n > 0 for n in layout)


def as_map(x: Tensor, layout: Any) -> Tensor:
    """`x` in this `layout` as (B, C, H, W)."""
    if layout == "NCHW":
        return x
    if layout == "NHWC":
        if x.dim() != 4:
            raise ValueError(f"a map in the layout NHWC must be (B, H, W, C), got shape {tuple(x.shape)}")
        return x.permute(0, 3, 1, 2)
    places = layout[0] * layout[1]
    if x.dim() != 3 or x.shape[1] < places:
        raise ValueError(f"tokens of a map of {layout} must be (B, {places} or more, C), got shape {tuple(x.shape)}")
    return x[:, -places:].transpose(1, 2).unflatten(2, layout)
