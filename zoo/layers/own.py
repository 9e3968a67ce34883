"""Whether the parts of a merged layer are still its own, so that it may compute with their weights itself.

In training form a layer calls its parts. A merged one may take short cuts with their weights, but only while they are
what merging left: an adapter, a quantised layer or a hook in the place of one has to take part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["engine_in", "first_foreign", "is_own", "require_mergeable"]

_LIBRARIES = ("torch.nn.modules.", "timm.", "zoo.")


def engine_in(module: nn.Module) -> Any:
    """Return the call of `zoo.engines` that stands in for a module's `forward`, None where none does.

    It is told by its mark, as this module is below that package. What it stands in for is its `own`: a `forward` that
    was set on this very module, or None.
    """
    call = vars(module).get("forward")
    return call if getattr(call, "is_engine", False) else None


def is_own(part: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Tell whether calling a part is nothing but its class's computation on plain weights.

    Args:
        part: A linear layer, convolution or norm, or None.
        kind: The class that it has to be of, not a subclass.
    """
    if type(part) is not kind:
        return False
    if torch.compiler.is_compiling():  # guards of the compiler watch over what follows
        return True
    if part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__:
        return False
    return all(type(value) in (nn.Parameter, Tensor, type(None)) for value in part._parameters.values())


def first_foreign(module: nn.Module, kinds: Collection[type[nn.Module]]) -> str | None:
    """Return name and class of the first part that is not of the given classes or has hooks; None if there is none.

    Args:
        module: Whose parts are looked at, all levels.
        kinds: Classes; their subclasses do not count.
    """
    for name, part in module.named_modules():
        if part is not module and not (type(part) in kinds and is_own(part, type(part))):
            return f"{name} ({type(part).__name__})"
    return None


def require_mergeable(module: nn.Module) -> None:
    """Make sure that a layer can be merged: in evaluation mode, its parts those that it was built of.

    Args:
        module: The layer. Parts that merge by themselves look after their own parts.

    Raises:
        RuntimeError: It is in training mode, or a part is an adapter, quantised, pruned or parametrised, so that its
            weights are not all that it computes with.
    """
    kind = type(module).__name__
    if module.training or any(part.training for part in module.modules() if isinstance(part, _BatchNorm)):
        raise RuntimeError(f"{kind} cannot be merged in training mode: call model.eval() first.")
    for name, part in _parts(module):
        known = f"{type(part).__module__}.".startswith(_LIBRARIES)
        if not known and (type(part).__module__.startswith("torch.") or any(True for _ in part.parameters())):
            raise RuntimeError(
                f"{kind} cannot be merged: its {name} is a {type(part).__name__}, not its own layer. Merge or remove "
                "adapters, and quantise after merging."
            )
        if isinstance(part, (nn.Linear, nn.Conv2d)) and "weight" not in part._parameters:
            raise RuntimeError(
                f"{kind} cannot be merged: the weight of its {name} is computed from others. Make it final first, "
                "for example by torch.nn.utils.prune.remove."
            )


def _parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, part in module.named_children():
        yield f"{prefix}{name}", part
        if not hasattr(part, "reparameterize"):
            yield from _parts(part, f"{prefix}{name}.")
