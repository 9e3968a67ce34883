"""Parts of a model that stay as they are while the rest trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from zoo.catalog import did_you_mean

__all__ = ["fixed_norms", "freeze"]


def freeze(model: nn.Module, prefixes: Iterable[str], name: str) -> list[nn.Module]:
    """Fix parameters, and return the norms whose statistics must stand still with them: keep those in evaluation mode.

    Args:
        model: Its parameters under the prefixes no longer ask for gradients.
        prefixes: Whole parts of dotted names: "stages.1" is that stage and not "stages.10".
        name: The model's, for the message.

    Raises:
        ValueError: A prefix names no parameter; the message names the nearest parts.
    """
    parameters = dict(model.named_parameters())
    chosen = [prefix.rstrip(".") for prefix in prefixes]
    for prefix in chosen:
        found = [parameter for key, parameter in parameters.items() if _is_under(key, prefix)]
        if not found:
            parts = list(dict.fromkeys(".".join(key.split(".")[:2]) for key in parameters))
            hint = did_you_mean(prefix, parts, quoted=True)
            raise ValueError(
                f"freeze: no parameter of {name} starts with {prefix!r}.{hint} Its parts are {', '.join(parts)}."
            )
        for parameter in found:
            parameter.requires_grad_(False)
    return [norm.eval() for norm in _norms(model, chosen)] if chosen else []


def fixed_norms(model: nn.Module) -> list[nn.Module]:
    """Return the norms whose parameters are all fixed, in evaluation mode."""
    return [norm.eval() for norm in _norms(model, [])]


def _norms(model: nn.Module, prefixes: Sequence[str]) -> Iterator[nn.Module]:
    for key, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        fixed = bool(own) and not any(parameter.requires_grad for parameter in own)
        if isinstance(module, _NormBase) and (fixed or any(_is_under(key, prefix) for prefix in prefixes)):
            yield module


def _is_under(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(f"{prefix}.")
