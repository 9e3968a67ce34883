"""The codes at the end of error lines, and what to do about each; the documents list them under the same names.

There are hundreds of messages and some forty kinds. A kind is told by the words of a message, or else by the module
that raised it: code that raises needs to know nothing of codes.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field
from types import TracebackType

__all__ = [
    "EXTRAS",
    "KINDS",
    "UNEXPECTED",
    "Kind",
    "code_for",
    "code_of",
    "missing_library",
    "require_library",
    "with_code",
]

EXTRAS = {
    **dict.fromkeys(("diffusers", "transformers", "accelerate", "ftfy"), "diffusion"),
    **dict.fromkeys(("imageio", "imageio_ffmpeg"), "video"),
    **dict.fromkeys(
        ("lightning", "jsonargparse", "torchmetrics", "datasets", "pyarrow", "tensorboard", "peft"), "train"
    ),
    "pycocotools": "detection",
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "export"),
    "openvino": "openvino",
    "spandrel": "spandrel",
    **dict.fromkeys(("pillow_heif", "pillow_jxl"), "formats"),
    "cv2": "realblur",
    **dict.fromkeys(("torch_pruning", "cache_dit"), "benchmark"),
    **dict.fromkeys(("skimage", "matplotlib"), "demo"),
    **dict.fromkeys(("gradio", "psutil"), "app"),
}
"""The extra of this package that brings a module."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of error.

    Args:
        code: Ends the line.
        title: What happened.
        cure: What to do, in Markdown.
        words: Pattern of messages that are of this kind, wherever they come from.
        modules: Beginnings of the names of modules, below `zoo.`, whose other messages are of this kind.
    """

    code: str
    title: str
    cure: str
    words: str = r"(?!)"
    modules: tuple[str, ...] = field(default=())


UNEXPECTED = "Z900"
"""Code of what no kind tells: a fault of zoo's own, or of a library."""

