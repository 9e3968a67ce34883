"""Strict loading of diffusers models."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from diffusers import ModelMixin

from zoo.catalog import did_you_mean
from zoo.ffn.technique import rebuild
from zoo.weights import CheckpointError

__all__ = ["StrictModelMixin"]


class StrictModelMixin(ModelMixin):
    """A diffusers model that refuses weights and configurations that do not fit, of which diffusers only warns."""

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the constructor's arguments in a configuration, as diffusers does, but refuse unknown keys.

        Raises:
            CheckpointError: There is a key that the class does not know; the message names the nearest.
        """
        known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        for key in config_dict:
            if key not in known and not key.startswith("_") and key != "quantization_config":
                raise CheckpointError(
                    f"The configuration of a {cls.__name__} has no {key!r}."
                    f"{did_you_mean(key, known, quoted=True)} It has: {', '.join(known)}."
                )
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build a model as diffusers does, with the layers that techniques of `zoo.ffn` have given it.

        Raises:
            ValueError: This version does not know a technique.
        """
        arguments = {key: value for key, value in config.items() if key != "ffn_changes"}
        built = super().from_config(arguments, return_unused_kwargs, **kwargs)
        rebuild(built[0] if return_unused_kwargs else built, config.get("ffn_changes") or ())
        return built

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> Any:
        """Load a folder or Hub repository as diffusers does, but strictly.

        Args:
            pretrained_model_name_or_path: Folder written by `save_pretrained`, or Hub id.
            **kwargs: As of `ModelMixin.from_pretrained`.

        Returns:
            The model in evaluation mode, with `output_loading_info=True` a pair of it and the keys that did not fit.

        Raises:
            CheckpointError: A key is missing or unexpected, or a value is not finite.
        """
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        if not with_info:
            for kind in ("missing", "unexpected"):
                if keys := sorted(info[f"{kind}_keys"]):
                    raise CheckpointError(f"The weights in {pretrained_model_name_or_path} have {kind} keys: {keys}.")
            if broken := [
                name for name, value in model.state_dict().items() if not (value.is_meta or value.isfinite().all())
            ]:
                raise CheckpointError(f"The weights in {pretrained_model_name_or_path} are not finite in {broken}.")
        return (model, info) if with_info else model

    def copy_as(self, dtype: torch.dtype) -> Any:
        """Return a copy on the CPU whose weights have another type; the model itself is left as it is."""
        model: Any = self
        copy = type(model).from_config(model.config)
        weights = {key: value.detach().cpu() for key, value in model.state_dict().items()}
        cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in weights.items()}
        copy.load_state_dict(cast, assign=True)
        return copy
