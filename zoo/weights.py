"""Read, verify, convert and load weights; the only file that opens a checkpoint.

Loading is strict: safetensors or `torch.load(weights_only=True)`, the digest is compared, every value is finite, and a
key that does not fit stops the load. Only the classifier may be missing, and only when `num_classes` differs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import logging
import pickle
import re
import struct
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import PretrainedCfg, adapt_input_conv, build_model_with_cfg
from timm.models._builder import resolve_pretrained_cfg
from timm.models._hub import check_cached_file, download_cached_file, get_cache_dir
from torch import Tensor, nn

from zoo import hub
from zoo.catalog import did_you_mean
from zoo.cfg import ModelCfg, RestorationCfg
from zoo.files import whole
from zoo.record import (
    KEY,
    ModelRecord,
    RecordError,
    described,
    is_safetensors,
    kept_by_lightning,
    note_build,
    read_record,
    record_in,
)
from zoo.sources import WEIGHT_SUFFIXES, CheckpointError, card_sha256, cards_dir, front_matter, no_shipped_file
from zoo.text import first_line

__all__ = [
    "CheckpointError",
    "FilterFn",
    "build_model",
    "card_sha256",
    "cards_dir",
    "front_matter",
    "load_pretrained",
    "load_strict",
    "merge_adapters",
    "pretrained_cfg_of",
    "read_checkpoint",
    "read_weights",
    "require_known",
    "save_checkpoint",
    "sha256_of",
    "shipped",
    "verify_component",
]

_TIMEOUT = 8.0  # seconds until a server that does not answer is said to be away

_log = logging.getLogger(__name__)

FilterFn = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]
ModelT = TypeVar("ModelT", bound=nn.Module)

WEIGHTS_NAME = "model.safetensors"
_WRAPPERS = (
    "params_ema",
    "params-ema",
    "params",
    "state_dict_ema",
    "state_dict",
    "model_state_dict",
    "model_ema",
    "model",
    "model_state",
    "net_E",
    "net",
)
_PREFIXES = ("module.", "model.", "netG.", "_orig_mod.")

# what safetensors and the unpickler raise on files that are damaged or something else altogether
_UNREADABLE = (
    SafetensorError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    struct.error,
)


def shipped(name: str) -> str:
    """Return the path of the weight file that this distribution ships for `NAME.TAG`; it need not exist."""
    return str(cards_dir() / name / WEIGHTS_NAME)


def sha256_of(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checkpoint(path: str | Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read a state dict from a .safetensors or PyTorch file, without running code from it.

    Training checkpoints are unwrapped ("params_ema", "state_dict", "model", ...; EMA weights first, or the only entry
    whatever it is called) and a common prefix ("model.", "module.", "netG.", ...) is removed.

    Args:
        path: The file.
        sha256: Expected digest; None skips the comparison.

    Raises:
        CheckpointError: The file does not exist, is damaged, has another digest, needs unsafe unpickling, is a program,
            holds no tensors, or holds a value that is not finite.
    """
    return read_weights(path, sha256)[0]


def read_weights(path: str | Path, sha256: str | None = None) -> tuple[dict[str, Tensor], ModelRecord | None]:
    """Read a state dict as `read_checkpoint` does, and the record of its model, where the file holds one.

    Args:
        path: The file.
        sha256: Expected digest; None skips the comparison.

    Returns:
        The state dict; the record in the training checkpoint or in the header of the safetensors file, or None.

    Raises:
        CheckpointError: As in `read_checkpoint`, or the record is damaged.
    """
    path = Path(path)
    if not path.is_file():
        hint = "" if path.suffix in WEIGHT_SUFFIXES else " `--model` (`model=`) takes names and folders of models."
        raise CheckpointError(no_shipped_file(path) or f"No weight file at {path}.{hint}")
    if (other := _something_else(path)) is not None:
        raise CheckpointError(f"{path} is no weight file: it is {other}.")
    if sha256 is not None and (found := sha256_of(path)) != sha256.lower():
        raise CheckpointError(
            f"{path} has sha256 {found[:12]}..., expected {sha256[:12]}...: it is damaged or not the published file."
        )
    try:
        loaded = _read(path)
    except pickle.UnpicklingError as error:
        if "WeightsUnpickler error: Unsupported" in str(error) or "weights_only" in str(error).lower():
            raise CheckpointError(
                f"{path} needs unsafe unpickling (it holds more than tensors) and is refused; convert it to safetensors"
                " where you trust it."
            ) from error
        raise CheckpointError(f"{path} is not a readable weight file: {first_line(error)}") from error
    except _UNREADABLE as error:
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{path} is a TorchScript program, which is refused: a file of its state_dict() is what can be read."
            ) from error
        raise CheckpointError(f"{path} is not a readable weight file: {first_line(error)}") from error
    state_dict = _unwrap(loaded, path)
    bad = [key for key, value in state_dict.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(f"{path} holds values that are not finite in {_some(bad)}.")
    try:
        record = record_in(loaded, path) or kept_by_lightning(loaded) or read_record(path, beside=False)
    except RecordError as error:
        raise CheckpointError(str(error)) from error
    return state_dict, record


_OTHERS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"),
    (b"<!doctype", "a web page (HTML): the download went to the page about the file"),
    (b"<html", "a web page (HTML): the download went to the page about the file"),
    (b"{", "JSON text"),
    (b"\x89png", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"%pdf", "a PDF document"),
    (b"gguf", "GGUF, weights of a language model"),
    (b"tfl3", "a TensorFlow Lite model"),
)


