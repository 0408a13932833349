"""Settings from a project's own file: [tool.normdoctor] in pyproject.toml, or a normdoctor.toml.

[tool.normdoctor]
select = ["S", "A", "C"]
ignore = ["S106"]
fail-on = "warning"

[tool.normdoctor.per-layer-ignores]
"backbone.*" = ["S110"]
"head.bn" = { ignore = ["S104"], reason = "re-estimated on the device" }

[tool.normdoctor.thresholds]
S104 = { error = 0.2 }
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from normdoctor.errors import UsageError, did_you_mean
from normdoctor.findings import LayerIgnore, Precision
from normdoctor.selection import check_eps, check_momentum, check_precision, checked_limits, choose_rules
from normdoctor.writing import read_small

FAIL_ON = ("error", "warning", "info", "never")

MAX_SIZE = 4 << 20

OWN_FILE, SHARED_FILE = "normdoctor.toml", "pyproject.toml"


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """How to inspect, and from where each setting is. A field's name is its key with - for _."""

    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    per_layer_ignores: tuple[LayerIgnore, ...] = ()
    thresholds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    fail_on: str = "error"
    eps: float | None = None
    momentum: float | None = None
    assume: bool = True
    target: Precision | None = None
    baseline: Path | None = None
    path: Path | None = None
    """The settings file, if there is one."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """Field → where its value comes from; a field that is not listed has its default."""

    def with_options(self, **options: tuple[str, Any]) -> Configuration:
        """These settings with the options of the command line in their place: field=(option, value or None).

        Thresholds are joined, everything else is replaced."""
        given = {name: (option, value) for name, (option, value) in options.items() if value is not None}
        values = {name: value for name, (_, value) in given.items()}
        if "thresholds" in values:
            joined = {code: dict(limits) for code, limits in self.thresholds.items()}
            for code, limits in values["thresholds"].items():
                joined[code] = joined.get(code, {}) | limits
            values["thresholds"] = joined
        origins = {**self.origins, **{name: option for name, (option, _) in given.items()}}
        return replace(self, **values, origins=origins)

    def as_toml(self) -> str:
        """The settings as a normdoctor.toml would hold them, each with its origin as a comment."""
        lines, tables = [f"# {self.path}" if self.path else "# no settings file"], []
        for entry in fields(self):
            name, key = entry.name, entry.name.replace("_", "-")
            if name in ("origins", "path"):
                continue
            value, origin = getattr(self, name), self.origins.get(name, "default")
            if name == "per_layer_ignores" and value:
                rows = [f"{json.dumps(one.glob)} = {_inline(one)}" for one in value]
                tables += [f"\n[{key}]  # {origin}", *rows]
            elif name == "thresholds" and value:
                rows = [f"{code} = {{ {_pairs(limits)} }}" for code, limits in value.items()]
                tables += [f"\n[{key}]  # {origin}", *rows]
            elif name not in ("per_layer_ignores", "thresholds"):
                shown = f"{key} = {_toml(value)}" if value is not None else f"# {key} is not set"
                lines.append(f"{shown}  # {origin}")
        return "\n".join([*lines, *tables]) + "\n"


def _toml(value: Any) -> str:
    """A string, number, bool or list of strings; JSON writes them as TOML does."""
    return json.dumps(list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value)


def _pairs(limits: Mapping[str, float]) -> str:
    return ", ".join(f"{name} = {value!r}" for name, value in limits.items())


def _inline(one: LayerIgnore) -> str:
    codes = _toml(one.codes)
    return f"{{ ignore = {codes}, reason = {json.dumps(one.reason)} }}" if one.reason else codes


def find(start: Path) -> Path | None:
    """The settings file that holds for `start`: the nearest normdoctor.toml, or pyproject.toml with a
    [tool.normdoctor] table, in this folder or one above. normdoctor.toml wins within a folder."""
    start = start.absolute()
    for folder in (start, *start.parents):
        if (folder / OWN_FILE).is_file():
            return folder / OWN_FILE
        shared = folder / SHARED_FILE
        # Most projects have a pyproject.toml; one that never mentions normdoctor may be as broken as it likes.
        if shared.is_file() and b"normdoctor" in read_small(shared, MAX_SIZE) and _table(shared) is not None:
            return shared
    return None


def read(path: Path) -> Configuration:
    """The settings in a file. Raises UsageError for an unknown key, rule or threshold, and for a wrong value."""
    table = _table(path)
    if table is None:
        raise UsageError(f"{path}: has no [tool.normdoctor]", "Add the table, or leave out --settings.")
    values: dict[str, Any] = {}
    for key, raw in table.items():
        if key not in READERS:
            raise UsageError(f"{path}: unknown key {key!r}", f"{did_you_mean(key, READERS)}Keys: {', '.join(READERS)}.")
        try:
            values[key.replace("-", "_")] = READERS[key](raw)
        except _WrongValueError as error:
            raise UsageError(f"{path}: {key} {error}", EXAMPLES[key]) from None
        except UsageError as error:
            raise UsageError(f"{path}: {key}: {error.message}", error.hint) from None
    if "baseline" in values:
        values["baseline"] = path.parent / values["baseline"]
    return Configuration(**values, path=path, origins=dict.fromkeys(values, path.name))


def _table(path: Path) -> dict[str, Any] | None:
    try:
        document = tomllib.loads(read_small(path, MAX_SIZE).decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: is not valid TOML ({error})", "Correct it, or add --no-settings.") from None
    tool = document.get("tool")
    table = tool.get("normdoctor") if isinstance(tool, dict) else None
    if table is None and path.name != SHARED_FILE:
        table = document
    if table is not None and not isinstance(table, dict):
        raise UsageError(f"{path}: tool.normdoctor is not a table")
    return table


class _WrongValueError(Exception):
    """What a value must be, as the end of a sentence that begins with its key."""


def _codes(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list) or not all(isinstance(code, str) for code in value):
        raise _WrongValueError("must be a list of rule codes")
    choose_rules(value, ())
    return tuple(code.strip().upper() for code in value)


def _layer_ignores(value: Any) -> tuple[LayerIgnore, ...]:
    if not isinstance(value, dict):
        raise _WrongValueError("must be a table of layer globs")
    return tuple(_layer_ignore(glob, entry) for glob, entry in value.items())


def _layer_ignore(glob: str, entry: Any) -> LayerIgnore:
    reason = ""
    if isinstance(entry, dict):
        for key in entry:
            if key not in ("ignore", "reason"):
                hint = did_you_mean(key, ("ignore", "reason"))
                raise UsageError(f"unknown key {key!r} for {glob!r}", f"{hint}Keys: ignore, reason.")
        reason, entry = entry.get("reason", ""), entry.get("ignore")
    if not isinstance(reason, str):
        raise _WrongValueError(f"has a reason for {glob!r} that is no text")
    if entry is None:
        raise _WrongValueError(f"does not say what to ignore for {glob!r}")
    return LayerIgnore(glob=glob, codes=_codes(entry), reason=reason)


def _thresholds(value: Any) -> dict[str, dict[str, float]]:
    if not isinstance(value, dict) or not all(isinstance(limits, dict) for limits in value.values()):
        raise _WrongValueError("must be a table of rules, each with its thresholds")
    for limits in value.values():
        for name, number in limits.items():
            _number(number, f"has a value for {name} that is no number")
    return checked_limits(value)


def _number(value: Any, wrong: str = "must be a number") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _WrongValueError(wrong)
    return float(value)


def _one_of(words: tuple[str, ...]) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if not isinstance(value, str) or value not in words:
            guess = did_you_mean(value, words) if isinstance(value, str) else ""
            raise UsageError(f"{value!r} is not one of {', '.join(words)}", guess.strip())
        return value

    return read


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _WrongValueError("must be true or false")
    return value


def _path(value: Any) -> Path:
    if not isinstance(value, str) or not value:
        raise _WrongValueError("must be the path of a file")
    return Path(value)


READERS: Mapping[str, Callable[[Any], Any]] = {
    "select": _codes,
    "ignore": _codes,
    "per-layer-ignores": _layer_ignores,
    "thresholds": _thresholds,
    "fail-on": _one_of(FAIL_ON),
    "eps": lambda value: check_eps(_number(value)),
    "momentum": lambda value: check_momentum(_number(value)),
    "assume": _flag,
    "target": check_precision,
    "baseline": _path,
}
"""Key → what turns its value into the setting, or raises."""

EXAMPLES = {
    "select": 'Example: select = ["S", "A2", "C305"]',
    "ignore": 'Example: ignore = ["S106"]',
    "per-layer-ignores": 'Example: "head.*" = { ignore = ["S104"], reason = "re-estimated later" }',
    "thresholds": "Example: S104 = { error = 0.2 }",
    "eps": "Example: eps = 0.001",
    "momentum": "Example: momentum = 0.03",
    "assume": "Example: assume = false",
    "baseline": 'Example: baseline = "normdoctor-baseline.json"',
}
