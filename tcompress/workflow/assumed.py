"""What is assumed of inputs that no data show: beside one another, the inputs of a convolution are alike.

Letters: k = the sizes of a kernel; G = the second moment of one channel's input under the kernel, (prod k, prod k).

Pictures and sounds are smooth, and so is what layers make of them. So an error that adds up over a kernel costs more
than one of equal size that changes its sign from place to place, and a fit can move errors from the one to the other.
The model is the oldest one of pictures, a Markov process along each axis (A. Habibi, P. Wintz, "Image coding by linear
transformation and block quantization", 1971): two places that lie d steps apart have the correlation 0.6^d. Pictures
have 0.9 from one pixel to the next, the features inside a network 0.4 to 0.9, the less the deeper and the smaller they
are. Channels are taken to have nothing in common.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tcompress.checkpoint.layers import Layer, LayerKind
from tcompress.errors import UsageError
from tcompress.formats.metric import PLAIN, Metric

SMOOTH = "smooth"
PLAIN_INPUTS = "plain"
INPUTS = (SMOOTH, PLAIN_INPUTS)  # by their names on the command line; plans say the first alone
_NEIGHBOURS = 0.6  # their correlation


def check_inputs(inputs: str | None, *, are_known: bool) -> None:
    """Raise UsageError for what is nothing to assume of inputs, and where data show what they are."""
    if inputs is not None and inputs not in INPUTS:
        raise UsageError(f"--inputs: {inputs!r} is none of {', '.join(INPUTS)}")
    if inputs is not None and are_known:
        raise UsageError("--inputs says what is assumed where no data show the inputs; leave it out beside those")


def assumed_metric(layer: Layer, inputs: str | None) -> Metric:
    """Return which errors of a layer count if its inputs are ``smooth``: of all but convolutions, all alike."""
    kernel = layer.shape[2:] if layer.kind is LayerKind.CONV else ()
    if inputs != SMOOTH or math.prod(kernel) == 1:
        return PLAIN
    gram = torch.ones(1, 1, dtype=torch.float64)
    for size in kernel:
        gram = torch.kron(gram, _along(size))
    return Metric(gram.float())


def _along(size: int) -> Tensor:
    places = torch.arange(size, dtype=torch.float64)
    return _NEIGHBOURS ** (places[:, None] - places).abs()
