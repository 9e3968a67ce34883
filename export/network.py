"""What every export format starts from: the merged network, its inputs, its open dimensions, and facts to store."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from timm.models import FeatureInfo
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_flatten, tree_unflatten

import zoo
from zoo.ffn.reparam import reparameterize
from zoo.layers.own import engine_in
from zoo.text import counted, first_line

__all__ = [
    "BatchError",
    "ExportError",
    "Kind",
    "Network",
    "call_network",
    "capture",
    "compare",
    "described",
    "difference",
    "eager_copy",
    "fixed",
    "in_plain_memory",
    "open_network",
    "open_sizes",
    "prepare",
    "quiet",
    "require_normalisation",
    "require_shapes",
    "sample_inputs",
    "shapes_of",
    "weights_digest",
    "whole",
]

Kind = Literal["classifier", "features", "restorer", "denoiser"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""`features` is timm's backbone with `features_only`, which returns several maps."""
_SIZES = ("in_channels", "sample_size", "num_classes")  # in the config of a class-conditional denoiser


class ExportError(RuntimeError):
    """A model that a format cannot hold, or a file that does not do what its model does."""


class BatchError(ExportError):
    """A model of one size whose graph cannot leave the number of images open."""


class _Restorer(nn.Module):
    """Keep the output of a restorer in [0, 1], the range of images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return _one_tensor(self.model(image), self.model).clamp(0.0, 1.0)


def _one_tensor(output: Any, model: nn.Module) -> Tensor:
    """Refuse what no file can be checked on: which part of a dictionary or tuple is the output, nobody knows."""
    if not isinstance(output, Tensor):
        raise ExportError(
            f"{type(model).__name__} returns a {type(output).__name__}, not one tensor: export a module whose forward "
            "returns the part that you want."
        )
    return output


class _Denoiser(nn.Module):
    """Give a diffusers transformer tensors in, one tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        return self.model(hidden_states, timestep=timestep, class_labels=class_labels, return_dict=False)[0]


class _Classifier(nn.Module):
    """Name the input of a timm model `image`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return _one_tensor(self.model(image), self.model)


class _Features(nn.Module):
    """Return the maps of a backbone in their order, as a tuple; of timm's classes some return a dictionary."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        found = self.model(image)
        return tuple(found.values() if isinstance(found, Mapping) else found)


_WRAPPERS = {"classifier": _Classifier, "features": _Features, "restorer": _Restorer, "denoiser": _Denoiser}