def _something_else(path: Path) -> str | None:
    """Return in words what a file is that begins as no weight file does, or None."""
    if path.stat().st_size == 0:
        return "empty"
    with open(path, "rb") as file:
        head = file.read(512)
    plain = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if path.suffix.lower() == ".onnx" or (head[:1] == b"\x08" and (b"onnx" in plain or b"pytorch" in plain)):
        return "an ONNX model, which holds a program and not a state dict: give the PyTorch file it was made of"
    if head[8:9] == b"{":  # safetensors: eight bytes of length, then JSON
        return None
    return next((words for start, words in _OTHERS if plain.startswith(start)), None)


def _read(path: Path) -> Any:
    if is_safetensors(path):
        return load_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about old zip formats that load all the same
        return torch.load(path, map_location="cpu", weights_only=True)


def _unwrap(loaded: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a state dict.")
    for wrapper in _WRAPPERS:
        if isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
            break
    else:
        only = next(iter(loaded.values())) if len(loaded) == 1 else None
        loaded = only if isinstance(only, Mapping) else loaded
    state_dict = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if not state_dict:
        raise CheckpointError(f"{path} holds no tensors; its entries are {_some(map(str, loaded))}.")
    while prefix := next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in state_dict)), None):
        state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    return state_dict


def save_checkpoint(
    state_dict: Mapping[str, Tensor],
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    metadata: dict[str, str] | None = None,
    record: ModelRecord | None = None,
) -> str:
    """Write a safetensors file whole or not at all, and return its SHA-256 digest.

    Args:
        state_dict: Tensors to save; shared storage is copied.
        path: Target file; it appears only when it is complete.
        dtype: Cast floating-point tensors to this type; None keeps theirs.
        metadata: Text entries of the file's header.
        record: What the model is (`zoo.record.record_of(model)`), for the header: the file then says all that loading
            needs. None writes a bare state dict.
    """
    path = Path(path)
    tensors = {
        key: value.detach().cpu().to(dtype if dtype and value.is_floating_point() else value.dtype).clone().contiguous()
        for key, value in state_dict.items()
    }
    header = {"format": "pt", **(metadata or {}), **({} if record is None else {KEY: record.to_text()})}
    with whole(path) as temporary:
        save_file(tensors, temporary, metadata=header)
    return sha256_of(path)


