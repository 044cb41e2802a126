"""How a long run says where it is: one call a step, to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tcompress.checkpoint.layers import Layer


@dataclass(frozen=True)
class Step:
    """Layer ``position`` of ``count`` is about to begin; bytes are dense bytes."""

    task: str
    position: int
    count: int
    layer: str
    done_bytes: int
    total_bytes: int


Progress = Callable[[Step], None]


def silent(step: Step) -> None:
    """Show nothing."""
    del step


def steps(task: str, layers: Iterable[Layer], progress: Progress) -> Iterator[Layer]:
    """Yield the layers, telling ``progress`` before each one and once at the end."""
    chosen = list(layers)
    done, total = 0, sum(layer.dense_bytes for layer in chosen)
    for position, layer in enumerate(chosen, start=1):
        progress(Step(task, position, len(chosen), layer.name, done, total))
        yield layer
        done += layer.dense_bytes
    progress(Step(task, len(chosen), len(chosen), "", total, total))
