"""A program that torch has loaded → a module of Python with a module for every norm.

Of an exported program (.pt2) the calls of batch_norm in its graph are replaced; the graph of a TorchScript module is
taken step by step. In both every norm has statistics of its own, copied, so that they can be changed without touching
the program."""

from __future__ import annotations

import operator
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normdoctor.errors import RefusedError
from normdoctor.layers import NormLayer
from normdoctor.models.inputs import Example
from normdoctor.models.loaded import Kind, Loaded
from normdoctor.models.with_torch import quiet, run
from normdoctor.programs import Unrolled
from normdoctor.programs.script_steps import Code, compile_graph
from normdoctor.programs.script_values import Function
from normdoctor.programs.sites import COMPUTED, ELSEWHERE, OPERATORS, ROLES, Sites, eps_of, identity, unfit

MANY = 1 << 31
"""A largest batch beyond this is no limit."""

WITHOUT_SCHEMA = frozenset({"prim::isinstance", "prim::tolist"})
"""Operators of the language that TorchScript has to do itself."""

GENERIC = re.compile(r"\bt\[?\]? |\.\.\.")
"""Of a schema for any type of elements, or any number of arguments."""

WAY_OUT = "Recalibrate the module that it was scripted from, or export that to ONNX and recalibrate that."


class Norm(nn.modules.batchnorm._BatchNorm):
    """A BatchNorm in eval mode, for inputs of any number of axes."""

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        eps: float,
    ) -> None:
        super().__init__(running_mean.numel(), eps, affine=False)
        del self._parameters["weight"], self._parameters["bias"]
        given = dict(zip(ROLES, (weight, bias, running_mean, running_var), strict=True))
        for role, tensor in given.items():
            self.register_buffer(role, None if tensor is None else tensor.detach().clone())
        super().train(False)

    def train(self, mode: bool = True) -> Norm:
        """Nothing: it is for inference."""
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias, cudnn = self.weight, self.bias, torch.backends.cudnn.enabled
        return torch.batch_norm(x, weight, bias, self.running_mean, self.running_var, False, 0.0, self.eps, cudnn)


def unrolled(loaded: Loaded, layers: Sequence[NormLayer], example: Example | None = None) -> Unrolled:
    """The program as a module of Python. layers: its norms as the reader found them; example: arguments of one call,
    where they are known, on which it must then run.

    Raises RefusedError for a program that cannot be followed, with the operator that is in the way."""
    found = _unroll_script(loaded, layers) if loaded.kind is Kind.SCRIPT else _unroll_export(loaded, layers)
    if example is not None:
        run(Loaded(Kind.MODULE, found.module, loaded.name), example)
    return found


# exported programs


class _Taken(nn.Module):
    """torch.cond, or a block with a mode of autograd of its own, as calls of Python's."""

    def __init__(self, ways: Iterable[nn.Module], *, choose: bool) -> None:
        super().__init__()
        self.ways = nn.ModuleList(ways)
        self._choose = choose

    def forward(self, *arguments: Any) -> Any:
        if not self._choose:
            return self.ways[0](*arguments)
        condition, operands = arguments
        return self.ways[0 if bool(condition) else 1](*operands)


