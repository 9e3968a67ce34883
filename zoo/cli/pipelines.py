"""What commands on diffusion pipelines share: how one is loaded, and how it is called with what the user gives.

A pipeline is called with what its `__call__` takes. What it needs and was not given, and what was given and it does not
take, is said in one line that names the option, before anything is computed.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo import catalog
from zoo.cli.inputs import add_device, find_pictures
from zoo.cli.models import key_values
from zoo.cli.output import UsageError, at_least, hush, pick_device, silent
from zoo.sources import PIPELINE_INDEX, beside, cards_dir, find

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

__all__ = [
    "REQUEST",
    "SCHEDULERS",
    "Plan",
    "add_request",
    "check_name",
    "check_request",
    "classes_of",
    "load_pipeline",
    "plan_calls",
]

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}

_FEW = 40  # classes that an error line names

REQUEST = (
    "classes", "prompt", "prompts", "negative_prompt", "image", "control", "mask", "video", "height", "width", "frames",
    "guidance", "scheduler", "offload", "pipeline_args",
)  # fmt: skip
"""What `add_request` adds, by attribute."""

# the arguments of a pipeline that an option stands for: the first that it takes
_NAMES = {
    "image": ("image", "control_image", "input_image", "input_images", "images", "reference_image", "reference_images"),
    "control": ("control_image",),
    "mask": ("mask_image", "mask", "control_mask"),
    "video": ("video", "control_video"),
    "negative_prompt": ("negative_prompt",),
    "height": ("height",),
    "width": ("width",),
    "frames": ("num_frames", "frames", "video_length"),
}
# which pipelines cannot do without, though their signature lets it be left out
_NEEDED = {
    "image": r"Img2Img|ImageTo|I2V|Inpaint|Edit|Fill|Pix2Pix|Upscale|Depth2Img|Layered|Variation|Adapter|ControlNet",
    "control_image": r"Control",
    "control_video": r"Control",
    "mask_image": r"Inpaint|Fill",
    "control_mask": r"Inpaint",
    "video": r"VideoToVideo",
}
_ONE_EACH = re.compile(r"Img2Img|ImageTo|I2V|Inpaint|Edit(?!Plus)|Upscale|Variation|VideoDiffusion")
_SOUND = ("audio_length_in_s", "audio_end_in_s", "audio_duration", "num_waveforms_per_prompt")
_OF_VIDEO = ("num_frames", "frames", "num_videos_per_prompt", "video", "video_length")
_BATCH = 32
_EXTRA = ("--pipeline-args", "strength=0.6")
_OWN = ("generator", "num_inference_steps", "output_type", "return_dict", "callback_on_step_end")


def add_request(parser: argparse.ArgumentParser) -> None:
    """Add what a pipeline is called with, and where and how it runs."""
    of = parser.add_mutually_exclusive_group()
    of.add_argument("--classes", metavar="A,B", help="classes by name or number, in turns (default: all)")
    of.add_argument("--prompt", action="append", metavar="TEXT", help="what to show; again for more pictures")
    of.add_argument("--prompts", type=Path, metavar="FILE", help="text file with one prompt a line")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what not to show")
    parser.add_argument(
        "--image", action="append", type=Path, metavar="FILE", help="picture to start from, or to be guided by"
    )
    parser.add_argument("--control", type=Path, metavar="FILE", help="picture for a ControlNet, beside --image")
    parser.add_argument("--mask", type=Path, metavar="FILE", help="picture that is white where to paint")
    parser.add_argument("--video", type=Path, metavar="FILE", help="video, or folder of its frames, to start from")
    parser.add_argument("--height", type=int, metavar="PIXELS", help="default: the pipeline's own")
    parser.add_argument("--width", type=int, metavar="PIXELS", help="default: the pipeline's own")
    parser.add_argument("--frames", type=int, metavar="N", help="of a video (default: the pipeline's own)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's own); up to 1 is off")
    parser.add_argument("--scheduler", choices=list(SCHEDULERS), help="default: the one that came with the pipeline")
    parser.add_argument(
        "--pipeline-args", nargs="+", default=[], metavar="KEY=VALUE", help="more of the call: strength=0.6"
    )
    parser.add_argument(
        "--offload",
        choices=("model", "group", "sequential"),
        help="keep weights in the CPU's memory, and bring models, layers, or single weights to the GPU for their turn",
    )
    add_device(parser)


def check_request(args: argparse.Namespace, *more: str) -> None:
    """Refuse numbers and files that cannot be, before torch is imported, and read the file of prompts.

    Args:
        args: The options; a file of prompts becomes the list `args.prompt`.
        *more: Further options that are counts.

    Raises:
        UsageError: A number is below 1, a file is missing, or there is no prompt in it.
    """
    at_least(args, **dict.fromkeys(("height", "width", "frames", *more), 1))
    for name in ("image", "control", "mask", "video", "prompts"):
        given = getattr(args, name)
        for path in given if isinstance(given, list) else [given]:
            if path is not None and not path.exists():
                raise UsageError(f"There is no file {path} for --{name}.{beside(path)}")
    if args.prompts is not None:
        try:
            lines = args.prompts.read_text(encoding="utf-8-sig").splitlines()
        except (UnicodeDecodeError, IsADirectoryError) as error:
            raise UsageError(f"{args.prompts} is no text file in UTF-8: --prompts takes one prompt a line.") from error
        args.prompt = [line.strip() for line in lines if line.strip()]
        if not args.prompt:
            raise UsageError(f"{args.prompts} holds no prompts; write one a line.")
    key_values(args.pipeline_args, *_EXTRA)


def check_name(name: str) -> None:
    """Refuse what is no pipeline by its name, before diffusers is imported.

    Raises:
        ValueError: There is no such name; the message names the nearest.
    """
    if not Path(name).is_dir() and "/" not in name:
        task = catalog.entry(name)["task"]
        if task not in catalog.PIPELINE_TASKS:
            raise UsageError(f"{name!r} is a {task} model, not a diffusion pipeline.")


def classes_of(name: str) -> dict[str, str]:
    """Return the names of a pipeline's classes by number, without loading it; empty where only loading tells.

    Args:
        name: NAME.TAG, folder or Hub id.
    """
    index = (find(name).path or cards_dir() / name) / PIPELINE_INDEX
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["id2label"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # whoever loads it says what is wrong
    return found if isinstance(found, dict) else {}


def _check_classes(args: argparse.Namespace, name: str) -> None:
    """Refuse classes that a pipeline does not have, before diffusers is imported."""
    names = [each.strip() for text in classes_of(name).values() for each in str(text).split(",")]
    for label in (getattr(args, "classes", None) or "").split(",") if names else ():
        if (label := label.strip()) and not label.isdigit() and label not in names:
            hint = catalog.did_you_mean(label, names, quoted=True)
            said = f" The classes are {', '.join(names)}." if len(names) <= _FEW else ""
            raise UsageError(f"No class is called {label!r}.{hint}{said}")


def load_pipeline(args: argparse.Namespace, name: str) -> tuple[Any, torch.device]:
    """Load a pipeline as asked for, and put it where it runs.

    Args:
        args: The options of `add_request`.
        name: NAME.TAG, folder or Hub id.

    Returns:
        The pipeline, whose own progress bars are off, and the device that computes.

    Raises:
        UsageError: There is no such device, or nothing to offload from.
        ValueError: There is no such pipeline.
    """
    check_name(name)
    _check_classes(args, name)
    hush(args, diffusers=True)
    import torch
    import transformers

    from zoo.factory import create_pipeline
    from zoo.processor import tell_of_emulation

    if silent(args):
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
    device = pick_device(args.device)
    if args.offload and device.type == "cpu":
        raise UsageError("--offload keeps weights in the CPU's memory while a GPU computes; --device is the CPU here.")
    dtype = getattr(torch, args.dtype)
    tell_of_emulation(dtype, device, "--dtype float32")
    pipe = create_pipeline(name, dtype=dtype)
    if args.scheduler:
        pipe.scheduler = _scheduler(pipe, args.scheduler)
    _place(pipe, args.offload, device)
    pipe.set_progress_bar_config(disable=True)  # there is one for all calls
    return pipe, device


def _scheduler(pipe: Any, name: str) -> Any:
    """Return another scheduler for a pipeline, of what its denoiser predicts: a flow, or noise and the like.

    Raises:
        UsageError: The scheduler takes no such prediction: the pictures would be noise.
    """
    import diffusers

    before = pipe.scheduler.config
    is_flow = "FlowMatch" in type(pipe.scheduler).__name__ or before.get("prediction_type") == "flow_prediction"
    classes = {key: getattr(diffusers, value) for key, value in SCHEDULERS.items()}
    own = "flow-euler"
    # the others take a shift by the size of the picture, as Flux gives it, only where the model is made for it
    is_shifted = hasattr(inspect.getmodule(type(pipe)), "calculate_shift")
    takes_shift = before.get("use_dynamic_shifting") and before.get("time_shift_type", "exponential") == "exponential"
    others = {key for key, cls in classes.items() if "use_flow_sigmas" in inspect.signature(cls).parameters}
    of_flow = {own} | (others if takes_shift or not is_shifted else set())
    fit = [key for key in classes if (key in of_flow if is_flow else key != own)]
    if name not in fit:
        what = "a flow" if is_flow else "noise or a picture, no flow"
        raise UsageError(
            f"--scheduler {name}: the model of this pipeline predicts {what}; give one of {', '.join(fit)}."
        )
    changes: dict[str, Any] = {}
    if is_flow:
        shift = before.get("flow_shift", before.get("shift", 1.0))
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
        changes = {"shift": shift} if name == own else flow
    return classes[name].from_config(before, **changes)


def _place(pipe: Any, offload: str | None, device: torch.device) -> None:
    if offload is None:
        pipe.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.enable_group_offload(device, offload_type="leaf_level", use_stream=device.type == "cuda")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a pipeline is called.

    Args:
        pipe: The pipeline.
        items: Arguments of each picture or video; those of a batch are put into lists.
        names: What each shows, for people and files.
        fixed: Arguments of every call.
        batch: Pictures at a time.
        seed: Of the first picture; the next ones have the next numbers.
        is_video: Whether it makes videos.
    """

    pipe: Any
    items: Sequence[dict[str, Any]]
    names: Sequence[str]
    fixed: dict[str, Any]
    batch: int
    seed: int
    is_video: bool
    takes: frozenset[str] = field(repr=False)

    @property
    def first(self) -> range:
        """Those of the first call."""
        return range(min(self.batch, len(self.items)))

    def run(
        self,
        steps: int,
        tell: Callable[[], None] | None = None,
        which: range | None = None,
    ) -> list[Tensor]:
        """Make the pictures, each from a noise of its own.

        Args:
            steps: Of the scheduler.
            tell: Called after each step.
            which: Only those with these numbers; None is all.

        Returns:
            Each as (frames, C, H, W) in [0, 1] on the CPU; a picture is one frame.
        """
        made: list[Tensor] = []
        which = range(len(self.items)) if which is None else which
        with _telling(self.pipe, tell, self.takes) as more:
            for first in range(which.start, which.stop, self.batch):
                items = self.items[first : min(first + self.batch, which.stop)]
                made += self._call(items, self.seed + first, steps, more)
        return made

    def _call(self, items: Sequence[dict[str, Any]], seed: int, steps: int, more: dict[str, Any]) -> list[Tensor]:
        import torch

        from zoo.bench.tuning import as_images

        count = len(items)
        together = {key: [item[key] for item in items] for key in items[0]}
        arguments: dict[str, Any] = dict(self.fixed)
        for key, values in together.items():
            arguments[key] = values if count > 1 or key == "class_labels" else values[0]
        if count > 1 and isinstance(arguments.get("negative_prompt"), str):
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * count
        generators = [torch.Generator("cpu").manual_seed(seed + index) for index in range(count)]
        own = {
            "num_inference_steps": steps,
            "generator": generators[0] if count == 1 else generators,
            "output_type": "pt",
            "batch_size": count if not items[0] else None,
        }
        arguments |= {key: value for key, value in own.items() if key in self.takes and value is not None}
        images = as_images(self.pipe(**arguments, **more))
        return list(images.reshape(count, -1, *images.shape[1:]))