class _Call(nn.Module):
    """Call a model with tensors in the places where a call had them, and the call's other arguments as they were."""

    def __init__(self, model: nn.Module, leaves: list[Any], spec: Any) -> None:
        super().__init__()
        self.model, self.spec = model, spec
        self.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self.constants)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        return tuple(leaf for leaf in tree_flatten(self.model(*args, **kwargs))[0] if isinstance(leaf, Tensor))


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network that is ready to be written.

    Args:
        module: In evaluation mode, merged, float32, on the CPU; a copy of the user's model.
        inputs: Example inputs by name.
        output: Name of the output; empty where there may be several.
        dynamic_shapes: Open dimensions of each input, in the words of `torch.export`.
        metadata: Facts for the file: what it is, what its inputs mean, which weights it holds.
        by_position: Inputs go by position, their names are only the file's.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    output: str
    dynamic_shapes: dict[str, dict[int, Any]]
    metadata: dict[str, str]
    by_position: bool = False

    @property
    def arguments(self) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The example inputs as the module takes them, in plain memory: compiled graphs take the layout as given."""
        plain = {key: in_plain_memory(value) for key, value in self.inputs.items()}
        return (tuple(plain.values()), {}) if self.by_position else ((), plain)


def prepare(
    model: nn.Module,
    *,
    kind: Kind | None = None,
    name: str | None = None,
    image_size: int | None = None,
    dynamic_size: bool = True,
) -> Network:
    """Copy a model, merge the copy, and describe its inputs and outputs.

    Args:
        model: A classifier, a restorer or a class-conditional denoiser; it is not changed.
        kind: Which of these, or a backbone for its features; None finds out.
        name: Name to store; None takes the registered one.
        image_size: Side of square images of a classifier with other than its published size, or of a restorer whose
            file is to have one size; pixels.
        dynamic_size: Leave height and width open where the network can take any. Batch sizes are always open.

    Raises:
        ValueError: `kind` is unknown or cannot be told, a cache is enabled, or nobody says which images a classifier
            is for.
    """
    kind = kind_of(model, kind)
    if getattr(model, "is_cache_enabled", False):
        raise ValueError("A cache is enabled on the model, and a file cannot hold it: call zoo.disable_cache first.")
    if kind in ("classifier", "features") and image_size is None and _own_size(model) is None:
        raise ValueError(
            f"{type(model).__name__} does not say which images it is for: give image_size, or set its pretrained_cfg, "
            "a dictionary with input_size (channels, height, width)."
        )
    inner = eager_copy(model).float().cpu()
    reparameterize(inner, measure=False)
    batch = Dim("batch")
    inputs = sample_inputs(model, kind, image_size, dynamic_size)[1]
    shapes: dict[str, dict[int, Any]] = {key: {0: batch} for key in inputs}
    if dynamic_size and _any_size(model, kind, _example_size(model, kind, image_size)):
        shapes["image"] |= _open_sides(_step(model, kind))
    output = {"features": "", "restorer": "restored", "denoiser": "sample"}.get(kind, "output")
    if kind == "classifier" and hasattr(model, "num_classes"):  # else nobody knows
        output = "logits" if model.num_classes else "features"
    return Network(
        module=_WRAPPERS[kind](inner).eval(),
        inputs=inputs,
        output=output,
        dynamic_shapes=shapes,
        metadata=_metadata(model, kind, name, image_size),
    )


def fixed(network: Network) -> Network:
    """Return a network with all shapes fixed, of one image."""
    one = {key: value[:1].clone() if value.ndim else value for key, value in network.inputs.items()}
    return replace(network, inputs=one, dynamic_shapes={})


def in_plain_memory(tensor: Tensor) -> Tensor:
    """Return a tensor's values one after the other, which is what runtimes read that know shapes, but no strides.

    Strides of sides of length 1, which NumPy sets to 0 where it inserts them, are those of a new tensor: some look.
    """
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.view(-1).view(plain.shape)


def shapes_of(network: Network) -> dict[str, list[int]]:
    """Return the shapes of the example inputs by name."""
    return {key: list(value.shape) for key, value in network.inputs.items()}


def require_shapes(path: str | Path, shapes: Mapping[str, Sequence[int]], inputs: Mapping[str, Tensor]) -> None:
    """Refuse inputs of other shapes than a file's.

    Raises:
        ExportError: There is one.
    """
    wrong = {key: value for key, value in inputs.items() if list(value.shape) != shapes.get(key)}
    if wrong:
        raise ExportError(f"{path} takes {shapes}, got {described(wrong)}.")


def capture(network: Network, purpose: str) -> torch.export.ExportedProgram:
    """Trace a network as one graph, its open dimensions left open.

    Args:
        network: What `prepare` returned.
        purpose: What it cannot be where this fails: "exported", "written as ONNX".

    Raises:
        BatchError: The same, where only the number of images was open.
        ExportError: The network has something that a graph cannot express.
    """
    with quiet(), torch.no_grad():
        try:
            args, kwargs = network.arguments
            return torch.export.export(
                network.module, args, kwargs=kwargs, dynamic_shapes=network.dynamic_shapes or None
            )
        except ExportError:
            raise
        except Exception as error:  # tracing runs the user's code, which raises what it likes
            said = f"The network cannot be {purpose}: {first_line(error)}"
            if network.dynamic_shapes and all(len(axes) == 1 for axes in network.dynamic_shapes.values()):
                raise BatchError(f"{said.rstrip('.')}. The number of images was open; of one it may be.") from error
            if any(len(axes) > 1 for axes in network.dynamic_shapes.values()):
                said = f"{said.rstrip('.')}. Height and width were open; images of one size it may take (--fixed-size)."
            raise ExportError(said) from error


class _Muted:
    """A stream that drops what one thread writes; what others write, a progress bar, goes where it went."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep to themselves what exporters print, log and warn of: graphs of thousands of lines where one fails."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(_Muted(sys.stdout)),
            redirect_stderr(_Muted(sys.stderr)),
        ):
            warnings.simplefilter("ignore")  # about torch's own use of deprecated functions
            yield
    finally:
        logging.disable(before)