def _unroll_export(loaded: Loaded, layers: Sequence[NormLayer]) -> Unrolled:
    program = loaded.model
    with quiet():
        module = program.module()
    for name in ("train", "eval"):  # of exported modules they only raise
        vars(module).pop(name, None)
    sites = Sites(Norm)
    held = {node: str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    stored = {node: path for node, path in held.items() if isinstance(_attribute(module, path), torch.Tensor)}
    _replace_in(module, sites, stored, module)
    module.eval()
    norms, left = sites.assign(layers)
    return Unrolled(module, norms, left, *_batch_of(program), notes=sites.notes)


def _replace_in(module: Any, sites: Sites, stored: Mapping[Any, str], root: Any) -> bool:
    """Put norms into the graph of a module; whether there are any. stored: its values that are tensors of the
    program, and their names."""
    changed = False
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            changed |= _enter(module, node, sites, stored, root)
        elif getattr(node.target, "namespace", None) == "aten" and node.target._opname in OPERATORS:
            changed |= _replace(module, node, sites, stored, root)
        elif isinstance(node.target, torch._ops.OpOverload) and _writes(node.target._schema) and node.args[0] in stored:
            sites.note_change(stored[node.args[0]])
    others = [node for node in stored if any(user.op == "call_function" for user in node.users)]
    elsewhere = {identity(_attribute(root, stored[node])) for node in others}
    for site in sites.all():
        if site.stored & elsewhere:
            site.why = ELSEWHERE
    module.recompile()
    return changed


def _replace(module: Any, node: Any, sites: Sites, stored: Mapping[Any, str], root: Any) -> bool:
    """Put a norm in the place of an operator; whether that could be done."""
    name, several = node.target._opname, OPERATORS[node.target._opname]
    declared = [argument.name for argument in node.target._schema.arguments]
    arguments = {**dict(zip(declared, node.args, strict=False)), **node.kwargs}
    given = [arguments.get(role) for role in ROLES]
    names = [stored[value] for value in reversed(given) if value in stored]
    stack = list((node.meta.get("nn_module_stack") or {"": ("", "")}).values())
    path = str(stack[-1][0]).removeprefix("L['self'].").removeprefix("_export_root.")
    candidates = [path, *dict.fromkeys(own.rpartition(".")[0] for own in names), *names]
    users = list(node.users)
    why = unfit(arguments, name, [value is None or value in stored for value in given])
    if several and not all(user.target is operator.getitem and user.args[1] == 0 for user in users):
        why = why or COMPUTED
    if why is not None:
        sites.leave(candidates, why)
        return False
    tensors = [None if value is None else _attribute(root, stored[value]) for value in given]
    call = _called(module, sites.add(candidates, tensors, eps_of(arguments)), (arguments["input"],), node)
    for user in users if several else (node,):
        user.replace_all_uses_with(call)
        module.graph.erase_node(user)
    if several:
        module.graph.erase_node(node)
    return True


def _called(module: Any, child: nn.Module, arguments: tuple[Any, ...], node: Any) -> Any:
    """A new node in front of another one that calls a new child of the module."""
    path = f"_normdoctor_{len(module._modules)}"
    module.add_submodule(path, child)
    with module.graph.inserting_before(node):
        call = module.graph.call_module(path, arguments)
    call.meta = dict(node.meta)
    return call


def _enter(module: Any, node: Any, sites: Sites, stored: Mapping[Any, str], root: Any) -> bool:
    """Norms in the blocks that an operator of higher order takes."""
    if node.target.name() == "cond":
        condition, *blocks, operands = node.args
        given: tuple[Any, ...] = (condition, operands)
    elif node.target.name() == "wrap_with_set_grad_enabled":
        _, block, *operands = node.args
        blocks, given = [block], tuple(operands)
    else:
        return False
    ways = [_attribute(module, str(block.target)) for block in blocks]
    changed = False
    for way in ways:
        inputs = [inner for inner in way.graph.nodes if inner.op == "placeholder"]
        inner = {own: stored[value] for own, value in zip(inputs, operands, strict=True) if value in stored}
        changed |= _replace_in(way, sites, inner, root)
    if changed:
        call = _called(module, _Taken(ways, choose=len(ways) > 1), given, node)
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
    return changed


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _batch_of(program: Any) -> tuple[int | None, int, int | None]:
    """The fixed length of the first axis of the inputs, or None and the limits of a free one."""
    names = set(program.graph_signature.user_inputs)
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    tensors = [value for value in values if isinstance(value, torch.Tensor) and value.ndim]
    lengths = [tensor.shape[0] for tensor in tensors if tensor.ndim > 1] or [tensor.shape[0] for tensor in tensors]
    free: list[Any] = [length for length in lengths if isinstance(length, torch.SymInt)]
    if lengths and not free:
        return int(lengths[0]), int(lengths[0]), int(lengths[0])
    smallest, largest = 1, None
    for length in free:
        limits = program.range_constraints.get(length.node.expr)
        if limits is not None:
            smallest = max(smallest, int(limits.lower))
            if limits.upper.is_finite and limits.upper < MANY:
                largest = min(largest or MANY, int(limits.upper))
    return None, smallest, largest


# TorchScript


@dataclass(frozen=True, eq=False)
class _Owner:
    """A module of a TorchScript module."""

    path: str
    module: Any


def _unroll_script(loaded: Loaded, layers: Sequence[NormLayer]) -> Unrolled:
    script = loaded.model._c
    graph = script._get_method("forward").graph.copy()
    torch._C._jit_pass_inline(graph)
    torch._C._jit_pass_inline_fork_wait(graph)
    engine = _Engine(loaded.name)
    code = compile_graph(graph, _Owner("", script), engine)
    for site in engine.sites.all():
        if site.stored & engine.elsewhere:
            site.why = ELSEWHERE
    module = _Script(code, loaded.model.forward.schema, [site.norm for site in engine.sites.all()])
    norms, left = engine.sites.assign(layers)
    return Unrolled(module.eval(), norms, left, notes=engine.sites.notes)


class _Script(nn.Module):
    """The steps of a graph of TorchScript."""

    def __init__(self, code: Code, schema: Any, norms: Iterable[Norm]) -> None:
        super().__init__()
        self._code = code
        self._arguments = schema.arguments[1:]
        self.norms = nn.ModuleList(norms)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self._code.run(self._bound(args, kwargs))
        return outputs[0] if len(outputs) == 1 else outputs

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The arguments by place, as TorchScript would take them."""
        names = [argument.name for argument in self._arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(args) > len(names) or len(given) != len(args) + len(kwargs) or not given.keys() <= set(names):
            raise TypeError(f"takes {', '.join(names) or 'nothing'}; given {len(args)} by place, {sorted(kwargs)}")
        found = []
        for argument in self._arguments:
            if argument.name not in given and not argument.has_default_value():
                raise TypeError(f"missing argument {argument.name}")
            value = given.get(argument.name, argument.default_value)
            kind = argument.type.kind()
            if kind == "TensorType" and not isinstance(value, torch.Tensor):
                raise TypeError(f"{argument.name} must be a tensor, not {type(value).__name__}")
            convert = {"FloatType": float, "ListType": list, "TupleType": tuple, "DictType": dict}.get(kind)
            found.append(value if convert is None else convert(value))
        return found


class _Engine:
    """What the steps of TorchScript need of torch; the norms that they come to."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.sites = Sites(Norm)
        self.elsewhere: set[Hashable] = set()
        """Identities of the module's tensors that something else than a norm takes."""
        self._tensors: dict[int, tuple[torch.Tensor, list[tuple[str, str]]]] = {}
        """By id: the tensor, and the modules and names it has."""
        self._operators: dict[tuple[str, str], Function | None] = {}

    def attribute(self, owner: _Owner, name: str) -> Any:
        if name == "training":
            return False
        value = owner.module.getattr(name)
        if isinstance(value, torch.Tensor):
            self._tensors.setdefault(id(value), (value, []))[1].append((owner.path, name))
        elif isinstance(value, torch.ScriptObject | torch._C.ScriptObject):
            return _Owner(f"{owner.path}.{name}" if owner.path else name, value)
        return value

    def is_tensor(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor)

    def operator(self, node: Any) -> Function | None:
        schema = _schema(node)
        if schema is None or GENERIC.search(node.schema()):
            return _alone(node) if schema is not None or node.kind() in WITHOUT_SCHEMA else None
        key = node.kind(), schema.overload_name
        if key not in self._operators:
            self._operators[key] = _operator(schema)
        return self._operators[key]

    def norm(self, node: Any, known: Sequence[tuple[bool, Any]]) -> Function | None:
        space, _, name = node.kind().partition("::")
        schema = _schema(node) if space == "aten" and name in OPERATORS else None
        if schema is None:
            return None
        places = [argument.name for argument in schema.arguments]
        arguments = {place: content for place, (is_known, content) in zip(places, known, strict=True) if is_known}
        tensors = [arguments.get(role) for role in ROLES]
        mean = self._tensors.get(id(tensors[2]))
        candidates = [] if mean is None else [path for path, _ in mean[1]]
        outputs = list(node.outputs())
        why = unfit(arguments, name, [role not in places or role in arguments for role in ROLES])
        if any(output.uses() for output in outputs[1:]):
            why = why or COMPUTED
        if why is not None:
            self.sites.leave(candidates, why)
            return None
        norm = self.sites.add(candidates, tensors, eps_of(arguments))
        if len(outputs) == 1:
            return lambda x, *_: norm(x)
        return lambda x, *_: (norm(x), *[None] * (len(outputs) - 1))

    def used(self, node: Any, tensors: Iterable[Any]) -> None:
        given = [tensor for tensor in tensors if id(tensor) in self._tensors]
        self.elsewhere.update(map(identity, given))
        schema = _schema(node) if given else None
        if schema is not None and _writes(schema):
            path, name = self._tensors[id(given[0])][1][0]
            self.sites.note_change(f"{path}.{name}" if path else name)

    def record(self, node: Any) -> Function | None:
        return _alone(node) if node.output().type().str().startswith("NamedTuple(") else None

    def refusal(self, kind: str) -> Exception:
        return RefusedError(f"{self._name}: its TorchScript has {kind}, which cannot be taken step by step", WAY_OUT)


def _writes(schema: Any) -> bool:
    """Whether an operator changes its first argument."""
    return any(entry.alias_info is not None and entry.alias_info.is_write for entry in schema.arguments[:1])


def _schema(node: Any) -> Any:
    text = node.schema()
    return None if text == "(no schema)" else torch._C.parse_schema(text)


def _alone(node: Any) -> Function:
    """A node as a function of its own that TorchScript runs. A list is copied on its way in."""
    graph = torch._C.Graph()
    inputs = []
    for value in node.inputs():
        inputs.append(graph.addInput())
        inputs[-1].setType(value.type())
    outputs = list(node.outputs())
    made = graph.appendNode(graph.create(node.kind(), inputs, len(outputs)))
    made.copyAttributes(node)
    for own, value in zip(made.outputs(), outputs, strict=True):
        own.setType(value.type())
        graph.registerOutput(own)
    if len(outputs) != 1:
        graph.makeMultiOutputIntoTuple()
    function: Function = torch._C._create_function_from_graph("alone", graph)
    return function


def _operator(schema: Any) -> Function | None:
    try:
        found = torch._C._get_operation_overload(schema.name, schema.overload_name)
    except RuntimeError:
        return None
    if found is None:
        return None
    function: Function = found[0]
    names = [argument.name for argument in schema.arguments if argument.kwarg_only]
    if not names:
        return function
    count = len(schema.arguments) - len(names)
    return lambda *given: function(*given[:count], **dict(zip(names, given[count:], strict=True)))