KINDS = (
    Kind(
        code="Z101",
        title="The command does not exist, or does not take this option or choice",
        cure="The line names the nearest right one. `zoo --help` lists the commands, `zoo COMMAND --help` its "
        "options. Options are written out in full.",
        words=r"There is no command|^`zoo .*` does not take|is not a [-\w/, ]+\. .*Choices:|the following arguments "
        r"are required|^argument |is no count|is no scale; write|expected (one|at least one) argument|not allowed with",
    ),
    Kind(
        code="Z103",
        title="The result would replace something, or cannot be written there",
        cure="Give `-o` another place, or `--force` where the command has it: nothing is replaced without it. "
        "`zoo restore` goes on with a stopped run by `--skip-existing`. In Python the argument is `overwrite=True`. "
        "Where a folder is not writable, its owner or the disk says no.",
        words=r"--force|--skip-existing|overwrite=True|would replace|not replaced|is a folder; give the name|"
        r"cannot be made:|not writable|cannot be written to|would both become|is a file; -o takes|names one file for|"
        r"is one file for|bytes and may have|choose a folder outside|No space left|Read-only file system|"
        r"Permission denied",
    ),
    Kind(
        code="Z106",
        title="A library is missing",
        cure="The line ends with the command that installs it. Extras are installed by "
        "`pip install 'ffn-zoo[NAME]'`: `diffusion`, `train`, `export`, `formats`, `demo`, `app`, and others; several "
        "with commas.",
        words=r"pip install|is not installed|which is missing|No module named",
    ),
    Kind(
        code="Z105",
        title="There is no such device here",
        cure="`--device cpu` always works. `python -c \"import torch; print(torch.cuda.is_available())\"` says whether "
        "this torch sees a GPU; the CPU build of torch never does.",
        words=r"There is no device|is no device;|needs triton|TRITON_INTERPRET|--offload keeps|kernel backend",
    ),
    Kind(
        code="Z701",
        title="The network is needed, and is not there or switched off",
        cure="The line names the wanted file. Fetch it where there is a network with the `hf download` of the line, "
        "copy the cache (`HF_HUB_CACHE`), or unset `HF_HUB_OFFLINE`. Shipped weights need no network: `zoo list` says "
        "which they are.",
        words=r"HF_HUB_OFFLINE|not in the download cache|cannot be reached|Try again later|timed out",
    ),
    Kind(
        code="Z702",
        title="The Hub refuses, or has no such repository, file or revision",
        cure="Compare the id with the address of its page. Private and gated repositories need `hf auth login`, gated "
        "ones a request on their page first; publishing needs a token that may write.",
        words=r"is no Hub id|is gated: ask|shows no repository|no such revision|hf auth login|refused access",
        modules=("hub",),
    ),
    Kind(
        code="Z703",
        title="A model folder is not fit to publish",
        cure="`zoo verify FOLDER` lists everything that is missing at once: card, licence, digests, metrics with their "
        "protocol. What `zoo finetune` writes is complete.",
        words=r"not fit to publish|is not complete:|There is no card of",
        modules=("cards", "cli.publishing"),
    ),
    Kind(
        code="Z201",
        title="No model is called that",
        cure="The line names the nearest. `zoo list` shows all names, `zoo list 'repa*'` some; timm's models work too. "
        "A folder that is called like a model is written `./NAME`. `timm.create_model` itself says `Unknown model` "
        "without the nearest, and has no place where another package can add it; `zoo.create_model` and every command "
        "do.",
        words=r"No model is called|has no weights called|No model fits|No model has the task|asks for the architecture|"
        r"asks for the denoiser|different models, got|Give different pipelines|Say which weights|neither classifies",
        modules=("catalog",),
    ),
    Kind(
        code="Z202",
        title="There are no published weights for this",
        cure="`zoo list --pretrained` shows what has weights, and which are shipped. Authors' files are given by "
        "`--weights FILE` or as the model itself. Own ones come from `zoo finetune` or `zoo train`.",
        words=r"No weights (are published|are under|for)|has no weights for noise|are not in |its files are not at|"
        r"is a published denoiser",
    ),
    Kind(
        code="Z206",
        title="Merged weights and a model in training form, or the reverse",
        cure="Build the model in the form of the weights (`merged=True` or `False`), or merge after loading with "
        "`zoo.reparameterize(model)`. A merged model cannot be trained further as it was.",
        words=r"weights are merged|are merged and the model|The weights are .*, the model is|with merged=",
    ),
    Kind(
        code="Z204",
        title="The weights do not fit the model",
        cure="Every key has to fit: nothing is left random in silence. The line names the keys or shapes. Most often "
        "the weights are of another variant, have another number of classes (`num_classes=...` makes a new "
        "classifier on purpose), or the file is of another model.",
        words=r"do(es)? not fit|missing keys?|unexpected keys?|keys: |has \d+ classes|does not load|holds .*, not |"
        r"has the shape|have the shape|other shapes",
    ),
    Kind(
        code="Z205",
        title="A file or folder does not say which model it holds",
        cure="Say it: `--model-args architecture=NAME`, or `architecture=\"NAME\"` in Python, with what else the line "
        "asks for. Folders and checkpoints that zoo wrote hold a record and need nothing.",
        words=r"architecture=|does not tell(?! what it skips)|no known architecture|no known restorer|"
        r"neither config\.json|is recognised as|no model_index\.json|its model_index\.json says",
        modules=("loading", "record"),
    ),
    Kind(
        code="Z207",
        title="The model is for another task",
        cure="`zoo info NAME` says what a model is for, `zoo list --task TASK` which models are for a task. "
        "Classifiers go with `classify`, restorers with `restore`, pipelines with `generate`.",
        words=r"cannot classify|is not for |is for [\w ]+, not |does not restore|restores no images|no classifier|"
        r"This model has no classes|is a model for|: the page classifies|not a diffusion pipeline|different tasks|"
        r"do(es)? not restore images|makes sound|has no transformer:",
    ),
    Kind(
        code="Z301",
        title="The file is no picture, or of a format that is not read here",
        cure="Open it in a viewer: downloads are often pages of HTML with a picture's suffix. HEIC and JPEG XL need "
        "`pip install 'ffn-zoo[formats]'`. Camera raw files are developed first.",
        words=r"not an image|is no picture|expected an image file|raw converter|is not there: expected",
    ),
    Kind(
        code="Z302",
        title="The picture is damaged",
        cure="It was cut short or changed: copy or download it again. The other pictures of the run are done.",
        words=r"is damaged: |head of the PPM is damaged",
    ),
    Kind(
        code="Z303",
        title="The picture is too large, or too narrow",
        cure="The bound keeps files that are made to fill the memory from doing so. `--max-pixels` raises it for files "
        "that you trust. `--crop` and `--budget` need less memory.",
        words=r"is refused: |too many for|at most .* million|times as long as wide|are too many at a time",
    ),
    Kind(
        code="Z306",
        title="The format of the result cannot hold this, or cannot be written",
        cure="Choose another suffix or `--format`: PNG and TIFF hold nearly everything, see [](formats.md).",
        words=r"no format that can be written|names no format|Cannot write|names no image format|"
        r"writes .*, not |-o takes ",
        modules=("pictures.write", "pictures.formats", "pictures.containers", "cli.showing", "cli.targets"),
    ),
    Kind(
        code="Z307",
        title="The memory does not suffice",
        cure="The line says how much is needed. A larger `--budget`, smaller tiles (`--tile`), a part (`--crop`), or a "
        "smaller batch; on a GPU, `--dtype bfloat16` halves what activations take.",
        words=r"[Oo]ut of memory|too small for \d|A memory size|A budget of .* is too small|"
        r"DefaultCPUAllocator|can't allocate",
        modules=("pictures.plans",),
    ),
    Kind(
        code="Z104",
        title="There is no such file or folder, or nothing in it",
        cure="The line shows the path as it was understood, from the current folder on, and files nearby. Quote names "
        "with spaces and patterns with `*`.",
        words=r"There is no (file|folder|picture|config|right view)|No weight file|[Nn]o such file|No folder|"
        r"names no folder|does not exist|holds no weight file|holds no pictures?|No image \(|has no picture|"
        r"there is no folder|No such file or directory|is neither a folder",
        modules=("sources", "files"),
    ),
    Kind(
        code="Z305",
        title="The picture is of a kind that is not handled",
        cure="Convert it to 8- or 16-bit gray, RGB or CMYK first. In Python an array is (H, W) or (H, W, 1 to 4) of "
        "uint8, uint16, bool, or floats in [0, 1].",
        words=r"pixels that are (no finite|complex) numbers|has no pixels|is a volume|has the colour mode|is in LAB",
        modules=("pictures.read", "pictures.tiff", "pictures.picture", "pictures.image", "pictures.eight_bit",
                 "pictures.color", "pictures.metadata", "pictures.png"),
    ),
    Kind(
        code="Z308",
        title="Scale, size, part, noise or quality do not go with the picture or the model",
        cure="`zoo restore --help` says what each takes. Tasks other than `sr` keep the size; `--width` and "
        "`--max-side` also make pictures smaller.",
        modules=("pictures.sizes", "pictures.restore", "pictures.restorers", "pictures.tiling", "pictures", "spandrel",
                 "streaming"),
    ),
    Kind(
        code="Z402",
        title="A cache is on already, or not yet, or in the way",
        cure="One model has one cache. `zoo.disable_cache(pipe)` takes it off; `with zoo.cached(pipe, config):` does "
        "so by itself. Compile first, then enable the cache; enable before offloading; `model.eval()` for sampling.",
        words=r"has a cache already|no cache of zoo's|has not run yet|nothing to draw|zoo\.disable_cache|"
        r"before offloading|with a cache at the same time|over this cache|is for sampling",
    ),
    Kind(
        code="Z403",
        title="A schedule or a saved setting does not fit this run",
        cure="Schedules hold for a model, scheduler, number of steps and guidance. `zoo tune-cache MODEL --steps N` "
        "finds a setting anew, `zoo.calibrate_cache` a schedule.",
        words=r"schedule|saved setting|cache setting|was found for|calibrat",
        modules=("caching.saved", "caching.schedules", "caching.calibration", "caching.bac"),
    ),
    Kind(
        code="Z401",
        title="This cache finds nothing to work on, or does not go with the model",
        cure="[](caching_support.md) lists what works on which model; `TaylorSeerConfig` and `BACConfig` work on "
        "nearly all. For blocks of your own, `zoo.caching.register_blocks`. Thresholds and intervals are in "
        "`zoo generate --help`.",
        words=r"No cache is called|neither a cache nor|No cache works|A cache needs",
        modules=("caching", "diffusion.blocks", "bench.tuning", "cli.tuning"),
    ),
    Kind(
        code="Z405",
        title="The pipeline needs something that was not given, or does not take what was",
        cure="The line names the option: classes or prompts, pictures, masks. `--pipeline-args KEY=VALUE` gives any "
        "other argument of its call.",
        words=r"No class is called|--prompt|--classes|needs --|does not take --",
        modules=("cli.pipelines", "cli.generate", "diffusion", "cli.app.generating"),
    ),
    Kind(
        code="Z504",
        title="The model cannot be merged, compiled or accelerated as it is",
        cure="Call `model.eval()`; take off adapters, pruning hooks and quantisation first, then merge, then compile.",
        words=r"cannot be merged|is in training mode|no running statistics|accelerate|torch\.fx cannot",
        modules=("acceleration", "ffn.reparam", "layers.own"),
    ),
    Kind(
        code="Z503",
        title="The technique needs data",
        cure="Give batches of inputs, or of (inputs, labels): 32 to 256 samples do. On the command line `--data DIR`.",
        words=r"needs data|needs calibration=|A calibration|give --calibration",
    ),
    Kind(
        code="Z510",
        title="A mixture of experts cannot be made, or has none",
        cure="`zoo.moe.convert` makes experts where feed-forward layers divide evenly: the line lists those that "
        "fit. Merge adapters first.",
        modules=("moe", "cli.moe", "tasks.moe_distillation"),
    ),
    Kind(
        code="Z501",
        title="A feed-forward technique does not fit a layer, or one of its numbers is out of range",
        cure="[](ffn.md) says what each technique needs and keeps. Techniques work on dense layers with their own "
        "products; undo one before another.",
        modules=("ffn", "cli.compress"),
    ),
    Kind(
        code="Z604",
        title="A training cannot start, go on, or be stored",
        cure="`--ckpt_path last` continues the run in `runs/NAME`. An unknown key of a config is an error, its "
        "nearest right one is named; `zoo train fit --config NAME --print_config` shows all.",
        modules=("tasks", "cli.train"),
    ),
    Kind(
        code="Z601",
        title="The training or test data are not as they should be",
        cure="Class folders are `DIR/CLASS/*.jpg` or `DIR/{train,val}/CLASS/*.jpg`, with two classes or more and two "
        "pictures in each. Pairs have equal names. The line says which file is at fault.",
        words=r"has one class|has one picture|class folders?|call the folder of",
        modules=("data", "cli.finetune", "environments"),
    ),
    Kind(
        code="Z605",
        title="An evaluation does not go with the data or the protocol",
        cure="`zoo evaluate --help` lists the protocols. References and results need one size and names that belong "
        "together.",
        modules=("evaluation", "cli.evaluate"),
    ),
    Kind(
        code="Z208",
        title="An argument of a model is out of range",
        cure="The line says what is allowed. `help(zoo.create_model)` and the page of the family say what each means; "
        "`zoo info NAME` shows the usual values.",
        words=r"has no (argument|attribute)|unexpected keyword argument|global_pool|num_classes must|input_size must",
        modules=("backbones", "restoration", "layers", "factory", "cfg", "deprecation"),
    ),
    Kind(
        code="Z203",
        title="A weight file is damaged, unsafe, or not what its card says",
        cure="Files load without running code, and their digest is compared with the card's. Fetch the file anew; turn "
        "old pickles into safetensors where they came from.",
        modules=("weights",),
    ),
    Kind(
        code="Z801",
        title="A benchmark or a report cannot be made",
        cure="Outputs are compared before anything is timed: what differs is not timed. `zoo bench --help` lists the "
        "named benchmarks.",
        modules=("bench", "cli.bench", "demo", "cli.demo", "profiling"),
    ),
    Kind(
        code="Z802",
        title="A kernel was called with what it does not take",
        cure="The line gives the shapes. `ZOO_KERNELS=reference` takes the plain torch formula everywhere.",
        modules=("kernels",),
    ),
    Kind(
        code="Z803",
        title="The model cannot be exported, or the graph differs",
        cure="The graph is compared with the model before it is kept. Restorers export at fixed multiples of pixels; "
        "[](tutorials/export.ipynb) shows every target.",
        modules=("export", "cli.export"),
    ),
    Kind(
        code="Z804",
        title="An engine does not run this model as it is",
        cure="The line says what the engine takes: device, precision, sizes. `engine=\"auto\"` takes the fastest that "
        "agrees with the model, and plain torch always works.",
        modules=("engines",),
    ),
    Kind(
        code="Z805",
        title="The page cannot be served, or asks for a choice",
        cure="`zoo app --port N` takes another port; the limits of the page are options of `zoo app`.",
        modules=("cli.app",),
    ),
    Kind(
        code="Z102",
        title="An option has a value that it does not take, or does not go with another",
        cure="`zoo COMMAND --help` says what each option takes and which go together.",
        words=r"^--[-\w]+ (must|is|takes|lies|goes|belongs|needs|and) |^Give ",
        modules=("cli",),
    ),
    Kind(
        code=UNEXPECTED,
        title="Something unexpected",
        cure="A fault of zoo's own, or of a library. `--debug` shows where; please report it with that output.",
    ),
)  # fmt: skip