def eager_copy(model: nn.Module, call: Any = None) -> nn.Module:
    """Return a copy in evaluation mode, without gradients, that runs in eager mode where the model has an engine.

    Args:
        model: The model.
        call: Its engine, where something may have been wrapped around that; None finds it.

    Raises:
        ExportError: It cannot be copied.
    """
    memo: dict[int, Any] = {}
    try:
        inner = copy.deepcopy(model, memo).eval().requires_grad_(False)
    except Exception as error:  # of whatever was hung on it
        raise ExportError(
            f"A copy of {type(model).__name__} cannot be made ({first_line(error)}): take off what was put on it, such "
            "as offloading."
        ) from error
    call = call or engine_in(model)
    if call is not None:
        vars(inner).pop("forward", None)
        if call.own is not None:
            inner.forward = copy.deepcopy(call.own, memo)
    return inner


def _callee(model: nn.Module, call: Any) -> nn.Module:
    """Return a copy without the model's own hooks, which run around an engine; those of its parts stay."""
    inner = eager_copy(model, call)
    inner._forward_pre_hooks.clear()
    inner._forward_hooks.clear()
    return inner


def open_sizes(model: nn.Module, image: Tensor) -> dict[int, Any] | None:
    """Return the dimensions of an image that a classifier or restorer leaves open, in the words of `torch.export`.

    These are the batch, and height and width where the network can take any.

    Args:
        model: The model; only looked at.
        image: (B, C, H, W); an example.

    Returns:
        None where the model is neither of them.
    """
    try:
        kind = kind_of(model)
    except ValueError:
        return None
    if kind in ("denoiser", "features") or image.ndim != 4:
        return None
    sizes: dict[int, Any] = {0: Dim("batch")}
    if _any_size(model, kind, image.shape[-2:]):
        sizes |= _open_sides(_step(model, kind))
    return sizes


