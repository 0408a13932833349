"""What torch.load would call for a pickle, and how much attention each name deserves.

Allow-lists name exact functions, never whole modules: torch.hub.load and torch.utils.collect_env.run are in
torch as well. Known gadgets: https://github.com/protectai/modelscan/issues/338
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

from normdoctor.layers import Danger, LoadCall
from normdoctor.readers.pickle_records import Call, Global

REBUILD_FUNCTIONS = frozenset(
    f"torch._utils.{name}"
    for name in (
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
        "_rebuild_qtensor",
        "_rebuild_sparse_tensor",
        "_rebuild_sparse_csr_tensor",
        "_rebuild_nested_tensor",
        "_rebuild_meta_tensor_no_storage",
        "_rebuild_device_tensor_from_numpy",
        "_rebuild_device_tensor_from_cpu_tensor",
        "_rebuild_wrapper_subclass",
    )
)
"""What torch itself uses to put a tensor together."""

REBUILD_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
"""Calls its first argument: safe only if that is."""

PLAIN = frozenset(
    {
        "collections.OrderedDict",
        "collections.defaultdict",
        "collections.Counter",
        "collections.deque",
        "_codecs.encode",
        "torch.Size",
        "torch.device",
        "torch.Tensor",
        "torch.nn.parameter.Parameter",
        "torch.nn.parameter.Buffer",
        "torch.serialization._get_layout",
        "torch.torch_version.TorchVersion",
        "__builtin__.xrange",
        "__builtin__.unicode",
        "__builtin__.long",
        *(
            f"{module}.{name}"
            for module in ("builtins", "__builtin__")
            for name in (
                "set",
                "frozenset",
                "list",
                "dict",
                "tuple",
                "int",
                "float",
                "complex",
                "bool",
                "str",
                "bytes",
                "bytearray",
                "slice",
                "range",
                "object",
            )
        ),
    }
)
"""Containers and values without behaviour. `__builtin__` is Python 2's name, which protocols up to 2 keep."""

DATA_LIBRARIES = frozenset(
    {
        "argparse", "collections", "datetime", "decimal", "enum", "fractions", "pathlib", "types", "typing", "uuid",
        "addict", "deepspeed", "easydict", "fairseq", "fvcore", "huggingface_hub", "lightning", "lightning_fabric",
        "megatron", "mmcv", "mmengine", "numpy", "omegaconf", "pandas", "PIL", "pytorch_lightning", "scipy", "sklearn",
        "timm", "tokenizers", "torch", "torchmetrics", "torchvision", "transformers", "ultralytics", "yacs",
    }
)  # fmt: skip
"""Packages whose classes are found in checkpoints as settings and records."""

DATA_FUNCTIONS = frozenset(
    {
        "array._array_reconstructor",
        "array.array",
        "contextlib.nullcontext",
        "datetime.date",
        "datetime.datetime",
        "datetime.time",
        "datetime.timedelta",
        "datetime.timezone",
        "itertools.count",
        "logging.getLogger",
        "random.Random",
        "re.RegexFlag",
        "re._compile",
        "time.struct_time",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy._core.numeric._frombuffer",
        "numpy.core.numeric._frombuffer",
        "numpy.dtype",
        "numpy.ndarray",
        "numpy.random.bit_generator.__pyx_unpickle_SeedSequence",
    }
)
"""Constructors of values that training state holds. Not among them: what looks up any name it is given (getattr,
operator.attrgetter, numpy's _ufunc_reconstruct) or keeps a call for later (functools.partial)."""

CALLS_ITS_ARGUMENTS = frozenset(
    {
        "numpy.ma.core._mareconstruct",
        "numpy.random.__RandomState_ctor",
        "numpy.random._pickle.__bit_generator_ctor",
        "numpy.random._pickle.__generator_ctor",
        "numpy.random._pickle.__randomstate_ctor",
    }
)
"""Constructors of data too, as long as the first two arguments are: they call these if they are callable."""

RECONSTRUCTORS = frozenset({"copyreg._reconstructor", "copy_reg._reconstructor", "copyreg.__newobj__"})

STANDARD_LIBRARY = sys.stdlib_module_names - {"__main__"} | {"__builtin__"}

CLASS_NAME = re.compile(r"^(_?[A-Z]\w*\.)*_?[A-Z]\w*$")

RUNS_WHEN_CREATED = frozenset(
    {"Popen", "Process", "Thread", "Timer", "CDLL", "PyDLL", "CUDAPluggableAllocator", "PackageImporter"}
)
"""Class names that do something as soon as they are called; many packages import them under their own name."""


def is_module_state(state: object) -> bool:
    """Whether an object's pickled state is that of a torch.nn.Module."""
    return isinstance(state, dict) and isinstance(state.get("_modules"), dict) and "_parameters" in state


def judge(calls: Iterable[Call]) -> tuple[LoadCall, ...]:
    """The names that loading would call beyond torch's rebuild functions and plain containers, worst first."""
    worst: dict[str, Danger] = {}
    for call in calls:
        for name, danger in _judge_one(call):
            if name not in worst or danger.value > worst[name].value:
                worst[name] = danger
    found = [LoadCall(name, danger) for name, danger in worst.items()]
    return tuple(sorted(found, key=lambda call: (-call.danger.value, call.name)))


def _judge_one(call: Call) -> list[tuple[str, Danger]]:
    function = call.function
    if not isinstance(function, Global):
        return [("the result of another call", Danger.OTHER)]
    name = function.full_name
    if name in RECONSTRUCTORS:
        inner = call.args[0] if call.args else None
        # The second argument of _reconstructor is a class whose __init__ it calls.
        bases = [] if name.endswith("__newobj__") else _judge_names(call.args[1:2])
        return _judge_one(Call(inner, (), True, state=call.state)) + bases
    if name == REBUILD_FROM_TYPE:
        inner = call.args[0] if call.args else None
        return _judge_one(Call(inner, (), False))
    if name in REBUILD_FUNCTIONS or name in PLAIN:
        return []
    package = function.module.partition(".")[0]
    foreign = package not in STANDARD_LIBRARY
    if call.creates and foreign and is_module_state(call.state):
        return [(name, Danger.MODULE_CLASS)]
    if name in DATA_FUNCTIONS:
        return [(name, Danger.DATA_CLASS)]
    if name in CALLS_ITS_ARGUMENTS:
        return [(name, Danger.DATA_CLASS), *_judge_names(call.args[:2])]
    # cls.__new__ of a class outside the standard library is a record of the user's own code.
    if (
        CLASS_NAME.match(function.name)
        and (package in DATA_LIBRARIES or (call.creates and foreign))
        and not RUNS_WHEN_CREATED & set(function.name.split("."))
    ):
        return [(name, Danger.DATA_CLASS)]
    return [(name, Danger.OTHER)]


def _judge_names(arguments: Iterable[object]) -> list[tuple[str, Danger]]:
    """What it means that these are called, as far as they are names; what another call gave is judged there."""
    named = (argument for argument in arguments if isinstance(argument, Global))
    return [found for argument in named for found in _judge_one(Call(argument, (), False))]
