"""Factors that stay as they lie on disk until they are used: bits, codes and scales in place of values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tcompress.encodings import Coding
from tcompress.errors import UsageError
from tcompress.formats import Format
from tcompress.formats.base import Factorization, Shape
from tcompress.formats.pattern import Pattern


class Maker(nn.Module):
    """A module that, called without arguments, returns one factor, of its ``shape``."""

    shape: Shape

    @property
    def is_placed(self) -> bool:
        """Whether it is values, at places that stay, between zeros."""
        return False

    def pattern(self) -> Pattern:
        """Return the places of a factor that has them."""
        raise NotImplementedError(f"{type(self).__name__} has no places")

    def at_places(self) -> Tensor:
        """Return the values there, (values,)."""
        raise NotImplementedError(f"{type(self).__name__} has no places")


class Packed(Maker):
    """One factor in its coding. Parts are buffers, but for values that are floating numbers: those are parameters.

    Scales and codes keep their types when the model is cast: the values that they make are cast instead.
    """

    def __init__(self, coding: Coding, parts: Mapping[str, Tensor], shape: Shape) -> None:
        super().__init__()
        self.coding, self.shape = coding, shape
        for name, part in parts.items():
            if coding.values is None and name == coding.held.part_names[0]:
                self.register_parameter(name, nn.Parameter(part))
            else:
                self.register_buffer(name, part)

    def parts(self) -> dict[str, Tensor]:
        """Return the parts by name."""
        return {name: getattr(self, name) for name in self.coding.part_names}

    def forward(self) -> Tensor:
        """Return the factor."""
        parts = self.parts()
        values = parts[self.coding.part_names[0]]
        if values.device.type != "cpu" or values.requires_grad or torch.compiler.is_compiling():
            return self.coding.unpack(parts, self.shape)
        return self.coding.decode(parts, self.shape)  # the same, sooner: NumPy is quick at finding bits

    def __getstate__(self) -> dict[str, Any]:
        # Pickles of torch's unsigned 16 bits cannot be read; no part is of signed ones.
        return {**self.__dict__, "_buffers": _viewed(self._buffers, torch.uint16, torch.int16)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        buffers = _viewed(state["_buffers"], torch.int16, torch.uint16)
        super().__setstate__({**state, "_buffers": buffers})  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        codes = {id(buffer) for buffer in self.buffers(recurse=False)}  # not the gradient of values, which is cast

        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return tensor.to(found.device) if id(tensor) in codes and found.dtype != tensor.dtype else found

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self


Held = nn.Parameter | Maker


class PackedFactorization(Factorization):
    """A factorization whose factors are unpacked, or cast, for each use.

    setting: the format. stored: every factor's name, as the format has it, and what holds it.
    """

    def __init__(self, setting: Format, shape: Shape, stored: Mapping[str, Held]) -> None:
        super().__init__()
        self.shape = shape
        self.names = tuple(stored)
        sizes = {name: held.shape for name, held in stored.items()}
        skeleton = setting.load(shape, {name: torch.empty(size, device="meta") for name, size in sizes.items()})
        patterns = {name: held.pattern for name, held in stored.items() if isinstance(held, Maker) and held.is_placed}
        skeleton, self.placed = skeleton.on_places(patterns)
        self._skeleton = (skeleton.requires_grad_(False),)  # in a tuple: its parameters are nobody's
        for name, held in stored.items():
            _attach(self, name, held)

    def reconstruct(self) -> Tensor:
        return self.run("reconstruct", torch.float32)

    def unpacked(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the factors in a type."""
        return {name: held.to(dtype) for name, held in held_values(self, self.names)}

    def run(self, operation: str, dtype: torch.dtype, *inputs: Tensor, **geometry: Any) -> Tensor:
        """Run an operation of the factorization with factors of a type."""
        given = {name: held.to(dtype) for name, held in held_values(self, self.names, self.placed)}
        result: Tensor = functional_call(self._skeleton[0], given, (operation, *inputs), geometry)
        return result

    def linear(self, x: Tensor) -> Tensor:
        return self.run("linear", x.dtype, x)

    def conv(self, x: Tensor, **geometry: Any) -> Tensor:
        return self.run("conv", x.dtype, x, **geometry)

    def embedding(self, ids: Tensor) -> Tensor:
        return self.run("embedding", torch.float32, ids)


