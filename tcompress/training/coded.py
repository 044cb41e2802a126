"""Training through codes: what is learnt is what the codes make of it, not what they are to be rounded from."""

from __future__ import annotations

from torch import nn

from tcompress.training.factors import coded, see_codes

_EVERY = 5  # steps between two looks at the scales, each of which costs about as much as a step


class ThroughCodes:
    """Scales that follow the values of a model's coded factors while these are trained."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._waits = model, False
        see_codes(model)  # at once: a state that a run goes on from has them

    def begin(self, *, anew: bool, waits: bool) -> None:
        """Let factors be what their codes make of them, from now on; or, if that waits, what they are.

        anew: whether the scales are to be taken from the values as they are now, which a run that goes on has done.
        """
        if waits != self._waits:
            self._waits = waits
            for factor in coded(self._model):
                factor.is_rounded = not waits
        if anew and not waits:
            see_codes(self._model)

    def begin_step(self, step: int) -> None:
        """Take the scales anew where it is time to; by the number of the step alone, so that a run can go on."""
        if step % _EVERY == 0 and not self._waits:
            see_codes(self._model)


def through_codes(model: nn.Module, *, asked: bool) -> ThroughCodes | None:
    """Return what follows the codes of a model's factors; None where nobody asked, or none are stored as codes."""
    return ThroughCodes(model) if asked and coded(model) else None
