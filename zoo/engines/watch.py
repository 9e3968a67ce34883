"""Notice whether a model was changed since it was last looked at, in a fraction of the time of a call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from zoo.layers.own import engine_in

__all__ = ["Kept", "Watched", "hooks_of", "own_attributes"]

_INTERNAL = frozenset(vars(nn.Module())) | {"training", "zoo_report"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes that are not PyTorch's own; in an engine's place what it stands in for."""
    found = {key: value for key, value in vars(module).items() if key not in _INTERNAL}
    if (call := engine_in(module)) is not None:
        found["forward"] = call.own
        if call.own is None:
            del found["forward"]
    return found


def hooks_of(module: nn.Module) -> list[Any]:
    """Return the hooks that a call of a module runs."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


class Watched:
    """What of a model can change: its parts, tensors, plain attributes and hooks, found once.

    Of the values of a tensor the largest is looked at, beside PyTorch's count of changes, which writes through `.data`
    pass by: as much as can be done in each call.

    Args:
        model: Looked at, not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        parts = list(model.modules())
        self._owners = [own for part in parts for own in (part._modules, part._parameters, part._buffers) if own]
        self._hooks = [own for part in parts for own in (part._forward_pre_hooks, part._forward_hooks)]
        self._attributes = [vars(part) for part in parts]
        self._plain: list[tuple[Callable[[Any], Any], dict[str, Any]]] = []  # compared in C: hundreds of them
        self._others: list[tuple[dict[str, Any], str]] = []
        tensors = [*model.parameters(), *model.buffers()]
        for part in parts:
            own = own_attributes(part)
            plain = [key for key, value in own.items() if _is_plain(value)]
            if plain:
                self._plain.append((itemgetter(*plain), vars(part)))
            self._others += [(vars(part), key) for key in own if key not in plain]
            tensors += [value for value in own.values() if isinstance(value, Tensor)]
        self._tensors = tensors
        self._counted = [tensor for tensor in tensors if not tensor.is_inference()]
        self._samples = [sample for tensor in tensors if (sample := _sample(tensor)) is not None]
        self._state = self._now()

    def changed(self) -> bool:
        """Tell whether something differs from what it was."""
        try:
            return bool(self._now() != self._state)
        except (KeyError, RuntimeError, ValueError, TypeError):  # an attribute is gone; tensors are not compared
            return True

    def _now(self) -> Any:
        return (
            [tuple(own.values()) for own in self._owners],
            [tensor._version for tensor in self._counted],
            list(map(Tensor.data_ptr, self._tensors)),
            [sample() for sample in self._samples],
            list(map(len, self._hooks)),
            list(map(len, self._attributes)),
            [get(own) for get, own in self._plain],
            [_seen(own[key]) for own, key in self._others],
        )


class Kept:
    """Buffers and attributes of a model as they are, to bring them back.

    Args:
        model: Its buffers are copied, attributes are not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        self._dicts = [(own, dict(own)) for part in model.modules() for own in (vars(part), part._buffers)]

    @torch.no_grad()
    def restore(self) -> None:
        """Bring them back."""
        for own, before in self._dicts:
            own.clear()
            own.update(before)
        for buffer, values in self._buffers:
            buffer.copy_(values)


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def _seen(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_seen, value))
    if isinstance(value, dict):
        return tuple((key, _seen(item)) for key, item in value.items())
    return id(value)


def _sample(tensor: Tensor) -> Callable[[], Any] | None:
    """Return what reads the largest value of a tensor, as an integer: what is not a number is not equal to itself."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size())
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or not tensor.numel() or kind is None:
        return None
    try:
        tensor = tensor.detach()
        place = int(tensor.abs().argmax()) if tensor.is_floating_point() else 0
        return partial(tensor.view(kind).numpy().item, place)
    except (RuntimeError, TypeError):  # a subclass that has no memory of its own
        return None
