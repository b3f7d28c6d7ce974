"""Outputs and inputs of named layers of any model, beside the model's own output."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["capture"]

INPUT = ":input"
# What wrappers put into the names of the layers in them: torch.compile, FullyShardedDataParallel, checkpoint_wrapper.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class capture(Mapping[str, Tensor]):
    """What the layers `names` of `model` returned in its last forward, as a mapping from names to tensors.

    Example::

        with kdfast.capture(student, ["layer2", "layer3.0.relu:input"]) as features:
            logits = student(images)
            features["layer2"]  # the layer's output, with its graph
            features["layer3.0.relu:input"]  # the layer's first argument: here a pre-activation

    model: any nn.Module; it may be compiled, and in DistributedDataParallel. names: one or more, as
    ``model.named_modules()`` has them, without the prefixes of these two. ``features.values()`` is a list in their
    order, which a loss of several layers takes. The layers are watched from this call until the ``with`` block ends, or
    ``features.remove()``.

    - Each forward of the model drops the values of the one before. A layer that runs several times in it gives its last
      run; a run outside (a layer called by hand, a checkpoint's recomputation) does not count.
    - A value is the tensor itself and not a copy, in the type that autocast gave it, on the layer's device. What is no
      tensor (a tuple, a dict) comes as the layer returned it. Under torch.inference_mode it is a copy, which a loss can
      save for its backward.
    - After the block no tensor is kept.
    - A module that holds a capture and its model can be copied, pickled and saved whole: the copy's capture watches the
      copy's model, and has no values until that runs. A copy of the model alone is not watched.

    Errors: ValueError for a name that the model does not have, with those that are near, for nn.DataParallel, whose
    copies run in threads, and for a scripted model. RuntimeError on reading a layer that has not run, any layer of a
    forward that raised an error, and a tensor that was changed in place later, as ``nn.ReLU(inplace=True)`` changes the
    output of the layer before it. The ``:input`` of a layer with ``inplace=True`` can be captured: that layer then
    works on a copy.

    torch.compile: before or after, also ``fullgraph=True``. A model that was compiled before is compiled once more when
    it next runs; no value is then changed in place. One model cannot be called from several threads at once. In a
    reentrant checkpoint the values have no graph. With DistributedDataParallel's find_unused_parameters=True, the
    model's output must depend on every layer that the loss reads.
    """

    def __init__(self, model: nn.Module, names: str | Iterable[str]) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        names, model = _names(names), _unwrapped(model)
        layers = _layers(model)
        _check_exist(names, layers)
        self._forward = forward = _Forward(names)
        forward.watched = True
        self._handles = [
            model.register_forward_pre_hook(_Begin(forward)),
            model.register_forward_hook(_End(forward)),
            _Mark(model),
        ]
        for name, value in forward.values.items():
            layer = layers[name.removesuffix(INPUT)]
            if name.endswith(INPUT):
                self._handles.append(layer.register_forward_pre_hook(_Input(forward, value), with_kwargs=True))
            else:
                self._handles.append(layer.register_forward_hook(_Output(forward, value)))
            self._handles.append(_Mark(layer))

    def __getitem__(self, name: str) -> Tensor:
        values, state = self._forward.values, self._forward.state
        if name not in values:
            raise KeyError(f"{name} is not captured; captured: {', '.join(values)}")
        if not self._forward.watched:
            raise RuntimeError(f"{name}: the capture has ended; read it inside the with block, before remove()")
        if state == "waiting":
            raise RuntimeError(
                f"{name}: the model has not run since the capture began or was copied; call model(...) itself"
            )
        if state == "running":
            raise RuntimeError(
                f"{name}: the model's last forward raised an error, or still runs; call model(...) again"
            )
        value = values[name]
        if not value.ran:
            raise RuntimeError(f"{name}: the layer did not run in the model's last forward")
        if value.version is not None and value.version != value.content._version:
            raise RuntimeError(
                f"{name}: the tensor was changed in place after it was captured, as nn.ReLU(inplace=True) or += do; "
                f"set inplace=False, or capture the {INPUT} of the layer that changes it, which then gets a copy"
            )
        return value.content

    def __iter__(self) -> Iterator[str]:
        return iter(self._forward.values)

    def __len__(self) -> int:
        return len(self._forward.values)

    def __contains__(self, name: object) -> bool:
        return name in self._forward.values

    def values(self) -> list[Tensor]:  # type: ignore[override]  # a snapshot
        """The values in the order of the names, as a list, which a loss of several layers takes."""
        return [self[name] for name in self]

    def __enter__(self) -> "capture":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()

    def remove(self) -> None:
        """Stop watching and drop the values; what a ``with`` block does at its end."""
        while self._handles:
            self._handles.pop().remove()
        self._forward.drop()
        self._forward.watched = False

    def __getstate__(self) -> dict[str, Any]:
        return {"forward": self._forward, "handles": self._handles, "watched": self._forward.watched}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forward, self._handles = state["forward"], state["handles"]
        self._forward.watched = state["watched"]


# ---- names -----------------------------------------------------------------------------------------------------------
def _names(names):
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, Iterable):
        raise TypeError(f"names must be a list of layer names, got {type(names).__name__}")
    names = list(names)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"names must be strings, got {type(name).__name__}")
        if names.count(name) > 1:
            raise ValueError(f"names must differ from each other, got {name!r} twice")
    if not names:
        raise ValueError("names must have at least one layer, got none")
    return names


def _unwrapped(model):
    """The model without DistributedDataParallel and torch.compile around it."""
    if isinstance(model, nn.DataParallel):
        raise ValueError("model: nn.DataParallel runs copies in threads; use DistributedDataParallel")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("model: a scripted model runs without hooks; capture the model that it was made from")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return _unwrapped(model.module)
    compiled = model._modules.get("_orig_mod")
    return model if compiled is None else _unwrapped(compiled)


def _layers(model):
    """Name -> layer. Of a layer and the wrappers around it, which share a name, the outermost."""
    layers = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        layers.setdefault(".".join(part for part in name.split(".") if part not in WRAPPERS), layer)
    del layers[""]  # the model itself
    return layers


def _check_exist(names, layers):
    wrong = []
    for name in names:
        base = name.removesuffix(INPUT)
        if base not in layers:
            near = difflib.get_close_matches(base, layers) or [other for other in layers if "." not in other]
            wrong.append(f"{base!r} (near: {', '.join(near)})")
    if wrong:
        raise ValueError(f"names: the model has no layer {', no layer '.join(wrong)}")


# ---- hooks -----------------------------------------------------------------------------------------------------------
class _Value:
    """What one name has captured."""

    ran = False
    content = None
    version = None  # the tensor's count of changes in place; None where there is none to compare

    def set(self, x):
        self.ran, self.content, self.version = True, x, None
        if not isinstance(x, torch.Tensor):
            return
        if torch.compiler.is_compiling():
            # Compiled code counts no changes. A copy costs nothing there: it is only made if there is a change.
            self.content = x.clone()
        elif not x.is_inference():
            self.version = x._version
        else:  # no changes are counted, and no backward can save it
            with torch.inference_mode(False):
                self.content = x.clone()

    def drop(self):
        """Forget the content."""
        self.ran, self.content, self.version = False, None, None

    def __reduce__(self):
        return _Value, ()


class _Forward:
    """The model's forward, and the values it fills: shared by a capture and its hooks, in copies, too.

    A copy has no values, and its hooks do nothing unless the capture was copied, too.
    """

    def __init__(self, names):
        self.watched = False  # whether there is a capture
        self.state = "waiting"  # for the first forward; then "running" or "done"
        self.values = {name: _Value() for name in names}

    def drop(self):
        """Forget the values."""
        for value in self.values.values():
            value.drop()

    def __getstate__(self):
        return {"watched": False, "state": "waiting", "values": self.values}


class _Begin:
    def __init__(self, forward):
        self.forward = forward

    def __call__(self, model, args):
        if self.forward.watched:
            self.forward.drop()
            self.forward.state = "running"


class _End:
    def __init__(self, forward):
        self.forward = forward

    def __call__(self, model, args, output):
        if self.forward.state == "running":
            self.forward.state = "done"


class _Output:
    def __init__(self, forward, value):
        self.forward, self.value = forward, value

    def __call__(self, layer, args, output):
        if self.forward.state == "running":
            self.value.set(output)


class _Input:
    def __init__(self, forward, value):
        self.forward, self.value = forward, value

    def __call__(self, layer, args, kwargs):
        if self.forward.state != "running":
            return None
        first = args[0] if args else next(iter(kwargs.values()), None)
        self.value.set(first)
        if not (getattr(layer, "inplace", False) and isinstance(first, torch.Tensor)):
            return None
        if args:
            return (first.clone(), *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): first.clone()}


class _Mark:
    """The module's own forward as an attribute of the instance, which changes nothing when it runs.

    Code that torch.compile made earlier does not look whether a module has got hooks, but whether it has got a forward
    of its own: where a mark comes or goes, the code is compiled anew, with the hooks that are there.
    """

    def __init__(self, module):
        self.module = None if "forward" in vars(module) else module
        if self.module is not None:
            module.forward = module.forward

    def remove(self):
        """Take the attribute away again."""
        if self.module is not None and "forward" in vars(self.module):
            del self.module.forward