def assemble(setting: Format, shape: Shape, stored: Mapping[str, Held], dtype: torch.dtype) -> Factorization:
    """Return the factorization that these factors make, holding the very objects, for a layer that computes in a type.

    Raises FormatError when they do not make the shape.
    """
    plain = {name: held for name, held in stored.items() if isinstance(held, nn.Parameter) and held.dtype == dtype}
    if len(plain) < len(stored):
        return PackedFactorization(setting, shape, stored)
    found = setting.load(shape, plain)
    for name, parameter in plain.items():  # load() made others of them
        parent, _, last = name.rpartition(".")
        found.get_submodule(parent).register_parameter(last, parameter)
    return found


def in_type(factors: Factorization, setting: Format, dtype: torch.dtype) -> Factorization:
    """Return the factorization with all factors unpacked and in a type, without gradients; itself if it is that."""
    if isinstance(factors, PackedFactorization):
        found = setting.load(factors.shape, {name: f.detach() for name, f in factors.unpacked(dtype).items()})
        return found.requires_grad_(False)
    if is_in_type(factors, dtype):
        return factors
    named = factors.named_parameters(remove_duplicate=False)
    found = setting.load(factors.shape, {name: parameter.detach().to(dtype) for name, parameter in named})
    return found.requires_grad_(False)


def is_in_type(factors: Factorization, dtype: torch.dtype) -> bool:
    """Tell whether all factors are at hand in a type, so that nothing is to be unpacked or cast."""
    return not isinstance(factors, PackedFactorization) and all(f.dtype == dtype for f in factors.parameters())


def weight_of(factors: Factorization, dtype: torch.dtype) -> Tensor:
    """Return the dense weight as decompression computes it, in a wide type; with gradients where they are recorded."""
    if isinstance(factors, PackedFactorization):
        return factors.run("reconstruct", dtype)
    if is_in_type(factors, dtype):
        return factors.reconstruct()
    wide = {name: parameter.to(dtype) for name, parameter in factors.named_parameters(remove_duplicate=False)}
    result: Tensor = functional_call(factors, wide, ("reconstruct",))
    return result


def stored_in(factors: Factorization) -> dict[str, nn.Parameter | Packed]:
    """Return every factor's name and what holds it. Raises UsageError for factors that are not as they are stored."""
    found = held_in(factors)
    stored = {name: held for name, held in found.items() if isinstance(held, nn.Parameter | Packed)}
    if len(stored) < len(found):
        raise UsageError("its factors are being trained, and are stored only when that is done")
    return stored


def held_in(factors: Factorization) -> dict[str, Held]:
    """Return every factor's name and what holds it, stored or not."""
    if isinstance(factors, PackedFactorization):
        return {name: _held(factors, name) for name in factors.names}
    return dict(factors.named_parameters(remove_duplicate=False))


def held_values(root: nn.Module, names: tuple[str, ...], placed: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and values of factors; placed: those of which the values at places alone are wanted."""
    for name in names:
        held = _held(root, name)
        if isinstance(held, nn.Parameter):
            yield name, held
        else:
            yield name, held.at_places() if name in placed else held()


def _viewed(tensors: Mapping[str, Tensor | None], old: torch.dtype, new: torch.dtype) -> dict[str, Tensor | None]:
    return {name: t.view(new) if t is not None and t.dtype == old else t for name, t in tensors.items()}


def _held(root: nn.Module, name: str) -> Held:
    parent, _, last = name.rpartition(".")
    found: Held = getattr(root.get_submodule(parent), last)
    return found


def _attach(root: nn.Module, name: str, held: Held) -> None:
    """Put a factor where its dotted name says, so that state dicts name it as the format does."""
    *parents, last = name.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    if isinstance(held, nn.Parameter):
        root.register_parameter(last, held)
    else:
        root.add_module(last, held)
