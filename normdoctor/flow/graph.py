"""A small neutral dataflow graph around the norms: the same for ONNX, .pt2 and live modules.

Builders translate each operator of a format into an `Op` once; everything that moves through the graph (affine
maps, moments) is taught per `Op` once. A graph is flat: the bodies of If and Loop lie in it beside the main graph,
and a value that a body takes from outside is the same `Value` there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from normdoctor.layers import ArrayRef, NormLayer

Shape = tuple[int | str | None, ...]
"""Lengths per axis. A name (batch, s0) where the length depends on the input, the same length wherever it has that
name; None where nothing is known of it."""


class Op(Enum):
    """What a node computes. `Node.inputs` and `Node.attributes` are as said here; x is the data.

    Attributes that are not given have the value after the equals sign. Axes are never negative."""

    CONV = "convolution"
    """(x, weight, bias|None). weight (out, in/groups, *kernel). groups=1; padded: bool, whether zeros (or anything
    that is not x) can be seen at the border. Per spatial axis, each None where it is not known: strides and dilations,
    tuples of int; pads, a tuple of (before, after): the zeros."""
    CONV_TRANSPOSE = "transposed convolution"
    """(x, weight, bias|None). weight (in, out/groups, *kernel). groups=1; padded as it affects the output: whether
    any output sees fewer taps than another (False only where every kernel length, and so every stride, is 1). strides,
    dilations and pads as of CONV; pads are cut off the output, (before, after) with the output padding taken off."""
    MATMUL = "matrix product"
    """(a, b, bias|None): alpha * a @ b + beta * bias, with numpy's broadcasting. transpose_a=False,
    transpose_b=False (of the last two axes); alpha=1.0, beta=1.0. takes_bias: whether the operator itself has a
    place for a bias (Gemm, linear, addmm) or an addition must follow it (MatMul)."""
    BATCH_NORM = "BatchNorm"
    """(x, weight|None, bias|None, running_mean|None, running_var|None); channels are axis 1. eps: float;
    training: bool, whether it normalises with the statistics of the batch."""
    LAYER_NORM = "LayerNorm"
    """(x, weight|None, bias|None) over the last axes, as many as weight has dimensions. rms=False."""
    OTHER_NORM = "other norm"
    """GroupNorm, InstanceNorm and their like: (x, weight|None, bias|None)."""
    ADD = "addition"
    SUBTRACT = "subtraction"
    MULTIPLY = "multiplication"
    DIVIDE = "division"
    """Elementwise with broadcasting: (a, b)."""
    POWER = "power"
    """(a, b)."""
    NEGATE = "negation"
    SQRT = "square root"
    RSQRT = "reciprocal square root"
    RECIPROCAL = "reciprocal"
    """(x)."""
    ACTIVATION = "activation"
    """(x, ...). name: relu, relu6, clip, leaky_relu, prelu, hardswish, silu, gelu, gelu_tanh, sigmoid, tanh, elu, ...;
    alpha, low, high where the activation has them; homogeneous: bool, f(s*x) = s*f(x) for every s >= 0."""
    MAX_POOL = "max-pooling"
    """(x). Over the spatial axes, padding never wins. Global and adaptive ones too."""
    AVERAGE_POOL = "average pooling"
    """(x). counts_padding: bool, whether zeros at the border enter any mean, or a divisor is not the number of
    elements. Global and adaptive ones too."""
    REDUCE_MEAN = "mean"
    REDUCE_MAX = "maximum"
    REDUCE_SUM = "sum"
    """(x). axes: tuple; keepdims: bool."""
    CONCAT = "concatenation"
    """(x0, x1, ...). axis."""
    SPLIT = "split"
    """(x) → several outputs in order along axis; together they are all of x. axis."""
    SLICE = "slice"
    """(x). axis, start, end, step: along one axis; start and end within the length (None: unknown)."""
    PAD = "padding"
    """(x). mode: constant, reflect, edge, wrap; value=0.0; axes: tuple of the axes that are padded; pads:
    (before, after) of each of them, None where not known."""
    TRANSPOSE = "transposition"
    """(x). order: output axis i is input axis order[i]."""
    RESHAPE = "reshape"
    """(x). The same elements in the same order under the shape of the output: Flatten, Squeeze, Unsqueeze, view."""
    EXPAND = "expansion"
    """(x). Broadcast to the shape of the output (leading axes may be new)."""
    TILE = "repetition"
    """(x). axes: tuple of the axes that are repeated as a whole."""
    RESIZE = "resizing"
    """(x). Every output is a mean of inputs at other places of the same channel, its weights sum to one.
    axes: tuple of the axes whose length changes."""
    DEPTH_TO_SPACE = "depth to space"
    """(x) (N, C, H, W). block: int; order: DCR (ONNX's default) or CRD (torch's pixel_shuffle)."""
    IDENTITY = "identity"
    """(x). Identity, Dropout in eval mode, contiguous, alias, a call that hands its input on. dropout: the probability
    that it has in training, where it is a dropout that says it."""
    CAST = "cast"
    """(x). To the dtype of the output."""
    SHAPE = "shape of a value"
    """(x) → its lengths as integers. Asking for a shape is no use of the values."""
    CONSTANT = "constant"
    """() → what `Value.array` says."""
    FILL = "constant of a shape"
    """(shape). value: float."""
    GATHER = "gather"
    """(x, indices). axis."""
    QUANTIZE = "quantisation"
    DEQUANTIZE = "dequantisation"
    OTHER = "other"


@dataclass(eq=False)
class Value:
    """What flows along an edge: data, or a constant."""

    name: str
    shape: Shape | None = None
    """None where not even the number of axes is known."""
    dtype: str | None = None
    """torch's name of the element type."""
    array: ArrayRef | None = None
    """The stored tensor: an initializer, a parameter, a buffer, a literal."""
    producer: Node | None = None
    """None for inputs and for stored tensors."""
    uses: list[Use] = field(default_factory=list)
    is_output: bool = False
    """Whether it leaves the network (or the body of an If or Loop), so that its values are promised to somebody."""

    def __repr__(self) -> str:
        return f"Value({self.name!r}, {self.shape})"