_WORDS = tuple((re.compile(kind.words), kind.code) for kind in KINDS)
_MODULES = sorted(((module, kind.code) for kind in KINDS for module in kind.modules), key=lambda pair: -len(pair[0]))


def code_for(said: str, module: str = "") -> str:
    """Return the code of a message.

    Args:
        said: The message.
        module: Where it was raised, below `zoo.`; empty where that is unknown.
    """
    for words, code in _WORDS:
        if words.search(said):
            return code
    for beginning, code in _MODULES:
        if module == beginning or module.startswith(f"{beginning}."):
            return code
    return UNEXPECTED


def code_of(error: BaseException) -> str:
    """Return the code of an error that was raised."""
    if isinstance(error, MemoryError):
        return code_for("Out of memory")
    said = " ".join(str(error).split()) or type(error).__name__
    module, is_own = _module(error.__traceback__)
    if isinstance(error, RuntimeError) and not is_own:
        module = ""  # of a library: no fault that the caller could have made
    return code_for(said, module if isinstance(error, _EXPECTED) else "")


_EXPECTED = (ValueError, TypeError, RuntimeError, OSError, ImportError)


def _module(trace: TracebackType | None) -> tuple[str, bool]:
    """Return the innermost module of zoo that an error went through, without `zoo.`, and whether it arose there."""
    found, is_own = "", False
    while trace is not None:
        name = str(trace.tb_frame.f_globals.get("__name__", ""))
        is_own = name.startswith("zoo.")
        found = name.removeprefix("zoo.") if is_own else found
        trace = trace.tb_next
    return found, is_own


def require_library(name: str, what: str, *, extra: str = "") -> None:
    """Refuse, before any work, what needs a library that is not installed.

    Args:
        name: The module.
        what: Needs it.
        extra: Of this package, that brings it; empty for that of `EXTRAS`.

    Raises:
        ImportError: It is not installed; the message says what installs it.
    """
    if importlib.util.find_spec(name) is None:
        raise ImportError(f"{what} needs {name}, which is missing: pip install 'ffn-zoo[{extra or EXTRAS[name]}]'.")


def missing_library(error: BaseException) -> str:
    """Return which library an error says is missing, and what installs it; empty for any other error."""
    name = str(error.name).partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if name not in EXTRAS:
        return ""
    return f"This needs {name}, which is missing: pip install 'ffn-zoo[{EXTRAS[name]}]'."


def with_code(said: str, code: str) -> str:
    """Return a line with its code at the end, once."""
    return said if re.search(r" \[Z\d{3}\]$", said) else f"{said} [{code}]"
