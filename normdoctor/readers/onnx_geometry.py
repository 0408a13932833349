"""Strides, dilations and pads of ONNX's Conv and ConvTranspose, their automatic ones worked out.

By https://onnx.ai/onnx/operators/onnx__Conv.html and onnx__ConvTranspose.html.
"""

from __future__ import annotations

from collections.abc import Sequence

from normdoctor.readers.geometry import Geometry, Pads, halves, per_axis, reach
from normdoctor.readers.onnx_builder import Builder
from normdoctor.readers.onnx_graph import Step


def convolution(b: Builder, step: Step, kernel: Sequence[int]) -> Geometry:
    count = len(kernel)
    strides, dilations = _numbers(b, step, "strides", count, 1, 1), _numbers(b, step, "dilations", count, 1, 1)
    auto = _auto(b, step)
    if not auto.startswith("SAME"):
        return Geometry(strides, dilations, _written(b, step, count, auto))
    if strides is None or dilations is None:
        return Geometry(strides, dilations, None)
    found = []
    for length, stride, dilation, taps in zip(_lengths(b, step, count), strides, dilations, kernel, strict=True):
        if length is None and stride != 1:
            return Geometry(strides, dilations, None)
        # As many outputs as strides begin within the input.
        covered = 0 if length is None else (-(-length // stride) - 1) * stride + 1 - length
        found.append(halves(covered + reach(taps, dilation) - 1, more_after=auto == "SAME_UPPER"))
    return Geometry(strides, dilations, tuple(found))


def transposed(b: Builder, step: Step, kernel: Sequence[int]) -> Geometry:
    count = len(kernel)
    strides, dilations = _numbers(b, step, "strides", count, 1, 1), _numbers(b, step, "dilations", count, 1, 1)
    added = _numbers(b, step, "output_padding", count, 0, 0)
    auto = _auto(b, step)
    told = b.program.integers(step, "output_shape", None)
    if strides is None or dilations is None or added is None:
        return Geometry(strides, dilations, None)
    if told is None and not auto.startswith("SAME"):
        pads = _written(b, step, count, auto)
        if pads is not None:
            pads = tuple((before, after - more) for (before, after), more in zip(pads, added, strict=True))
        return Geometry(strides, dilations, pads)
    wanted = None if told is None else per_axis(told[-count:], count, 1)
    if told is not None and (wanted is None or len(told) not in (count, count + 2)):
        return Geometry(strides, dilations, None)
    found = []
    for axis, length in enumerate(_lengths(b, step, count)):
        spare = reach(kernel[axis], dilations[axis]) - strides[axis]  # of an output as long as the strides of all
        if wanted is not None:
            if length is None:
                return Geometry(strides, dilations, None)
            spare += length * strides[axis] - wanted[axis]
        if spare + added[axis] < 0:  # runtimes and standard do not agree on the length of the output
            return Geometry(strides, dilations, None)
        before = halves(spare + added[axis], more_after=auto == "SAME_UPPER")[0]
        found.append((before, spare - before))
    return Geometry(strides, dilations, tuple(found))


def _auto(b: Builder, step: Step) -> str:
    return b.program.text(step, "auto_pad", "NOTSET") or "NOTSET"


def _numbers(b: Builder, step: Step, name: str, count: int, default: int, least: int) -> tuple[int, ...] | None:
    found = b.program.integers(step, name, None)
    return (default,) * count if found is None else per_axis(found, count, least)


def _written(b: Builder, step: Step, count: int, auto: str) -> Pads | None:
    """The pads that the node has: all those before, then all after."""
    if auto == "VALID":
        return ((0, 0),) * count
    numbers = _numbers(b, step, "pads", 2 * count, 0, 0)
    if numbers is None or auto != "NOTSET":
        return None
    return tuple(zip(numbers[:count], numbers[count:], strict=True))


def _lengths(b: Builder, step: Step, count: int) -> list[int | None]:
    """Of the spatial axes of the input."""
    x = b.at(step, 0)
    shape = x.shape if x is not None and x.shape is not None and len(x.shape) == count + 2 else (None,) * (count + 2)
    return [length if isinstance(length, int) and length > 0 else None for length in shape[2:]]