@contextmanager
def _telling(pipe: Any, tell: Callable[[], None] | None, takes: frozenset[str]) -> Iterator[dict[str, Any]]:
    """Yield the arguments with which a pipeline tells of each step; without a callback its scheduler does."""
    scheduler: Any = getattr(pipe, "scheduler", None)
    if tell is None or ("callback_on_step_end" not in takes and scheduler is None):
        yield {}
        return
    if "callback_on_step_end" in takes:

        def told(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            tell()
            return tensors

        yield {"callback_on_step_end": told}
        return
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at its signature
    def stepped(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        tell()
        return result

    scheduler.step = stepped
    try:
        yield {}
    finally:
        del scheduler.step


def plan_calls(
    args: argparse.Namespace,
    pipe: Any,
    *,
    name: str,
    count: int | None = None,
    classes: int = 10,
    batch: int | None = None,
    seed: int = 0,
) -> Plan:
    """Say how a pipeline is to be called with what the options say.

    Args:
        args: The options of `add_request`, checked.
        pipe: The pipeline.
        name: What the user calls it, for messages.
        count: Pictures in all; None is one a prompt or given picture.
        classes: Pictures in all where none is given and the pipeline takes neither prompts nor pictures.
        batch: At a time; None is 32 of classes, and one of prompts. Pictures to start from and videos come one by one.
        seed: Of the first picture.

    Raises:
        UsageError: It needs what was not given, or was given what it does not take.
        ValueError: There is no such class.
    """
    cls = type(pipe).__name__
    parameters = inspect.signature(type(pipe).__call__).parameters
    takes = frozenset(parameters)
    if takes & set(_SOUND) or "Audio" in cls:
        raise UsageError(f"{name} is a {cls}, which makes sound; zoo makes pictures and videos.")
    given = _of(args, pipe, takes, name)
    pictures, turns = _pictures(args, cls, parameters)
    fixed = {**_numbers(args, cls, takes), **_guidance(args.guidance, pipe, takes), **_more(args, cls, takes)}
    _check_negative(fixed, cls, parameters)
    _check_missing({**fixed, **pictures, **(turns[0] if turns else {})}, cls, parameters)
    is_video = bool(takes & set(_OF_VIDEO))
    items = [
        {**one, **picture}
        for one, picture in islice(zip(cycle(given or [{}]), cycle(turns or [{}])), max(len(given), len(turns), 1))
    ]
    counted = len(items) if turns or "prompt" in takes or pictures else classes
    chosen = list(islice(cycle(items), count or counted))
    return Plan(
        pipe=pipe,
        items=chosen,
        names=[_label(pipe, item) for item in chosen],
        fixed={**fixed, **pictures},
        batch=1 if turns or pictures or is_video else batch or (1 if "prompt" in takes else _BATCH),
        seed=seed,
        is_video=is_video,
        takes=takes,
    )


def _of(args: argparse.Namespace, pipe: Any, takes: frozenset[str], name: str) -> list[dict[str, Any]]:
    """Return the class or prompt of each picture; empty where the pipeline takes neither."""
    cls = type(pipe).__name__
    if "prompt" in takes:
        if args.classes is not None:
            raise UsageError(f"{name} makes pictures of prompts: give --prompt TEXT instead of --classes.")
        if args.prompt is None:
            raise UsageError(f"{name} is a {cls}, which needs --prompt TEXT (or --prompts FILE, one a line).")
        return [{"prompt": prompt} for prompt in args.prompt]
    if args.prompt is not None:
        option = "--prompt" if args.prompts is None else "--prompts"
        if "class_labels" in takes:
            raise UsageError(f"{name} makes pictures of classes: give --classes instead of {option}.")
        raise UsageError(f"{name} is a {cls}, which takes no prompts: leave out {option}.")
    classes = _class_count(pipe) if "class_labels" in takes else None
    if classes is None:
        if args.classes is not None:
            raise UsageError(f"{name} is a {cls}, which knows no classes: leave out --classes.")
        return []
    if args.classes is None:
        return [{"class_labels": index} for index in range(classes)]
    parts = [part for part in (part.strip() for part in args.classes.split(",")) if part]
    if not parts:
        raise UsageError("--classes names no class.")
    labels = [int(part) if part.isdigit() else part for part in parts]
    return [
        {"class_labels": label} for label in (pipe.get_label_ids(labels) if hasattr(pipe, "get_label_ids") else labels)
    ]


def _class_count(pipe: Any) -> int | None:
    """Return how many classes the denoiser knows; None where it knows none."""
    from zoo.caching.core import denoisers

    config = getattr(denoisers(pipe)[1][0], "config", {})
    found = (config.get(key) for key in ("num_classes", "num_embeds_ada_norm", "num_class_embeds"))
    return next((int(value) for value in found if value), None)


def _label(pipe: Any, item: dict[str, Any]) -> str:
    if "class_labels" in item:
        names: dict[int, str] = getattr(pipe, "id2label", None) or {}
        return names.get(item["class_labels"], f"class {item['class_labels']}")
    return str(item.get("prompt", type(pipe).__name__.removesuffix("Pipeline")))


def _argument(option: str, takes: Collection[str]) -> str | None:
    return next((name for name in _NAMES[option] if name in takes), None)


def _pictures(args: argparse.Namespace, cls: str, parameters: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the pictures and videos of every call, and those that take turns.

    Pipelines that start from one picture get several in turns; others get all of them in every call.
    """
    keys = {option: _argument(option, parameters) for option in ("image", "control", "mask", "video")}
    if keys["control"] == keys["image"]:  # a pipeline that takes a picture for control only
        keys["image" if args.control is not None and not args.image else "control"] = None
    found: dict[str, Any] = {}
    turns: list[dict[str, Any]] = []
    for option, key in keys.items():
        given = getattr(args, option)
        if given is None:
            if key is not None and _is_needed(key, cls, parameters):
                raise UsageError(f"{cls} needs --{option} FILE.")
            continue
        if key is None:
            raise UsageError(f"{cls} does not take --{option}: leave it out.")
        if option == "video":
            found[key] = _video(given)
        elif option != "image":
            found[key] = _picture(given)
        elif len(given) > 1 and _ONE_EACH.search(cls):
            turns = [{key: _picture(path)} for path in given]
        else:
            pictures = [_picture(path) for path in given]
            found[key] = pictures if len(pictures) > 1 else pictures[0]
    return found, turns


def _is_needed(key: str, cls: str, parameters: Any) -> bool:
    """Return whether a pipeline cannot do without an argument."""
    required = parameters[key].default is inspect.Parameter.empty
    return required or re.search(_NEEDED.get(key, r"(?!)"), cls) is not None


def _numbers(args: argparse.Namespace, cls: str, takes: frozenset[str]) -> dict[str, Any]:
    """Return the negative prompt and the sizes."""
    found = {}
    for option in ("negative_prompt", "height", "width", "frames"):
        value = getattr(args, option)
        if value is None:
            continue
        key = _argument(option, takes)
        if key is None:
            raise UsageError(f"{cls} does not take --{option.replace('_', '-')}: leave it out.")
        found[key] = value
    return found


def _more(args: argparse.Namespace, cls: str, takes: frozenset[str]) -> dict[str, Any]:
    """Return --pipeline-args, which may say nothing that zoo says itself."""
    more = key_values(args.pipeline_args, *_EXTRA)
    free = sorted(takes - {*_OWN, "self"})
    for key in more:
        if key not in free:
            raise UsageError(f"{cls} takes no {key!r} here.{catalog.did_you_mean(key, free, quoted=True)}")
    return more


def _guidance(value: float | None, pipe: Any, takes: frozenset[str]) -> dict[str, Any]:
    """Return the scale of guidance, as true_cfg_scale where the model was not distilled to take it as an input."""
    if value is None:
        return {}
    if "true_cfg_scale" in takes:
        config = getattr(getattr(pipe, "transformer", None), "config", {})
        if "guidance_scale" not in takes or not config.get("guidance_embeds"):
            return {"true_cfg_scale": value}
    if "guidance_scale" not in takes:
        raise UsageError(f"{type(pipe).__name__} does not take --guidance: leave it out.")
    return {"guidance_scale": value}


def _check_negative(found: dict[str, Any], cls: str, parameters: Any) -> None:
    """Refuse a negative prompt that would do nothing, and give an empty one where guidance needs one."""
    if "true_cfg_scale" not in parameters or "negative_prompt" not in parameters:
        return
    scale = found.get("true_cfg_scale", parameters["true_cfg_scale"].default) or 0
    if "negative_prompt" in found and not scale > 1:
        raise UsageError(
            f"--negative-prompt does nothing in {cls} at true_cfg_scale={scale:g}: --pipeline-args true_cfg_scale=4."
        )
    if "true_cfg_scale" in found and scale > 1:
        found.setdefault("negative_prompt", " ")


def _check_missing(found: dict[str, Any], cls: str, parameters: Any) -> None:
    """Refuse a call that lacks an argument without a default, but what is left to the pipeline's own check."""
    known = {*found, *_OWN, "self", "prompt", "class_labels"}
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    for key, parameter in parameters.items():
        if key not in known and parameter.default is inspect.Parameter.empty and parameter.kind not in kinds:
            option = next((option for option, names in _NAMES.items() if key in names), None)
            raise UsageError(f"{cls} needs {f'--{option}' if option else f'--pipeline-args {key}=VALUE'}.")


def _picture(path: Path) -> Image:
    from zoo.pictures.eight_bit import read_eight_bit

    return read_eight_bit(path)


def _video(path: Path) -> list[Image]:
    """Return the frames of a video file, an animation, or a folder of pictures."""
    if path.is_dir():
        return [_picture(picture.path) for picture in find_pictures([str(path)])]
    from diffusers.utils import load_video

    frames: list[Image] = load_video(str(path))
    return frames
