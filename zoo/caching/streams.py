"""What a block of a denoiser takes and returns: which part of its output stands for which of its arguments.

Found from one call of the block: a tensor that it returns replaces the argument that it is, or that has its name in the
block's `return` statement, or its shape. Tuples, lists, dictionaries and dataclasses are looked into.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["PlacedBlock", "Slot", "UnitOutput", "View", "leaves", "rebuilt", "tensors", "version"]

Path = tuple[Any, ...]

_SECONDARY = re.compile(r"enc|text|txt|context|cond|caption|prompt|audio|sound|emb$|residual|mask|time|adaln")


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield what is in nested tuples, lists, mappings and dataclasses, each with the keys that lead to it."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from leaves(each, (*path, key))
    elif isinstance(value, tuple | list):
        for index, each in enumerate(value):
            yield from leaves(each, (*path, index))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), (*path, field.name))
    else:
        yield path, value


def tensors(value: Any) -> list[tuple[Path, Tensor]]:
    """Return the tensors among the leaves."""
    return [(path, leaf) for path, leaf in leaves(value) if isinstance(leaf, Tensor)]


def version(tensor: Tensor) -> int | None:
    """Return how often a tensor was changed in place; None where that is not counted, in inference mode."""
    return None if tensor.is_inference() else tensor._version


def rebuilt(value: Any, new: Mapping[Path, Any], path: Path = ()) -> Any:
    """Return nested containers like `value` with other leaves, those without a new one as they are.

    Args:
        value: As for `leaves`.
        new: Leaves by the keys that lead to them.
        path: Keys that lead to `value` itself.
    """
    if isinstance(value, Mapping):
        changed: Any = copy.copy(value)
        for key, each in value.items():
            changed[key] = rebuilt(each, new, (*path, key))
        return changed
    if isinstance(value, tuple | list):
        parts = [rebuilt(each, new, (*path, index)) for index, each in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = copy.copy(value)
        for field in dataclasses.fields(value):
            own = rebuilt(getattr(value, field.name), new, (*path, field.name))
            object.__setattr__(changed, field.name, own)  # also where it is frozen
        return changed
    return new.get(path, value)


@lru_cache(maxsize=512)
def _returned_names(cls: Any) -> tuple[str | None, ...]:
    """Return the names in the last `return` of a forward: of the one value, or of each of a tuple."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls.forward)))
    except (OSError, TypeError, SyntaxError):
        return ()
    found = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value is not None]
    if not found:
        return ()
    last = found[-1]
    parts = last.elts if isinstance(last, ast.Tuple) else [last]
    return tuple(part.id if isinstance(part, ast.Name) else None for part in parts)


class Slot(NamedTuple):
    """A stream of a block: the keys that lead to it in what the block returns and in what it takes."""

    returned: Path
    taken: Path

    @property
    def is_secondary(self) -> bool:
        """Whether it is named like text, conditions or sound rather than like the image."""
        names = [key for key in self.taken if isinstance(key, str)]
        return bool(names and _SECONDARY.search(names[-1]))


class View(NamedTuple):
    """The part of a block's output that the model needs.

    Args:
        slots: Their numbers.
        part: "all" tokens of the stream, or the "last" or "first" so many: an image in one sequence with its text.
    """

    slots: tuple[int, ...]
    part: str = "all"