def merge_adapters(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the plain weights of a network with low-rank adapters of peft, scaled by 2 as `zoo.tasks.lora` makes them.

    Args:
        state_dict: NAME.base_layer.weight, NAME.lora_A.default.weight (r, in), NAME.lora_B.default.weight (out, r)
            become NAME.weight; other entries are kept.
    """
    plain = {key.replace(".base_layer.", "."): value for key, value in state_dict.items() if ".lora_" not in key}
    for key, down in state_dict.items():
        name, adapter, rest = key.partition(".lora_A.")
        if adapter:
            up, weight = state_dict[f"{name}.lora_B.{rest}"], plain[f"{name}.weight"]
            plain[f"{name}.weight"] = weight + 2 * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    return plain


def _some(names: Iterable[str], most: int = 4) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def load_strict(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    filter_fn: FilterFn | None = None,
    allow_missing: Iterable[str] = (),
    source: str = "The state dict",
) -> None:
    """Convert a state dict with `filter_fn` and load it; every key must fit.

    Args:
        model: Receives the weights.
        state_dict: Tensors in the authors' or our naming.
        filter_fn: The family's `checkpoint_filter_fn`.
        allow_missing: Keys of the model that may be absent.
        source: Name for the message.

    Raises:
        CheckpointError: A key is missing, unexpected, or has another shape; the message names them.
    """
    if filter_fn is not None:
        state_dict = filter_fn(state_dict, model)
    _require_fit(type(model).__name__, model.state_dict(), state_dict, allow_missing, source)
    model.load_state_dict(state_dict, strict=False)  # everything was checked above


def _require_fit(
    name: str,
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    allow_missing: Iterable[str],
    source: str,
) -> None:
    """Raise unless both state dicts have the same keys and shapes; `allow_missing` may be absent from `given`."""
    allowed = set(allow_missing)
    missing = [key for key in own if key not in given and key not in allowed]
    unexpected = [key for key in given if key not in own]
    misshaped = [
        f"{key} {tuple(given[key].shape)} for {tuple(value.shape)}"
        for key, value in own.items()
        if key in given and given[key].shape != value.shape
    ]
    problems = [
        f"{label}: {_some(keys)}"
        for label, keys in (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshaped))
        if keys
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit {name} ({'; '.join(problems)}).")


def verify_component(folder: str | Path, component: str, module: nn.Module | None = None) -> None:
    """Check the weight files of one component of a diffusers folder; diffusers itself only warns of missing keys.

    Args:
        folder: Holds model_index.json.
        component: Name of the component's folder, for example "transformer".
        module: The loaded component. Without it, the files are checked; with it, that their keys and shapes are its.

    Raises:
        CheckpointError: There are no safetensors, a file is damaged or not the published one, or keys do not fit.
    """
    files = sorted((Path(folder) / component).glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{Path(folder) / component} holds no safetensors.")
    stored: dict[str, Tensor] = {}
    for file in files:
        stored |= read_checkpoint(file, card_sha256(Path(folder), f"{component}/{file.name}") or hub.blob_digest(file))
    if module is not None:
        _require_fit(type(module).__name__, module.state_dict(), stored, (), str(files[0].parent))


def _locate(cfg: PretrainedCfg, cache_dir: str | Path | None) -> Path:
    """Return the local weight file of a cfg, downloading it if it lies elsewhere."""
    name = ".".join(part for part in (cfg.architecture, cfg.tag) if part) or "this model"
    if cfg.file:
        path = Path(cfg.file)
        return path / WEIGHTS_NAME if path.is_dir() else path
    if cfg.hf_hub_id and getattr(cfg, "hub_search", False):
        filename = _search(str(cfg.architecture), cfg.hf_hub_id)
        _log.warning(
            "%s: took %s of %s, the one weight file there that names this variant.", name, filename, cfg.hf_hub_id
        )
        return hub.download(cfg.hf_hub_id, filename, cache_dir=cache_dir)
    if cfg.hf_hub_id:
        return hub.download(cfg.hf_hub_id, cfg.hf_hub_filename or WEIGHTS_NAME, cache_dir=cache_dir)
    if cfg.url:
        return _fetch(cfg.url if isinstance(cfg.url, str) else cfg.url[0], cache_dir)
    notes = f" {' '.join(cfg.notes)}" if cfg.notes else ""
    raise CheckpointError(f"No weights are published for {name}.{notes} Use pretrained=False for random weights.")


_SIZES = {"tiny": ("tiny", "t", "ti"), "small": ("small", "s"), "base": ("base", "b"), "large": ("large", "l")}
_SIZES |= {"huge": ("huge", "h")}
_OTHER_FORMS = ("merged", "reparam", "reparameterized", "deploy", "inference", "optimizer")


def _search(architecture: str, repo_id: str) -> str:
    """Return the weight file of a repository that names a variant: family and size, in the training form.

    Args:
        architecture: Our name, FAMILY_SIZE. The authors may call the family by the network it was made from: RePaSwin
            is their RePa-Swin, RePaViT their RePaViT or RePa-DeiT.
        repo_id: "org/name".

    Raises:
        CheckpointError: No file names the variant, or several do.
    """
    family, _, size = architecture.partition("_")
    kind = family.removeprefix("repa")
    kinds = {"vit": ("vit", "deit")}.get(kind, (kind,))
    files = [file for file in hub.list_files(repo_id) if file.endswith(WEIGHT_SUFFIXES)]

    def names(file: str) -> bool:
        words = re.findall(r"[a-z]+", file.lower())
        named = any(word.endswith(kinds) and not word.endswith("lvvit") for word in words)
        return named and any(word in _SIZES.get(size, (size,)) for word in words)

    found = [file for file in files if names(file)]
    plain = [file for file in found if not set(re.findall(r"[a-z]+", file.lower())) & set(_OTHER_FORMS)]
    if len(plain) == 1:
        return plain[0]
    problem = (
        f"several files name {architecture}: {_some(plain or found)}" if found else f"no file names {architecture}"
    )
    raise CheckpointError(
        f"In {repo_id} {problem}; its weight files are {_some(files, 12) or 'none'}. Download the right one and pass"
        " its path to zoo.create_model."
    )


def _fetch(url: str, cache_dir: str | Path | None) -> Path:
    """Return the local copy of a weight file that is published at an address outside the Hub."""
    folder = cache_dir or get_cache_dir()
    advice = f"Fetch {url} by other means into {folder} (TORCH_HOME), or pass its path to zoo.create_model."
    cached = check_cached_file(url, check_hash=False, cache_dir=cache_dir)
    if not cached and not hub.is_offline():
        try:  # torch's download waits for an answer without end
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_TIMEOUT):
                pass
        except (OSError, ValueError) as error:
            raise hub.HubError(f"The weights cannot be downloaded ({error}). {advice}") from error
    if hub.is_offline() and not cached:
        raise hub.HubError(f"HF_HUB_OFFLINE is set and the weights are not in the download cache. {advice}")
    try:
        return Path(download_cached_file(url, cache_dir=cache_dir))
    except (OSError, RuntimeError) as error:  # RuntimeError: the hash in the file's name is not that of the file
        raise hub.HubError(f"The weights cannot be downloaded ({error}). {advice}") from error


def load_pretrained(
    model: nn.Module,
    cfg: PretrainedCfg,
    filter_fn: FilterFn | None = None,
    cache_dir: str | Path | None = None,
) -> None:
    """Load the weights that `cfg` names: find or download, verify, convert, adapt the stem and head, load strictly.

    Args:
        model: Its `num_classes` and `in_chans` decide what is adapted.
        cfg: Where the weights are and what they were trained for.
        filter_fn: The family's `checkpoint_filter_fn`.
        cache_dir: Folder for downloads; None takes the Hub client's own.

    Raises:
        CheckpointError: There are no weights, or they are damaged or do not fit.
    """
    if cfg.state_dict is not None:
        state_dict, source = dict(cfg.state_dict), cfg.file or "The given state dict"
    else:
        path = _locate(cfg, cache_dir)
        digest = getattr(cfg, "sha256", None) or card_sha256(path.parent, path.name) or hub.blob_digest(path)
        state_dict, source = read_checkpoint(path, digest), str(path)
    if filter_fn is not None:
        state_dict = filter_fn(state_dict, model)
    allow_missing: list[str] = []
    if cfg.classifier and getattr(model, "num_classes", cfg.num_classes) != cfg.num_classes:
        heads = (cfg.classifier,) if isinstance(cfg.classifier, str) else tuple(cfg.classifier)
        allow_missing = [f"{head}.{leaf}" for head in heads for leaf in ("weight", "bias")]
        state_dict = {key: value for key, value in state_dict.items() if key not in allow_missing}
        if not getattr(model, "num_classes", 0):  # what stands before the linear layer in a head goes with it
            own, parts = model.state_dict().keys(), tuple(f"{head.partition('.')[0]}." for head in heads)
            state_dict = {key: value for key, value in state_dict.items() if key in own or not key.startswith(parts)}
        else:
            _log.warning(
                "%s: the weights are for %d classes, the model has %d: its classifier (%s) is new.",
                source,
                cfg.num_classes,
                getattr(model, "num_classes", 0),
                ", ".join(heads),
            )
    own_chans, chans = cfg.input_size[0], getattr(model, "in_chans", cfg.input_size[0])
    if cfg.first_conv and chans != own_chans:
        for stem in (cfg.first_conv,) if isinstance(cfg.first_conv, str) else cfg.first_conv:
            if f"{stem}.weight" in state_dict:
                state_dict[f"{stem}.weight"] = adapt_input_conv(chans, state_dict[f"{stem}.weight"], own_chans)
    load_strict(model, state_dict, allow_missing=allow_missing, source=source)


def pretrained_cfg_of(fields: dict[str, Any]) -> PretrainedCfg:
    """Return the plainest kind of cfg that has all given fields."""
    for kind in (PretrainedCfg, ModelCfg):
        if fields.keys() <= {field.name for field in dataclasses.fields(kind)}:
            return kind(**fields)
    return RestorationCfg(**fields)  # names a field that is none


BUILDER_ARGUMENTS = ("features_only", "out_indices", "feature_cls", "pretrained_strict", "pretrained_model_args")
"""Arguments that timm's builder takes for every model; the rest go to the class."""


def require_known(name: str, function: Callable[..., Any], given: Iterable[str], others: Iterable[str] = ()) -> None:
    """Refuse arguments that a function does not take, naming the nearest that it does.

    Args:
        name: What is being built, for the message.
        function: A function or class; one that takes any keyword is not checked.
        given: Names of the arguments.
        others: Further names that are right.

    Raises:
        TypeError: It does not take one of them.
    """
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = [key for key in parameters if key not in ("self", "device", "dtype")]
    for key in given:
        if key not in (*known, *others, "device", "dtype"):
            raise TypeError(
                f"{name} has no argument {key!r}.{did_you_mean(key, [*known, *others], quoted=True)} "
                f"It takes: {', '.join(known)}."
            )


def build_model(
    model_cls: Callable[..., ModelT],
    variant: str,
    pretrained: bool,
    *,
    filter_fn: FilterFn,
    defaults: Mapping[str, Any] | None = None,
    feature_cfg: dict[str, Any] | None = None,
    pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> ModelT:
    """Build a registered model through timm's `build_model_with_cfg`, with our strict loading in place of timm's.

    Constructor arguments are taken, later ones winning, from the variant's `defaults`, the weight tag's `model_args`
    and the caller's `kwargs`.

    Args:
        model_cls: The family's class.
        variant: Registered name.
        pretrained: Load the weights of the cfg.
        filter_fn: The family's `checkpoint_filter_fn`.
        defaults: Constructor arguments of the variant.
        feature_cfg: For `features_only`, as in timm.
        pretrained_cfg: Tag, cfg, or dict of a cfg's fields, as timm passes it on.
        pretrained_cfg_overlay: Entries that replace those of the cfg.
        cache_dir: Folder for downloads.
        **kwargs: The caller's arguments for the class and for timm's builder.

    Raises:
        CheckpointError: Weights were asked for that do not exist or do not fit.
        TypeError: The class does not know an argument; the message names the nearest.
    """
    if isinstance(pretrained_cfg, dict):
        pretrained_cfg = pretrained_cfg_of(pretrained_cfg)
    if isinstance(pretrained_cfg, PretrainedCfg):
        cfg = dataclasses.replace(pretrained_cfg, **{"architecture": variant, **(pretrained_cfg_overlay or {})})
    else:
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    model_args = cfg.model_args if isinstance(cfg, ModelCfg) else {}
    require_known(variant, model_cls, kwargs, BUILDER_ARGUMENTS)

    def construct(**arguments: Any) -> ModelT:
        model = model_cls(**arguments)
        if pretrained:
            load_pretrained(model, cfg, filter_fn, cache_dir)
        return model

    kwargs.pop("pretrained_model_args", None)
    model = build_model_with_cfg(
        construct,
        variant,
        pretrained=False,
        pretrained_cfg=dataclasses.replace(cfg, state_dict=None),  # type: ignore[arg-type]  # timm takes cfgs too
        feature_cfg=dict(feature_cfg or {}),
        **{**(defaults or {}), **model_args, **kwargs},
    )
    if not kwargs.get("features_only"):
        note_build(model, described(variant, vars(cfg), {**model_args, **kwargs}))
    return model
