"""Figures in a manifest: rounded up, never down, and never longer than the room that a header keeps for them."""

from __future__ import annotations

import math

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tcompress.checkpoint.dtypes import BY_NAME
from tcompress.checkpoint.layers import LayerKind
from tcompress.checkpoint.manifest import Entry, Factor, Manifest, compact_json, figure

sane = st.floats(min_value=0, max_value=1.797693e308)


@settings(max_examples=400)
@given(sane)
@example(0.0)
@example(5e-324)
@example(0.1)
@example(1 / 3)
@example(0.9999999999)
@example(9999999.5)
@example(1.0000001)
@example(1.234567e15)
@example(2.0**-1022)
def test_a_figure_is_never_rounded_down_and_hardly_up(value):
    assert value <= figure(value) <= value * (1 + 1.0001e-6) + 5e-324
    assert figure(figure(value)) == figure(value)


@settings(max_examples=400)
@given(sane)
@example(9.999999e15)
@example(1.234567e-300)
def test_no_figure_is_longer_than_the_room_that_is_reserved_for_it(value):
    number = figure(value)
    entry = Entry("svd", {}, LayerKind.LINEAR, (6, 4), BY_NAME["float32"], number, number, {"left": Factor("dense")})
    manifest = Manifest("w", layers={"fc": entry})
    assert len(compact_json(manifest.to_json())) <= len(compact_json(manifest.reserved().to_json()))


@settings(max_examples=200)
@given(st.floats(min_value=1e-99, max_value=9.9e10))
def test_figures_of_usual_size_have_at_most_13_characters(value):
    assert len(repr(figure(value))) <= 13
    assert math.isfinite(figure(value))
