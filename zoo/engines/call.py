"""The call of a model that an engine runs: built at the first use of a shape, compared with the model, kept on disk."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import logging
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from zoo.engines.runtimes import ENGINES, EngineError, EngineName, Runner, Runtime, installed
from zoo.engines.store import digest, engines_dir, facts_of, fingerprint, is_known, note_facts
from zoo.engines.watch import Kept, Watched
from zoo.files import whole
from zoo.processor import instructions, processor_name
from zoo.text import counted

__all__ = ["TOLERANCE", "EngineCall", "attach", "detach", "engine_of", "torch_threads"]

TOLERANCE = 1e-4
"""Largest difference of an engine's output from the model's, over the largest output; float32."""

_POOL = 4  # shapes that are ready at once
_CHECK_SIDE = 64  # pixels a side of what a network of any size is compared on
_TIMED_SIDE = 256  # pixels a side on which engines are timed at most, where the network takes any size
_ROUNDS = 7  # in turns
_SECONDS = 6.0  # of timing at most, after the first round
_GAIN = 1.03  # times as fast as eager from which another engine is taken: less is noise

_log = logging.getLogger(__name__)


def attach(
    model: nn.Module,
    engine: EngineName,
    *,
    dynamic: bool = False,
    threads: int | None = None,
    candidates: Sequence[str] | None = None,
    told: Callable[[str], object] | None = None,
) -> EngineCall:
    """Let an engine run a model's `forward`, in place; all else of the model stays as it is.

    Args:
        model: In evaluation mode, float32, on the CPU.
        engine: Checked by `check_engine`.
        dynamic: Keep one open graph for all shapes instead of one for each of the last four.
        threads: Of one call; None takes torch's number at the time of the call.
        candidates: What "auto" times; None is all that is installed and built within seconds.
        told: Told in words what was chosen or built.

    Raises:
        ValueError: The model is in training mode, in another type, or elsewhere.
    """
    detach(model)
    if model.training:
        raise ValueError(
            f"An engine runs inference only; this {type(model).__name__} is in training mode: call eval()."
        )
    if wrong := _unfit(model, engine):
        raise ValueError(wrong)
    own = vars(model).get("forward")
    call = EngineCall(model, engine, dynamic=dynamic, threads=threads, candidates=candidates, told=told, own=own)
    model.forward = call  # type: ignore[method-assign]  # nn.Module calls what it finds under this name
    return call


def _unfit(model: nn.Module, engine: str) -> str:
    """Say in words what of a model no engine takes; nothing where all is well."""
    tensors = [*model.parameters(), *model.buffers()]
    kinds = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    if kinds - {torch.float32}:
        wrong = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        return f"The engine {engine!r} runs float32; this {type(model).__name__} is {wrong}."
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return f"The engine {engine!r} runs on the CPU; this {type(model).__name__} is on {tensors[0].device}."
    return ""


def detach(model: nn.Module) -> None:
    """Let a model run in eager mode again."""
    if (call := engine_of(model)) is not None:
        del model.forward
        if call.own is not None:
            model.forward = call.own  # type: ignore[method-assign]


def engine_of(model: nn.Module) -> EngineCall | None:
    """Return the engine that runs a model, None in eager mode."""
    found = vars(model).get("forward")
    return found if isinstance(found, EngineCall) else None


class EngineCall:
    """Stands in for the `forward` of a model; see `attach`.

    The graph is built at the first call, through `zoo.export`, and kept on disk under a digest of weights, code, shapes
    and versions. Before its results are used, one is compared with the model's. Weights that change later are noticed.

    Attributes:
        said: What was chosen and built, one line a shape.
        own: A `forward` that was set on this very model, not its class's; None where there is none.
    """

    is_engine = True  # for `zoo.layers.own.engine_in`, which packages below this one ask

    def __init__(
        self,
        model: nn.Module,
        engine: EngineName,
        *,
        dynamic: bool = False,
        threads: int | None = None,
        candidates: Sequence[str] | None = None,
        told: Callable[[str], object] | None = None,
        own: Callable[..., Any] | None = None,
    ) -> None:
        self.model, self.engine, self.dynamic, self.threads = model, engine, dynamic, threads
        self.candidates, self.told, self.own = candidates, told, own
        with contextlib.suppress(TypeError, ValueError):  # of what is written in C; pipelines look at the others
            self.__signature__ = inspect.signature(own or partial(type(model).forward, model))
        self.said: list[str] = []
        self._lock = threading.RLock()
        self._watched: Watched | None = None  # a copy of a model gets its call before its weights: read when called
        self._stays_eager = False  # the call changes the model itself, or its input
        self._print = ""
        self._compared: set[str] = set()  # artefacts, with this very model
        self._ready: OrderedDict[Any, tuple[Runner | None, Any]] = OrderedDict()

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineCall:
        return EngineCall(
            copy.deepcopy(self.model, memo),
            self.engine,
            dynamic=self.dynamic,
            threads=self.threads,
            candidates=self.candidates,
            own=copy.deepcopy(self.own, memo),
        )

    def __reduce__(self) -> Any:
        arguments = dict(dynamic=self.dynamic, threads=self.threads, candidates=self.candidates, own=self.own)
        return _again, (self.model, self.engine, arguments)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._require_inference(tensors)
        if self._stays_eager:
            return self.eager(*args, **kwargs)
        if self._watched is None or self._watched.changed():
            with self._lock:
                self._forget()
        threads = self.threads or torch.get_num_threads()
        constants = tuple(
            (index, type(leaf).__name__, repr(leaf))
            for index, leaf in enumerate(leaves)
            if not isinstance(leaf, Tensor)
        )
        shapes = tuple((tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors)
        key = (threads, str(spec), constants, shapes)
        entry = self._ready.get(key)
        if entry is None:
            with self._lock:
                entry = self._ready.get(key) or self._prepare(key, leaves, spec, threads)
        run, form = entry
        if run is None:
            return self.eager(*args, **kwargs)
        outputs = run(tensors)
        if form is None:
            return outputs[0]
        spec_out, places, others = form
        found = list(others)
        for place, output in zip(places, outputs, strict=True):
            found[place] = output
        return tree_unflatten(found, spec_out)

    def eager(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model itself."""
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)

    def _require_inference(self, tensors: Sequence[Tensor]) -> None:
        name = type(self.model).__name__
        if self.model.training:
            raise RuntimeError(f"An engine runs inference only; this {name} is in training mode: call eval().")
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise RuntimeError(f'The engine {self.engine!r} has no gradients: zoo.accelerate(model, engine="eager").')
        if any(tensor.device.type != "cpu" for tensor in tensors):
            raise RuntimeError(f"The engine {self.engine!r} runs on the CPU; the input of {name} is elsewhere.")

    def _forget(self) -> None:
        """Drop all that is ready, and note the state of the model."""
        self._watched = Watched(self.model)
        self._print = ""
        self._compared.clear()
        self._ready.clear()

    def _digest(self) -> str:
        if not self._print:
            self._print = fingerprint(self.model)
        return self._print

    # Preparation: which engine, from disk or built, compared

    def _prepare(self, key: Any, leaves: list[Any], spec: Any, threads: int) -> tuple[Runner | None, Any]:
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            raise EngineError(f"{type(self.model).__name__} was called without a tensor: an engine has nothing to run.")
        if wrong := _unfit(self.model, self.engine):  # by now
            raise EngineError(wrong)
        if getattr(self.model, "is_cache_enabled", False):  # diffusers' own; tracing would leave its marks in it
            raise EngineError(
                f"A cache skips blocks of {type(self.model).__name__}, and the engine {self.engine!r} runs it whole: "
                "call disable_cache() first."
            )
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.dtype in (torch.float16, torch.bfloat16):
                kind = str(leaf.dtype).removeprefix("torch.")
                raise EngineError(
                    f"The engine {self.engine!r} runs float32; an input of {type(self.model).__name__} is {kind}."
                )
            if not isinstance(leaf, Tensor | bool | int | float | str | None):
                raise EngineError(f"An engine takes tensors, numbers and text, not a {type(leaf).__name__}.")
        if len({known[2] for known in self._ready if known[3] == key[3] and known[2] != key[2]}) >= _POOL:
            raise EngineError(
                f"An argument of {type(self.model).__name__} that is no tensor changes from call to call, and an "
                "engine is built for one value: pass it as a tensor."
            )
        if self.engine == "auto":
            entry = self._choose(leaves, spec, threads)
        else:
            entry = self._obtain(self.engine, leaves, spec, threads)
        self._ready[key] = entry
        while len(self._ready) > _POOL:
            self._ready.popitem(last=False)
        return entry

    def _say(self, words: str) -> None:
        self.said.append(words)
        _log.info("%s.", words)
        if self.told is not None:
            self.told(words)

    def _obtain(self, engine: str, leaves: list[Any], spec: Any, threads: int) -> tuple[Runner | None, Any]:
        """Return a runner for a call and the form of its output."""
        from zoo.export.network import ExportError

        if engine == "eager":
            return None, None
        runtime = ENGINES[engine]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        image = tensors[0] if len(leaves) == 1 and len(tensors) == 1 else None
        sizes = self._open_sizes(image) if image is not None and runtime.open_shapes else None
        is_open = sizes is not None and len(sizes) > 1
        folder = self._folder(runtime, engine, sizes, leaves, spec, threads)
        facts = facts_of(folder)
        if is_open and not facts:  # one for this size may be there, where none can be open
            one = self._folder(runtime, engine, None, leaves, spec, threads)
            if facts := facts_of(one):
                sizes, folder = None, one
        if facts and folder.name not in self._compared and not is_known(self.model):
            # Code that no digest reaches (a notebook's, a helper's in another file) may have changed since it was built
            facts["checked"].pop(f"{engine} {runtime.version()}", None)
            try:
                return self._loaded(engine, folder, facts, sizes, leaves, spec, threads)
            except EngineError as error:
                _log.info("%s Built anew.", error)
                facts = {}
        if not facts:
            try:
                facts = self._build(engine, image if sizes is not None else None, leaves, spec, folder, threads)
            except EngineError as error:
                if not is_open or sizes is None or not isinstance(error.__cause__, ExportError):
                    raise
                _log.info("%s Built for one size.", error)
                sizes, folder = None, self._folder(runtime, engine, None, leaves, spec, threads)
                facts = self._build(engine, None, leaves, spec, folder, threads)
        return self._loaded(engine, folder, facts, sizes, leaves, spec, threads)

    def _loaded(
        self, engine: str, folder: Path, facts: dict[str, Any], sizes: Any, leaves: list[Any], spec: Any, threads: int
    ) -> tuple[Runner | None, Any]:
        """Load an artefact, and compare it with the model where it was not yet."""
        runtime = ENGINES[engine]
        fixed = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]
        run = runtime.load(folder, None if self.dynamic and sizes is not None else fixed, threads)
        form = facts.get("form")
        if facts["checked"].get(f"{engine} {runtime.version()}") is None:
            any_size = sizes is not None and len(sizes) > 1
            form = self._check(engine, run, any_size, leaves, spec, folder, facts, threads)
            self._compared.add(folder.name)
        return run, _read_form(form)

    def _folder(self, runtime: Runtime, engine: str, sizes: Any, leaves: list[Any], spec: Any, threads: int) -> Path:
        """Return where the artefact of a call is kept, or that of images of these open sizes."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        size = None if sizes is None or len(sizes) > 1 else tuple(tensors[0].shape[2:])
        return engines_dir() / digest(
            model=self._digest(),
            versions=runtime.versions(),
            kind="call" if sizes is None else "open",
            size=size if sizes is not None else [tuple(tensor.shape) for tensor in tensors],
            inputs=[str(tensor.dtype) for tensor in tensors],
            constants=[repr(leaf) for leaf in leaves if not isinstance(leaf, Tensor)],
            places=str(spec),
            threads=None if runtime.open_shapes else threads,
            processor=None if runtime.open_shapes else instructions(),  # other code would end the process
            file="onnx" if runtime.open_shapes else engine,
        )

    def _open_sizes(self, image: Tensor) -> Any:
        from zoo.export.network import open_sizes

        return open_sizes(self.model, image)

    def _build(
        self, engine: str, image: Tensor | None, leaves: list[Any], spec: Any, folder: Path, threads: int
    ) -> dict[str, Any]:
        """Write an artefact, for any size of an image or for one call.

        It appears whole, and what another process wrote in the meantime is as good.
        """
        from zoo.export.network import ExportError, call_network, open_network

        runtime, start = ENGINES[engine], time.perf_counter()
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".zoo-"))
        except OSError as error:
            raise _not_kept(folder.parent, error) from error
        try:
            try:
                with torch_threads(threads), torch.no_grad():
                    if image is None:
                        network = call_network(self.model, leaves, spec, self)
                    else:
                        network = open_network(self.model, image, self)
                    runtime.build(network, temporary, threads)
            except ExportError as error:
                raise EngineError(f"{runtime.label} cannot run {type(self.model).__name__}: {error}") from error
            facts: dict[str, Any] = {"model": type(self.model).__name__, "versions": runtime.versions(), "checked": {}}
            note_facts(temporary, facts)
            if folder.exists():
                shutil.rmtree(folder, ignore_errors=True)  # damaged, or never finished
            with contextlib.suppress(FileExistsError):
                temporary.rename(folder)
        except OSError as error:
            raise _not_kept(folder.parent, error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._say(f"{runtime.label}: built in {time.perf_counter() - start:.0f} s, kept in {folder}")
        return facts

    def _check(
        self,
        engine: str,
        run: Runner,
        any_size: bool,
        leaves: list[Any],
        spec: Any,
        folder: Path,
        facts: dict[str, Any],
        threads: int,
    ) -> dict[str, Any] | None:
        """Compare an engine with the model on the user's own input, or its middle; return the form of the output.

        Raises:
            EngineError: They differ by more than `TOLERANCE`.
        """
        runtime = ENGINES[engine]
        if any_size and (small := _middle(leaves[0], _CHECK_SIDE)) is not leaves[0]:
            leaves = [small]
            run = runtime.load(folder, [tuple(small.shape)], threads)
        expected, spec_out = self._computed(leaves, spec)
        wanted = [leaf for leaf in expected if isinstance(leaf, Tensor)]
        found = run([leaf for leaf in leaves if isinstance(leaf, Tensor)])
        name = type(self.model).__name__
        if [tuple(one.shape) for one in found] != [tuple(one.shape) for one in wanted]:
            raise EngineError(f"{runtime.label} returns other shapes than {name} itself: not used.")
        worst = max((_difference(one, other) for one, other in zip(found, wanted, strict=True)), default=0.0)
        if not worst <= TOLERANCE:
            raise EngineError(
                f"{runtime.label} differs from {name} itself by {worst:.1e} of the largest output, allowed is "
                f"{TOLERANCE:.0e}: not used."
            )
        form = None
        if not (len(expected) == 1 and isinstance(expected[0], Tensor) and spec_out.is_leaf()):
            others = [None if isinstance(leaf, Tensor) else leaf for leaf in expected]
            places = [index for index, leaf in enumerate(expected) if isinstance(leaf, Tensor)]
            form = {"spec": treespec_dumps(spec_out), "places": places, "others": others}
        facts["checked"][f"{engine} {runtime.version()}"] = worst
        facts["form"] = form
        if all(bool(torch.isfinite(one).all()) and float(one.double().std()) > 0 for one in wanted if one.numel() > 1):
            with contextlib.suppress(OSError):  # a full disk costs another comparison next time, no more
                note_facts(folder, facts)
        self._say(f"{runtime.label}: differs from {name} itself by {worst:.0e} of the largest output")
        return form

    def _computed(self, leaves: list[Any], spec: Any) -> tuple[list[Any], Any]:
        """Return the model's own output, flat; what the call keeps in the model (tables of positions) may stay there.

        Raises:
            EngineError: The next would compute something else, because this one changed the model; it is as before. Or
                the call writes into its input.
        """
        watched, kept = Watched(self.model), Kept(self.model)
        expected, spec_out = self._ran(leaves, spec)
        if not watched.changed():
            return expected, spec_out
        watched = Watched(self.model)
        again = self._ran(leaves, spec)[0]
        if watched.changed() or not all(
            torch.equal(one, other) for one, other in zip(expected, again, strict=True) if isinstance(one, Tensor)
        ):
            kept.restore()
            raise self._changes("its own buffers or attributes")
        self._watched = watched
        return expected, spec_out

    @torch.no_grad()
    def _ran(self, leaves: list[Any], spec: Any) -> tuple[list[Any], Any]:
        """Run the model itself on copies of tensors.

        Raises:
            EngineError: It writes into them.
        """
        copies = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(copies, spec)
        output, spec_out = tree_flatten(self.eager(*args, **kwargs))
        for given, used in zip(leaves, copies, strict=True):
            if isinstance(given, Tensor) and _is_written(used, given):
                raise self._changes("its input")
        return output, spec_out

    def _changes(self, what: str) -> EngineError:
        self._stays_eager = self.engine == "auto"
        return EngineError(
            f"{type(self.model).__name__} changes {what} in each call, which an engine cannot: not used."
        )

    def _choose(self, leaves: list[Any], spec: Any, threads: int) -> tuple[Runner | None, Any]:
        """Time what is installed on this call, in turns, and take the fastest; eager unless one is clearly faster."""
        names = list(self.candidates or [name for name in installed() if name not in ("eager", "inductor")])
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        timed, shown = leaves, "x".join(map(str, tensors[0].shape))
        if len(leaves) == 1 and tensors[0].ndim == 4 and self._takes_any_size(tensors[0]):
            timed = [_middle(tensors[0], _TIMED_SIDE)]
        choice = digest(
            model=self._digest(),
            shapes=[tuple(leaf.shape) if isinstance(leaf, Tensor) else repr(leaf) for leaf in timed],
            threads=threads,
            versions=[(name, ENGINES[name].version()) for name in names],
            processor=processor_name(),
        )
        kept = engines_dir() / f"{choice}.json"
        before = _read_choice(kept)
        if before in (*names, "eager"):
            self._say(f"auto takes {before} for {shown} on {counted(threads, 'thread')}, as timed before")
            return self._obtain(before, leaves, spec, threads)
        calls: dict[str, Callable[[], object]] = {}
        args, kwargs = tree_unflatten(timed, spec)
        given = [leaf for leaf in timed if isinstance(leaf, Tensor)]
        refused: list[str] = []
        lasts = True
        for name in names:
            try:
                run = self._obtain(name, timed, spec, threads)[0]
            except (EngineError, ImportError, OSError) as error:
                refused.append(str(error).rstrip("."))
                lasts = lasts and not isinstance(error.__cause__ or error, OSError)  # a disk may be full for now only
                continue
            calls[name] = lambda run=run: run(given)  # type: ignore[misc]
        calls["eager"] = lambda: self.eager(*args, **kwargs)
        times = _in_turns(calls) if len(calls) > 1 else {"eager": 0.0}
        best = min(times, key=lambda name: times[name] * (1 if name == "eager" else _GAIN))
        figures = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in times.items() if seconds)
        figures = "; ".join(filter(None, [figures, *refused])) or "nothing else is installed"
        self._say(f"auto takes {best} for {shown} on {counted(threads, 'thread')} ({figures})")
        if lasts:
            with contextlib.suppress(OSError), whole(kept) as temporary:  # else it is timed again next time
                temporary.write_text(json.dumps({"engine": best, "figures": figures}), encoding="utf-8")
        return self._obtain(best, leaves, spec, threads)

    def _takes_any_size(self, image: Tensor) -> bool:
        sizes = self._open_sizes(image)
        return sizes is not None and len(sizes) > 1


def _not_kept(folder: Path, error: OSError) -> EngineError:
    return EngineError(
        f"Engines are kept in {folder}, which cannot be written ({error.strerror or error}): set ZOO_CACHE to a folder "
        "with space."
    )


def _read_form(form: dict[str, Any] | None) -> Any:
    return None if form is None else (treespec_loads(form["spec"]), form["places"], form["others"])


def _read_choice(path: Path) -> str:
    """Return the engine that was chosen before; nothing where none was."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["engine"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _again(model: nn.Module, engine: EngineName, arguments: dict[str, Any]) -> EngineCall:
    return EngineCall(model, engine, **arguments)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest expected value; values that are finite in neither are alike."""
    found, expected = found.double(), expected.double()
    known = torch.isfinite(expected)
    if not bool((torch.isfinite(found) == known).all()):
        return float("inf")
    if not bool(known.any()):
        return 0.0
    scale = expected[known].abs().max().clamp_min(1e-12)
    return float((found[known] - expected[known]).abs().max() / scale)


def _is_written(used: Tensor, given: Tensor) -> bool:
    """Tell whether a fresh copy of a tensor was written into; what is not a number stays that."""
    if not used.is_inference() and used._version:
        return True
    return not bool(((used == given) | (used != used)).all())


def _middle(image: Tensor, side: int) -> Tensor:
    """Cut the middle out of an image, sides rounded to 64 pixels, which every network takes."""
    height, width = (min(size, side) for size in image.shape[-2:])
    if (height, width) == tuple(image.shape[-2:]):
        return image
    height, width = ((size // 64 * 64) or own for size, own in zip((height, width), image.shape[-2:], strict=True))
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[..., top : top + height, left : left + width].contiguous()


@torch.no_grad()
def _in_turns(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the shortest time of each call, seconds: a busy machine only lengthens."""
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    start = time.perf_counter()
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - begin)
        if time.perf_counter() - start > _SECONDS:
            break
    return best


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch use so many CPU threads within a `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
