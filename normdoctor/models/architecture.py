"""--arch pkg.module:callable → what it gives, and whose fault it is where it gives nothing. Runs the user's code.

--data may name a callable in the same way."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from normdoctor.errors import InputError, MissingDependencyError, NormDoctorError, UsageError, did_you_mean

FORM = "Write it like --arch mypkg.nets:resnet18 or --arch nets.py:Net."

ARGUMENTS = "Check the name and --arch-args."

OWN = frozenset({"normdoctor", "importlib", "_frozen_importlib", "_frozen_importlib_external", "__main__", "torch"})
"""Packages that pass an exception on and are not what is missing."""

DISTRIBUTIONS = {"sklearn": "scikit-learn", "cv2": "opencv-python", "PIL": "Pillow", "yaml": "PyYAML"}
"""Import name → what pip calls the package, for well-known ones where the two differ."""

FAILED_IN_SCRIPT = "The following operation failed in the TorchScript interpreter."
"""Such a message has the code line by line, and the cause at its end."""


def parse_arguments(arguments: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """The keyword arguments that --arch-args gives as a JSON object. Raises UsageError for anything else."""
    if arguments is None or isinstance(arguments, Mapping):
        return dict(arguments or {})
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"--arch-args is not valid JSON ({error})", """Write it like '{"num_classes": 10}'."""
        ) from None
    if not isinstance(value, dict):
        raise UsageError(
            f"--arch-args is a JSON {type(value).__name__}, not an object", """Write it like '{"num_classes": 10}'."""
        )
    return value


def build(arch: str, arguments: str | Mapping[str, Any] | None = None) -> Any:
    """What the callable named by `arch` returns. The working directory is importable from then on.

    Raises UsageError where there is no such callable, MissingDependencyError where importing or calling it fails in
    a package of its own, InputError where it fails by itself."""
    keywords = parse_arguments(arguments)
    target = find(f"--arch {arch}", arch, FORM)
    if not callable(target):
        raise UsageError(f"--arch {arch}: is a {type(target).__name__}, not a class or function", FORM)
    if not inspect.isroutine(target) and not isinstance(target, type) and not keywords and hasattr(target, "forward"):
        return target  # a module that is made when the file is imported
    try:
        inspect.signature(target).bind(**keywords)
    except TypeError as error:
        raise UsageError(
            f"--arch {arch}: {error}", f"It takes {inspect.signature(target)}; give them with --arch-args."
        ) from None
    except ValueError:
        pass  # no signature to be had
    with users_code(f"--arch {arch}"):
        return target(**keywords)


def find(what: str, place: str, form: str, hint: str = ARGUMENTS) -> Any:
    """What package.module:name or file.py:name stands for; imports it.

    what: how messages name it. form: how it is to be written. hint: what to do where importing it fails.

    Raises UsageError where there is no such thing, MissingDependencyError or InputError where importing it fails."""
    module_name, _, path = place.rpartition(":")
    if not module_name or not path:
        raise UsageError(f"{what}: names no callable", form)
    with users_code(what, hint):
        target: Any = _import(what, module_name, form)
    for part in path.split("."):
        if not hasattr(target, part):
            known = [name for name in dir(target) if not name.startswith("_")]
            raise UsageError(f"{what}: {module_name} has no {path}", did_you_mean(part, known) + form)
        target = getattr(target, part)
    return target


def make_importable() -> None:
    """The working directory first among the places of imports, as `python -m` has it."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)


def _import(what: str, name: str, form: str) -> ModuleType:
    make_importable()
    if not name.endswith(".py"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and (name == error.name or name.startswith(f"{error.name}.")):
                raise MissingDependencyError(
                    f"{what}: there is no module {error.name}",
                    "Run it in the folder that holds it, or install the package.",
                ) from None
            raise
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"{what}: {path}: no such file", form)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # pickling looks the class up by this name
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def users_code(what: str, hint: str = ARGUMENTS) -> Iterator[None]:
    """Code of the user runs in the block: what it prints goes to stderr, whatever it raises becomes one line.

    hint: what to do about an exception of its own.
    Raises MissingDependencyError where a package could not be imported, InputError for any other exception."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except NormDoctorError:
        raise
    except ImportError as error:
        missing = (error.name or "").partition(".")[0] or _package(error.__traceback__) or "a package"
        raise MissingDependencyError(
            f"{what}: {missing} cannot be imported ({one_line(error)})",
            f"Run in the folder that holds it where it is your own code, or install it: {install(missing)}",
        ) from error
    except (Exception, SystemExit) as error:
        package = _package(error.__traceback__)
        if package is not None:
            raise MissingDependencyError(
                f"{what}: the package {package} cannot be imported ({one_line(error)})",
                f"Install a build of {package} that fits the other packages here, torch above all.",
            ) from error
        raise InputError(f"{what}: raises {one_line(error)}", hint) from error


def one_line(error: BaseException) -> str:
    """Class and first line of an exception; of one from TorchScript's interpreter its cause.

    >>> one_line(ValueError("no such layer\\nsee the manual"))
    'ValueError: no such layer'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0] == FAILED_IN_SCRIPT:
        lines = [line for line in lines[1:] if "<--- HERE" not in line][-1:]
        cause = re.fullmatch(r"(?:\w+\.)*(\w+): (.+)", lines[0]) if lines else None
        if cause is not None:
            return f"{cause[1]}: {cause[2][:300]}"
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def install(package: str) -> str:
    """The command that installs what is imported under this name.

    >>> install("sklearn")
    'pip install scikit-learn'
    """
    return f"pip install {DISTRIBUTIONS.get(package, package)}"


def _package(trace: TracebackType | None) -> str | None:
    """The installed package whose import was under way when the exception was raised, None where there was none."""
    found = None
    while trace is not None:
        frame = trace.tb_frame
        name = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        installed = "-packages" in frame.f_code.co_filename
        if frame.f_code.co_name == "<module>" and installed and name not in OWN:
            found = name
        trace = trace.tb_next
    return found