def open_network(model: nn.Module, image: Tensor, call: Any = None) -> Network:
    """Describe a classifier or restorer that is called with one image, as it is: no merging, no clipping.

    Args:
        model: The model; a copy is taken.
        image: (B, C, H, W); an example, for which `open_sizes` knows sizes.
        call: As in `eager_copy`.
    """
    kind, sizes = kind_of(model), open_sizes(model, image)
    assert sizes is not None
    height, width = image.shape[-2:]
    if len(sizes) > 1:
        step = _step(model, kind)
        height, width = (max(3 * step, side // step * step) for side in _example_size(model, kind, None))
    return Network(
        module=_Classifier(_callee(model, call)),
        inputs={"image": torch.rand(2, image.shape[1], height, width)},
        output="output",
        dynamic_shapes={"image": sizes},
        metadata=_metadata(model, kind, None),
    )


def call_network(model: nn.Module, leaves: list[Any], spec: Any, call: Any = None) -> Network:
    """Describe one call of any module: all shapes and all arguments that are no tensors stay as they are.

    Args:
        model: The model; a copy is taken.
        leaves: Of `tree_flatten((args, kwargs))`.
        spec: Of the same.
        call: As in `eager_copy`.
    """
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return Network(
        module=_Call(_callee(model, call), leaves, spec).eval(),
        inputs={f"input_{index}": tensor.detach() for index, tensor in enumerate(tensors)},
        output="",
        dynamic_shapes={},
        metadata={"name": type(model).__name__, "kind": "call"},
        by_position=True,
    )


def kind_of(model: nn.Module, kind: Kind | None = None) -> Kind:
    """Return what a model is, or check what the caller says it is.

    Raises:
        ValueError: `kind` is not one of them, or the model is none of them.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    taken = set(inspect.signature(model.forward).parameters)
    if kind == "denoiser" or (kind is None and "timestep" in taken):
        config = getattr(model, "config", None)
        known = isinstance(config, Mapping) and all(config.get(key) for key in _SIZES)
        if known and {"hidden_states", "timestep", "class_labels"} <= taken:
            return "denoiser"
        raise ValueError(
            f"{type(model).__name__} is no class-conditional denoiser (hidden_states, timestep, class_labels; "
            f"{', '.join(_SIZES)} in its config): `zoo export PIPELINE` writes others as a run calls them, in Python "
            "zoo.export.step.record_steps with zoo.export.artefact.write_step."
        )
    if kind is not None:
        return kind
    if hasattr(model, "forward_head"):
        return "classifier"
    if hasattr(model, "feature_info"):
        return "features"
    if _cfg(model).get("task", "classification") != "classification" or hasattr(model, "scale"):
        return "restorer"
    raise ValueError(
        f"{type(model).__name__} is no classifier (forward_head), backbone (feature_info), restorer (scale) or "
        f"class-conditional denoiser (timestep) as far as can be told; give kind, one of {', '.join(KINDS)}."
    )


def sample_inputs(
    model: nn.Module, kind: Kind | None = None, image_size: int | None = None, dynamic_size: bool = True
) -> list[dict[str, Tensor]]:
    """Return three random inputs of different batch sizes and, where the network can take them, image sizes.

    Args:
        model: The model that is exported.
        kind: What it is; None finds out.
        image_size: Side of square images of a classifier, pixels.
        dynamic_size: Vary the image size where the network can take any.
    """
    kind = kind_of(model, kind)
    generator = torch.Generator().manual_seed(0)
    if kind == "denoiser":
        config: Any = model.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        return [
            dict(
                hidden_states=torch.randn(batch, *shape, generator=generator),
                timestep=torch.rand(batch, generator=generator) * 999,
                class_labels=torch.randint(config.num_classes, (batch,), generator=generator),
            )
            for batch in (1, 2, 3)
        ]
    channels = _channels(model)
    height, width = _example_size(model, kind, image_size)
    step = _step(model, kind) if dynamic_size and _any_size(model, kind, (height, width)) else 0
    sizes = [(1, height, width), (2, height + step, width + 3 * step), (3, height + 2 * step, width)]
    draw: Callable[..., Tensor] = torch.rand if kind == "restorer" else torch.randn
    return [dict(image=draw(batch, channels, h, w, generator=generator)) for batch, h, w in sizes]


def _cfg(model: nn.Module) -> Mapping[str, Any]:
    """Return timm's description of the weights; empty for a model that was built from its class."""
    cfg: Any = getattr(model, "pretrained_cfg", None)
    return cfg if isinstance(cfg, Mapping) else {}


def _states_normalisation(model: nn.Module) -> bool:
    """Tell whether a model says how its images are normalised: what timm takes where one does not is a guess."""
    return all(_cfg(model).get(key) is not None for key in ("mean", "std"))


def require_normalisation(model: nn.Module) -> None:
    """Refuse a classifier that does not say how pictures become its images.

    Raises:
        ValueError: It does not.
    """
    if not _states_normalisation(model):
        raise ValueError(
            f"{type(model).__name__} does not say how its images are normalised: set its pretrained_cfg, a dictionary "
            "with mean and std, and where they are not timm's usual ones interpolation, crop_pct and crop_mode."
        )


def _open_sides(step: int) -> dict[int, Any]:
    """Return height and width as open dimensions of an image that are multiples of a step."""
    sides = ((2, "height"), (3, "width"))
    return {axis: Dim(side) if step == 1 else step * Dim(f"{side}_{step}") for axis, side in sides}


def _any_size(model: nn.Module, kind: Kind, size: Sequence[int]) -> bool:
    """True where height and width may be left open, for images of this size too.

    An open graph is one of multiples of the step: what pads others, or rounds them, is not in it.
    """
    depends = any(getattr(part, "graph_depends_on_size", False) for part in (model, *model.children()))
    if depends or any(side % _step(model, kind) for side in size):
        return False
    if kind == "restorer":
        return True
    return kind != "denoiser" and not _cfg(model).get("fixed_input_size", True)


def _step(model: nn.Module, kind: Kind) -> int:
    """Return what height and width must be a multiple of."""
    if kind == "restorer":
        return int(_cfg(model).get("multiple_of", getattr(model, "multiple_of", 1)))
    info = getattr(model, "feature_info", None)
    return max((stage["reduction"] for stage in info), default=32) if isinstance(info, list) else 32


def _channels(model: nn.Module) -> int:
    if hasattr(model, "in_chans"):
        return int(model.in_chans)
    convolutions = (part.in_channels for part in model.modules() if isinstance(part, nn.Conv2d))
    return int(next(convolutions, _cfg(model).get("input_size", (3,))[0]))


def _image(model: nn.Module) -> str:
    channels = _channels(model)
    return {1: "gray image", 3: "RGB image"}.get(channels, f"image of {channels} channels")


def _example_size(model: nn.Module, kind: Kind, image_size: int | None) -> tuple[int, int]:
    if kind == "restorer":
        step, least = _step(model, kind), _cfg(model).get("min_input_size", (3, 1, 1))
        if image_size is not None:
            least_side = max(step, *least[-2:])
            if image_size % step or image_size < least_side:
                raise ValueError(
                    f"image_size of this restorer must be a multiple of {step}, {least_side} or more; got {image_size}."
                )
            return image_size, image_size
        sides = [step * -(-max(16, side) // step) for side in least[-2:]]
        return sides[0], sides[1]
    if image_size is not None:
        return image_size, image_size
    return _own_size(model) or (224, 224)


def _own_size(model: nn.Module) -> tuple[int, int] | None:
    """Return height and width of the images that a classifier or backbone is for; None where it does not say."""
    bodies = [model, *([model.model] if isinstance(getattr(model, "model", None), nn.Module) else [])]
    parts: Iterator[Any] = (getattr(body, name, None) for body in bodies for name in ("patch_embed", "stem"))
    embed = next(filter(None, parts), None)
    own = getattr(embed, "img_size", None) or (_cfg(model).get("input_size") or ())[-2:]
    return (int(own[0]), int(own[1])) if own else None


def _metadata(model: nn.Module, kind: Kind, name: str | None, image_size: int | None = None) -> dict[str, str]:
    """Return the facts that travel with the file, as text; structured values are JSON."""
    cfg = _cfg(model)
    known = ".".join(str(cfg[key]) for key in ("architecture", "tag") if cfg.get(key))
    facts: dict[str, Any] = {
        "name": name or known or type(model).__name__,
        "kind": kind,
        "weights_sha256": weights_digest(model),
        "license": cfg.get("license"),
        "paper": cfg.get("paper_ids"),
        "producer": f"zoo {zoo.__version__}, torch {torch.__version__}",
    }
    if kind in ("classifier", "features"):
        known = _states_normalisation(model)
        data = resolve_model_data_config(model) if known else {}  # type: ignore[no-untyped-call]
        facts |= {
            "input": f"{_image(model)} in [0, 1], then "
            + ("(image - mean) / std" if known else "normalised as in training"),
            "input_size": [_channels(model), *_example_size(model, kind, image_size)],
            **{key: data.get(key) for key in ("mean", "std", "crop_pct", "crop_mode", "interpolation")},
            "labels": _labels(model),
            "temperature": cfg.get("temperature"),
            "threshold": cfg.get("threshold"),
        }
        if isinstance(info := getattr(model, "feature_info", None), FeatureInfo):
            facts |= {"channels": info.channels(), "reductions": info.reduction()}
    elif kind == "restorer":
        facts |= {
            "input": f"{_image(model)} in [0, 1]",
            "task": cfg.get("task"),
            "scale": cfg.get("scale", getattr(model, "scale", 1)),
            "multiple_of": _step(model, kind),
            "sigma": cfg.get("sigma"),
        }
    else:
        config: Any = model.config
        facts |= {
            "input": "noisy image (clean ones in [-1, 1]), timestep as float in [0, 999], class label",
            "config": {key: value for key, value in config.items() if not key.startswith("_")},
        }
    return {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items() if value is not None
    }


def _labels(model: nn.Module) -> list[str] | None:
    """Return the class names, if there is one for each output."""
    cfg, classes = _cfg(model), getattr(model, "num_classes", 0)
    labels = list(cfg.get("label_names") or ())
    if not labels and (subset := infer_imagenet_subset(model)):  # type: ignore[no-untyped-call]
        labels = [str(label) for label in ImageNetInfo(subset).label_descriptions()]
    return labels if labels and len(labels) == classes else None


def weights_digest(model: nn.Module) -> str:
    """Return a SHA-256 digest of all tensors of a model: names, types, shapes and bytes, sorted by name."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def compare(
    run: Callable[[dict[str, Tensor]], Sequence[Tensor]],
    model: nn.Module,
    *,
    kind: Kind | None = None,
    image_size: int | None = None,
    dynamic_size: bool = True,
    one: bool = False,
) -> float:
    """Return the largest difference between `run` and the model in eager mode, unmerged, over `sample_inputs`.

    Args:
        run: Computes the outputs of the exported file for inputs by name.
        model: The model that was exported; it is not changed.
        kind: What it is; None finds out.
        image_size: As in `prepare`.
        dynamic_size: As in `prepare`.
        one: The file takes one image only; it is run twice, as a model that changes with its calls would show.

    Raises:
        ExportError: An output has another shape, or is not finite where the model's is.
    """
    kind = kind_of(model, kind)
    eager = _WRAPPERS[kind](eager_copy(model).float().cpu())
    worst = 0.0
    samples = sample_inputs(model, kind, image_size, dynamic_size)
    for inputs in samples[:1] * 2 if one else samples:
        found, expected = run(inputs), eager(**inputs)
        wanted = expected if isinstance(expected, tuple) else (expected,)
        if len(found) != len(wanted):
            raise ExportError(f"The file returns {counted(len(found), 'output')}, the model {len(wanted)}.")
        worst = max(worst, *(difference(*pair, inputs) for pair in zip(found, wanted, strict=True)))
    return worst


def difference(found: Tensor, expected: Tensor, inputs: Mapping[str, Tensor], least: float = 1e-6) -> float:
    """Return the largest difference of an output, relative to the model's largest.

    Args:
        found: What the file returned.
        expected: What the model returned.
        inputs: What both were given, by name.
        least: What the largest output counts as at least.

    Raises:
        ExportError: The shapes differ, or a value of the file's is not finite.
    """
    if found.shape != expected.shape:
        shapes = f"{tuple(found.shape)}, the model {tuple(expected.shape)}"
        raise ExportError(f"For {described(inputs)} the file returns {shapes}.")
    if not torch.isfinite(found).all():
        raise ExportError(f"For {described(inputs)} the file returns values that are not finite.")
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(least))


def described(inputs: Mapping[str, Tensor]) -> str:
    """Return names and shapes for a message."""
    return ", ".join(f"{key} {tuple(value.shape)}" for key, value in inputs.items())


@contextmanager
def whole(out: str | Path) -> Iterator[Path]:
    """Give a path to write to; what is there afterwards moves to `out`, unless an error came first.

    Files that the format puts beside it (external data of large ONNX models) move with it.

    Args:
        out: Target file; its folder is created, and does not stay where an error came first.

    Raises:
        OSError: `out` cannot be written.
    """
    target = Path(out)
    try:
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder; give the path of a file.")
        made = [parent for parent in target.parents if not parent.exists()]  # the nearest first
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise type(error)(f"{target} cannot be written: {error.strerror or error}.") from error
    try:
        yield folder / target.name
        for part in sorted(folder.iterdir(), key=lambda path: path.name == target.name):  # the file itself comes last
            os.replace(part, target.parent / part.name)
    except OSError as error:
        raise OSError(f"{target} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:  # where nothing was written into them
            with suppress(OSError):
                parent.rmdir()