class PlacedBlock:
    """A block of a model, and how its arguments and results are read.

    Args:
        path: Where it is in the model.
        module: The block.
        group: The list that it is of.
        image: Argument with the image stream; None finds it.
        text: Argument with the text stream; None finds it.
        returns: What it returns, as for `BlockList`; None finds it.
    """

    def __init__(
        self,
        path: str,
        module: nn.Module,
        group: str = "",
        image: str | None = None,
        text: str | None = None,
        returns: str | None = None,
    ) -> None:
        self.path = path
        self.module = module
        self.group = group
        self.slots: list[Slot] | None = None
        self.unmapped: str | None = None  # why the block cannot be passed through
        self._broadcast: set[int] = set()  # streams that were given once for the whole batch
        self._skeleton: Any = None
        parameters = inspect.signature(type(module).forward).parameters.values()
        self._names = [
            each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
        ][1:]
        known = {each.name for each in parameters} | {"*" for each in parameters if each.kind == each.VAR_KEYWORD}
        if returns is None:
            return
        order = [image, text] if returns == "image, text" else [text, image] if returns == "text, image" else [image]
        for name in order:
            if name not in known and "*" not in known:
                raise ValueError(
                    f"Blocks of class {type(module).__name__} take no {name}, as those of its model should."
                )
        single = len(order) == 1
        self._skeleton = None if single else (None, None)
        self.slots = [Slot(() if single else (at,), (name,)) for at, name in enumerate(order)]

    def _arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[Any, Any]:
        """Return arguments by name, those without one by position."""
        return {self._names[at] if at < len(self._names) else at: value for at, value in enumerate(args)} | dict(kwargs)

    def _take(self, path: Path, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the argument, or the part of one, that keys lead to."""
        root = path[0]
        value = kwargs[root] if root in kwargs else args[root if isinstance(root, int) else self._names.index(root)]
        for key in path[1:]:
            value = getattr(value, key) if dataclasses.is_dataclass(value) else value[key]
        return value

    def learn(self, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """Find the streams from a call; what was found or given before stays."""
        if self.slots is not None:
            return
        taken = tensors(self._arguments(args, kwargs))
        names = _returned_names(type(self.module))  # type: ignore[arg-type]  # classes are hashable
        returned = tensors(output)
        slots: list[Slot] = []
        for path, tensor in returned:
            place = path[0] if path and isinstance(path[0], int) else 0
            hint = names[place] if len(path) <= 1 and place < len(names) else None
            if path and isinstance(path[-1], str):
                hint = path[-1]
            own = _match(tensor, hint, [pair for pair in taken if all(slot.taken != pair[0] for slot in slots)])
            if own is None:
                self.unmapped = (
                    f"{type(self.module).__name__} returns a {tuple(tensor.shape)} that is none of its inputs"
                )
            else:
                given = next(each for path, each in taken if path == own)
                if given.shape != tensor.shape:
                    self._broadcast.add(len(slots))
                slots.append(Slot(path, own))
        if not returned:
            self.unmapped = f"{type(self.module).__name__} returns no tensor"
        self._skeleton = rebuilt(output, {path: None for path, _ in returned})
        self.slots = slots

    def order(self) -> list[int]:
        """Return the numbers of the streams, that of the image first, as far as names tell."""
        slots = self.slots or []
        return sorted(range(len(slots)), key=lambda at: slots[at].is_secondary)

    def _pack(self, streams: Sequence[Any]) -> Any:
        slots = self.slots or []
        if len(slots) == 1 and not slots[0].returned:
            return streams[0]
        return rebuilt(self._skeleton, {slot.returned: stream for slot, stream in zip(slots, streams, strict=True)})

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the streams as they come in, one prompt for all images of a batch as often as there are images."""
        streams = [self._take(slot.taken, args, kwargs) for slot in self.slots or []]
        for at in self._broadcast:
            batch = max(len(stream) for stream in streams)
            streams[at] = streams[at].expand(batch, *streams[at].shape[1:])
        return streams

    def streams(self, output: Any) -> list[Any]:
        """Return the streams of what the block returned; None where it dropped one."""
        found = dict(leaves(output))
        return [found.get(slot.returned) for slot in self.slots or []]

    def passed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what a block that changes nothing would return."""
        return self._pack(self.inputs(args, kwargs))

    def feature(self, output: Any, view: View, tokens: int | None = None) -> Tensor:
        """Return the part of the output that is forecast; several streams as one flat tensor a sample.

        Args:
            output: What the block returned.
            view: Which part.
            tokens: Length of the image stream in one sequence with text.
        """
        streams = self.streams(output)
        if len(view.slots) > 1:
            return torch.cat([streams[at].flatten(1) for at in view.slots], dim=1)
        stream: Tensor = streams[view.slots[0]]
        if view.part == "all" or tokens is None:
            return stream
        return stream[:, -tokens:] if view.part == "last" else stream[:, :tokens]

    def replaced(self, feature: Tensor, view: View, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the inputs in the form of the outputs, the part that is forecast replaced."""
        streams = self.inputs(args, kwargs)
        if len(view.slots) > 1:
            sizes = [streams[at][0].numel() for at in view.slots]
            for at, part in zip(view.slots, feature.split(sizes, dim=1), strict=True):
                streams[at] = part.view_as(streams[at])
            return self._pack(streams)
        at, tokens = view.slots[0], feature.shape[1] if feature.ndim > 1 else 0
        if view.part == "all":
            streams[at] = feature
        elif view.part == "last":
            streams[at] = torch.cat([streams[at][:, : streams[at].shape[1] - tokens], feature], dim=1)
        else:
            streams[at] = torch.cat([feature, streams[at][:, tokens:]], dim=1)
        return self._pack(streams)

    def change(self, output: Any, before: Sequence[Any]) -> tuple[Tensor | None, ...]:
        """Return what the block has added to each stream; None to those that it dropped.

        Args:
            output: What it returned.
            before: The streams as they came in.
        """
        pairs = zip(self.streams(output), before, strict=True)
        return tuple(None if after is None else after - came for after, came in pairs)

    def changed(self, change: Sequence[Tensor | None], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the inputs in the form of the outputs, a stored `change` added."""
        pairs = zip(self.inputs(args, kwargs), change, strict=True)
        return self._pack([None if added is None else before + added for before, added in pairs])


class UnitOutput:
    """Take the output of a unit apart into tensors, and put it together again.

    Args:
        block: Where the unit is a whole block, whose parts are what it adds to its streams.
        copies: The block may change its inputs in place. Otherwise that is found out, at the loss of one call.
    """

    def __init__(self, block: PlacedBlock | None, copies: bool = False) -> None:
        self._block = block
        self._forms: dict[int, tuple[Any, list[Path]]] = {}  # by call in a step: containers, and keys of the tensors
        self._copies = copies

    def before(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Look at the arguments before the unit is called."""
        if self._block is None:
            return None
        if self._copies:
            copied = {path: tensor.clone() for path, tensor in tensors((args, kwargs))}
            return rebuilt((args, kwargs), copied)
        return [(tensor, version(tensor)) for _, tensor in tensors((args, kwargs))]

    def parts(
        self, output: Any, call: int, args: Sequence[Any], kwargs: Mapping[str, Any], before: Any
    ) -> list[Tensor | None]:
        """Return the parts of an output that can be reused; none where it cannot be.

        Args:
            output: What the unit returned.
            call: Calls of it before in the same step.
            args: Of the call.
            kwargs: Of the call.
            before: What `before` returned.
        """
        block = self._block
        if block is None:
            found = tensors(output)
            paths = [path for path, _ in found]
            self._forms[call] = (None if paths == [()] else rebuilt(output, dict.fromkeys(paths)), paths)
            return [tensor for _, tensor in found]
        block.learn(args, kwargs, output)
        if block.unmapped is not None:
            return []
        if self._copies:
            return list(block.change(output, block.inputs(*before)))
        inputs = block.inputs(args, kwargs)
        returned = {id(stream) for stream in block.streams(output)}
        if any(version(tensor) != was for tensor, was in before) or any(id(each) in returned for each in inputs):
            self._copies = True  # what came in is lost: nothing to store this time
            return []
        return list(block.change(output, inputs))

    def assembled(
        self, parts: Sequence[Tensor | None], call: int, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Return what the unit would return, from its parts; arguments as for `parts`."""
        if self._block is not None:
            return self._block.changed(parts, args, kwargs)
        skeleton, paths = self._forms[call]
        return parts[0] if paths == [()] else rebuilt(skeleton, dict(zip(paths, parts, strict=True)))


def _match(tensor: Tensor, hint: str | None, taken: Sequence[tuple[Path, Tensor]]) -> Path | None:
    """Return the argument that a returned tensor stands for."""
    for path, each in taken:
        if each is tensor:
            return path
    real = [(path, each) for path, each in taken if each.is_floating_point()]
    alike = [path for path, each in real if each.shape == tensor.shape]
    if not alike and tensor.ndim > 1:  # one prompt for all images of a batch
        alike = [path for path, each in real if len(each) == 1 and each.shape[1:] == tensor.shape[1:]]
    for path in alike:
        if hint in path:
            return path
    return min(alike, key=lambda path: Slot((), path).is_secondary, default=None)
