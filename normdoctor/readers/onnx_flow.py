"""An ONNX model as the neutral dataflow graph: all its bodies flat, shapes inferred, no weight read."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from normdoctor.errors import InputError
from normdoctor.flow.graph import Fixed, Graph, Node, Op, Use, Value
from normdoctor.readers import onnx_moving_ops as moving
from normdoctor.readers import onnx_plain_ops as plain
from normdoctor.readers import onnx_weighted_ops as weighted
from normdoctor.readers.arrays import Source
from normdoctor.readers.onnx import Survey, all_tensors, is_onnx, survey
from normdoctor.readers.onnx_builder import Builder
from normdoctor.readers.onnx_graph import Scope, Step
from normdoctor.readers.onnx_operators import MICROSOFT
from normdoctor.readers.onnx_records import LOCAL_DOMAINS, FunctionKey
from normdoctor.readers.onnx_shapes import infer

Translation = Callable[[Builder, Step], bool]
"""Adds the neutral nodes for one ONNX node; False, with nothing added, where it is none that is known."""

TRANSLATIONS: dict[str, Translation] = {
    "Conv": weighted.convolution,
    "ConvTranspose": weighted.transposed_convolution,
    "MatMul": weighted.matmul,
    "Gemm": weighted.gemm,
    "BatchNormalization": weighted.batch_norm,
    "Sum": weighted.total,
    "Dropout": weighted.dropout,
    **dict.fromkeys(weighted.ARITHMETIC, weighted.arithmetic),
    **dict.fromkeys(weighted.UNARY, weighted.unary),
    **dict.fromkeys((*plain.HOMOGENEOUS, *plain.CURVED), plain.activation),
    **dict.fromkeys(plain.REDUCTIONS, plain.reduction),
    **dict.fromkeys(("Max", "Min"), plain.extreme),
    **dict.fromkeys(("MaxPool", "GlobalMaxPool"), plain.max_pool),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool"), plain.average_pool),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), moving.reshape),
    **dict.fromkeys(("Resize", "Upsample"), moving.resize),
    **dict.fromkeys(("Cast", "CastLike"), plain.cast),
    **dict.fromkeys(("QuantizeLinear", "DynamicQuantizeLinear", "DequantizeLinear"), plain.quantize),
    "Clip": plain.clip,
    "Concat": moving.concat,
    "Split": moving.split,
    "SplitToSequence": moving.split_to_sequence,
    "SequenceAt": moving.sequence_at,
    "ReduceL2": plain.euclidean,
    "ReduceSumSquare": plain.euclidean,
    "Slice": moving.slice_,
    "Pad": moving.pad,
    "Transpose": moving.transpose,
    "Expand": moving.expand,
    "Tile": moving.tile,
    "DepthToSpace": moving.depth_to_space,
    "Identity": plain.identity,
    "Shape": moving.shape,
    "Size": moving.count,
    "Constant": plain.constant,
    "ConstantOfShape": plain.fill,
    "Gather": moving.gather,
}

QUANTISED = ("QLinear", "DynamicQuantize", "QGemm", "QAttention")
INTEGER = ("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat")

NO_USE = {"Shape": (0,), "Size": (0,), "CastLike": (1,)}
"""Inputs whose values nobody looks at."""

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


@dataclass(frozen=True, eq=False)
class Flow:
    """An ONNX model open for folding: the graph, and all that is needed to write a changed copy of the file."""

    path: Path
    survey: Survey
    graph: Graph
    inlined: tuple[str, ...] = ()
    """Local functions that were put in the place of their calls, so that what lies in them can be changed. The
    survey and the graph are those of the inlined model then, whose bytes are not those of the file."""


@contextmanager
def open_flow(path: Path) -> Iterator[Flow]:
    """The graph of an ONNX file, its local functions inlined as far as they hold norms.

    Raises InputError as `readers.onnx.read` does, and for names that are given twice or cycles of nodes."""
    with Source(path) as source:
        if not is_onnx(source):
            raise InputError(f"{path}: not an ONNX model", "Give the path of an .onnx file.")
        first = survey(source)
        with first.checkpoint:
            functions = _to_inline(first)
            if not functions:
                yield Flow(path, first, read_graph(first))
                return
            data = _inline(path, functions)
    with tempfile.TemporaryDirectory(prefix="normdoctor-") as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(data)
        del data
        with Source(copy) as source:
            # External data is found, and errors are reported, where the model itself lies.
            source.path = path
            second = survey(source)
            with second.checkpoint:
                graph = read_graph(second)
                names = tuple(sorted({key[1] for key in functions}))
                graph.notes.append(_note_on_inlining(names))
                yield Flow(path, second, graph, names)


def _note_on_inlining(names: tuple[str, ...]) -> str:
    which = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    if len(names) == 1:
        return f"the local function {which}, which has norms or weights in it, is inlined where a norm is folded"
    return f"{len(names)} local functions with norms or weights in them are inlined where a norm is folded: {which}"


def _to_inline(found: Survey) -> set[FunctionKey]:
    """The local functions that hold norms, and those that call such ones; also those with weights beside norms."""
    wanted: set[FunctionKey] = set()
    steps = [step for item in found.named for step in (item.found.step, *item.found.twins)]
    if steps:
        steps += [step for step in found.program.steps if step.node.op in WEIGHTED]
    for step in steps:
        scope: Scope | None = step.scope
        while scope is not None:
            if scope.function is not None:
                wanted.add(scope.function)
            scope = scope.parent if scope.caller is None else scope.caller.scope
    return wanted


def _inline(path: Path, functions: set[FunctionKey]) -> bytes:
    import onnx
    import onnx.inliner

    try:
        model = onnx.load(path, load_external_data=False)
        names = sorted({(domain, name) for domain, name, _ in functions})
        data: bytes = onnx.inliner.inline_selected_functions(model, names).SerializeToString()
    except Exception as error:  # whatever protobuf and the C++ side raise
        raise InputError(
            f"{path}: its local functions cannot be inlined ({str(error).strip()[:200]})",
            "Inline them when the model is exported.",
        ) from None
    return data


def read_graph(found: Survey) -> Graph:
    """The neutral graph. Norms carry the names that `inspect` gives them."""
    program = found.program
    kinds, problem = infer(program, all_tensors(program))
    builder = Builder(program, kinds)
    graph = builder.graph
    for scope in {id(step.scope): step.scope for step in program.steps}.values():
        _check_names(found, scope)
    calls = {id(scope.caller.node) for scope in _scopes(found) if scope.caller is not None}
    for step in program.steps:
        if id(step.node) in calls:
            continue  # what it computes stands beside it
        _translate(builder, step)
    _sort(found, graph)
    _join_slices(graph)
    _label(found, graph)
    if problem is not None:
        graph.notes.append(f"{problem}; some shapes are not known, so less can be folded")
    if builder.overridable:
        names = ", ".join(builder.overridable[:3]) + (", ..." if len(builder.overridable) > 3 else "")
        graph.notes.append(
            f"{len(builder.overridable)} stored tensors are inputs of the graph too, so whoever runs the model may "
            f"give others; nothing is folded into or out of them: {names}"
        )
    return graph


def _scopes(found: Survey) -> list[Scope]:
    return list({id(step.scope): step.scope for step in found.program.steps}.values())


def _translate(b: Builder, step: Step) -> None:
    node = step.node
    before = len(b.graph.nodes)
    if node.op not in TRANSLATIONS and (node.op.startswith(QUANTISED) or node.op in INTEGER):
        weighted.quantised(b, step)
        return
    known = TRANSLATIONS.get(node.op) if node.domain in LOCAL_DOMAINS else None
    if node.domain == MICROSOFT and node.op == "Gelu":
        known = plain.activation
    if (known is not None and _takes_x(b, step) and known(b, step)) or weighted.other_norm(b, step):
        used = {slot for made in b.graph.nodes[before:] for slot in made.site.slots}
        unused = set(range(len(node.inputs))) - used - set(NO_USE.get(node.op, ()))
        b.sink(step, sorted(unused))
    else:
        b.other(step)


def _takes_x(b: Builder, step: Step) -> bool:
    return step.node.op == "Constant" or (b.at(step, 0) is not None and bool(step.node.outputs[:1]))


def _check_names(found: Survey, scope: Scope) -> None:
    made = [name for node in scope.graph.nodes for name in node.outputs if name]
    seen: set[str] = {*scope.graph.inputs, *scope.graph.tensors}
    for name in made:
        if name in seen:
            raise InputError(
                f"{found.checkpoint.path}: the value {name[:200]!r} is made more than once",
                "No runtime accepts such a model; export it again.",
            )
        seen.add(name)


def _sort(found: Survey, graph: Graph) -> None:
    """Nodes behind those that make their inputs. Files list them so; runtimes also take others."""
    places = {node: place for place, node in enumerate(graph.nodes)}
    if all(
        places[value.producer] < place
        for node, place in places.items()
        for value in node.inputs
        if value is not None and value.producer is not None
    ):
        return
    waiting = {node: len({v.producer for v in node.inputs if v and v.producer}) for node in graph.nodes}
    followers: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        for producer in {value.producer for value in node.inputs if value and value.producer}:
            followers.setdefault(producer, []).append(node)
    ready = [node for node in reversed(graph.nodes) if not waiting[node]]
    ordered = []
    while ready:
        node = ready.pop()
        ordered.append(node)
        for follower in followers.get(node, ()):
            waiting[follower] -= 1
            if not waiting[follower]:
                ready.append(follower)
    if len(ordered) < len(graph.nodes):
        raise InputError(
            f"{found.checkpoint.path}: its nodes depend on each other in a circle",
            "No runtime accepts such a model; export it again.",
        )
    graph.nodes[:] = ordered


def _join_slices(graph: Graph) -> None:
    """Slices that together are all of a value become one SPLIT: how torch writes chunk."""
    joined: dict[Node, Node] = {}
    gone: set[Node] = set()
    for node in graph.nodes:
        if node.op is not Op.SLICE or node in gone:
            continue
        takers = [use.node for use in node.x.uses if use.node.op is not Op.SHAPE]
        if len(takers) > 1 and not node.x.is_output and _are_all(node.x, takers):
            takers.sort(key=lambda taker: int(taker.attributes["start"]))
            parts = [taker.y for taker in takers]
            fixed = Fixed("part-of-a-call", "it stands for several Slice nodes")
            split = Node(
                Op.SPLIT, [node.x], parts, {"axis": node.attributes["axis"]}, "Slice", node.label, fixed, node.site
            )
            joined[node] = split
            gone.update(takers)
    for first, split in joined.items():
        split.x.uses[:] = [use for use in split.x.uses if use.node not in gone]
        split.x.uses.append(Use(split, 0))
        for part in split.outputs:
            part.producer = split
        graph.nodes[graph.nodes.index(first)] = split
    graph.nodes[:] = [node for node in graph.nodes if node not in gone]


def _are_all(value: Value, takers: list[Node]) -> bool:
    """Whether these slices cut the value into parts along one axis, without a gap and without an overlap."""
    if any(taker.op is not Op.SLICE or taker.attributes["step"] != 1 for taker in takers):
        return False
    axis = takers[0].attributes["axis"]
    if any(taker.attributes["axis"] != axis for taker in takers):
        return False
    reached: object = 0
    for taker in sorted(takers, key=lambda taker: taker.attributes["start"] or 0):
        start, end = taker.attributes["start"], taker.attributes["end"]
        if start is None or end is None or start != reached:
            return False
        reached = end
    return value.shape is not None and value.shape[axis] == reached


def _label(found: Survey, graph: Graph) -> None:
    """Give every norm its name and its layer."""
    nodes: dict[tuple[int, int], list[Node]] = {}
    for node in graph.nodes:
        step = node.site.step
        nodes.setdefault((id(step.scope), id(step.node)), []).append(node)
    for item in found.named:
        for step in (item.found.step, *item.found.twins):
            for node in nodes.get((id(step.scope), id(step.node)), ()):
                if node.outputs and node.y.name in step.node.outputs[:1]:
                    node.label, node.layer = item.layer.name, item.layer