class Use(NamedTuple):
    """Node and index of the input that takes a value."""

    node: Node
    slot: int


class Fixed(NamedTuple):
    """Why a node can be neither changed nor removed."""

    code: str
    sentence: str


@dataclass(eq=False)
class Node:
    """One operator at one place in the graph."""

    op: Op
    inputs: list[Value | None]
    outputs: list[Value]
    attributes: dict[str, Any] = field(default_factory=dict)
    written: str = ""
    """The operator as the file or the code has it: Conv, BatchNormalization, aten.conv2d."""
    label: str = ""
    """What a reader would call it: the path of the module, the name of its weight, or of its output."""
    fixed: Fixed | None = None
    """Not None: its parameters must stay and it cannot be taken out (shared or computed in code, quantised)."""
    site: Any = None
    """What its builder needs to find it again."""
    layer: NormLayer | None = None
    """The layer that a norm is, where a reader listed it."""

    @property
    def x(self) -> Value:
        """The data input."""
        value = self.inputs[0]
        assert value is not None
        return value

    @property
    def y(self) -> Value:
        """The (first) output."""
        return self.outputs[0]

    def given(self, slot: int) -> Value | None:
        """The input at `slot`; None where it is absent."""
        return self.inputs[slot] if slot < len(self.inputs) else None

    def __repr__(self) -> str:
        return f"Node({self.op.name}, {self.label!r})"


@dataclass(eq=False)
class Graph:
    """The nodes in an order in which they can be computed."""

    nodes: list[Node] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What could not be followed."""

    def add(self, node: Node) -> Node:
        """Append a node: its outputs learn their producer, its inputs their use."""
        self.nodes.append(node)
        for output in node.outputs:
            output.producer = node
        for slot, value in enumerate(node.inputs):
            if value is not None:
                value.uses.append(Use(node, slot))
        return node

    def of(self, *ops: Op) -> Iterator[Node]:
        """The nodes of these kinds in order."""
        return (node for node in self.nodes if node.op in ops)
