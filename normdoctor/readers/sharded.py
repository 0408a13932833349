"""Hugging Face sharded checkpoints: an index (name of a tensor → file) and the shards, safetensors or torch.save.

Only the shards that can hold a norm by the names in the index are opened. All their tensors are then read as one
state_dict: what is decided on a whole model is decided on the whole model.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from normdoctor.errors import InputError
from normdoctor.layers import TRACKING_KINDS, ArrayRef, Checkpoint, Container, NormLayer, Reference
from normdoctor.readers.arrays import Source, path_inside
from normdoctor.readers.naming import by_parent, possible_norms, read_names, why_no_norms
from normdoctor.readers.safetensors import unique_names

INDEX_NAME = re.compile(r"\.index(\.[\w-]+)?\.json$")
"""model.safetensors.index.json, pytorch_model.bin.index.json; a variant stands in front or in the middle."""

SHARD_NAME = re.compile(r"-(\d{1,6})-of-(\d{1,6})\.[^.]+$")
"""model-00001-of-00002.safetensors: how transformers and huggingface_hub call a shard."""

ENDS = 2
"""Where tensors are dealt out in order, so many layers of one shard are cut."""
SHOWN = 5

MAX_INDEX = 32 << 20
MAX_ENTRIES = 300_000
"""An index of a mixture of 384 experts in 61 layers has 140,000 entries and 15 MB."""
MAX_BRACKETS = 1000
MAX_SHARDS = 10_000
MAX_BESIDE = 512
"""Files among which the index of a single file is looked for, which no other file of a large folder should pay for."""
MAX_BESIDE_SHARD = 2 * MAX_SHARDS
"""The same for a file that is called a shard."""

PLACE_OF_KEY = 1 << 16
"""The key weight_map is looked for in this many first bytes."""


def is_index(source: Source) -> bool:
    """Whether the file begins like a JSON object with a weight_map."""
    if source.read_at(0, min(source.size, 16)).lstrip()[:1] != b"{":
        return False
    return b'"weight_map"' in source.read_at(0, min(source.size, PLACE_OF_KEY))


def read_index(source: Source) -> dict[str, Path]:
    """The tensors' names → the paths of their shards, in the order of the file.

    Raises InputError for a damaged index and for a shard outside of the index's folder."""
    if source.size > MAX_INDEX:
        raise _damaged(source, f"it has {source.size:,} bytes, more than the index of any model")
    raw = source.read_at(0, source.size)
    # Objects take far more memory than their text, so they are counted before they are made.
    if raw.count(b"{") + raw.count(b"[") > MAX_BRACKETS or raw.count(b",") > MAX_ENTRIES:
        raise _damaged(source, "it has more entries than the index of any model")
    try:
        content = json.loads(raw, object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        raise _damaged(source, f"it is not valid JSON ({error})") from None
    named = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise _damaged(source, "its weight_map does not say the file of each tensor")
    if len(set(named.values())) > MAX_SHARDS:
        raise _damaged(source, f"it names more than {MAX_SHARDS:,} shards")
    shards = {name: path_inside(source.path.parent, name) for name in set(named.values())}
    return {name: shards[shard] for name, shard in named.items()}


def read(source: Source, open_shard: Callable[[Path], Checkpoint]) -> Checkpoint:
    """The checkpoint that an index describes. open_shard opens one file that is no index.

    Raises InputError for a damaged index, and for a shard that is needed and missing or damaged."""
    places = read_index(source)
    shards = sorted(set(places.values()), key=lambda path: natural_order(str(path)))
    wanted = {places[name] for name in possible_norms(places)}
    needed = [shard for shard in shards if shard in wanted]
    _check_presence(source, needed, len(shards))
    with ExitStack() as stack:
        stack.callback(source.close)
        opened = {shard: stack.enter_context(_open(shard, open_shard)) for shard in needed}
        found = {shard: _tensors_of(checkpoint) for shard, checkpoint in opened.items()}
        tensors = {name: found[places[name]][name] for name in _ordered(places, opened, found)}
        model = read_names(tensors)
        kept = stack.pop_all()

    def every_tensor() -> tuple[Reference, ...]:
        """Also those of the shards that hold no norm, which are opened for it."""
        _check_presence(source, shards, len(shards))
        for shard in shards:
            if shard not in opened:
                opened[shard] = kept.enter_context(_open(shard, open_shard))
                found[shard] = _tensors_of(opened[shard])
        names = _ordered(places, opened, found)
        return tuple(Reference(name, found[places[name]][name]) for name in names)

    notes = [note for shard in opened.values() if shard.layers for note in shard.notes]
    notes += _disagreements(places, found)
    if len(needed) < len(shards):
        notes.append(
            f"{len(needed)} of {len(shards)} shards were opened: by the names in the index the others hold no norm"
        )
    elif not model.layers and (why := why_no_norms(tensors)):
        notes.append(f"no norm layers: {why}")
    kinds = {"safetensors" if c.container is Container.SAFETENSORS else "PyTorch" for c in opened.values()}
    count = "1 shard" if len(shards) == 1 else f"{len(shards)} shards"
    calls = {call: None for checkpoint in opened.values() for call in checkpoint.load_calls}
    return Checkpoint(
        path=str(source.path),
        format=f"{' and '.join(sorted(kinds)) or 'sharded'} state_dict ({count})",
        container=Container.FOLDER,
        models=(model,),
        notes=tuple(dict.fromkeys(notes)),
        list_references=every_tensor,
        load_calls=tuple(sorted(calls, key=lambda call: (-call.danger.value, call.name))),
        bytes_total=source.size + sum(map(_size_of, shards)),
        count_bytes_read=lambda: source.bytes_read + sum(shard.count_bytes_read() for shard in opened.values()),
        on_close=kept.close,
    )


def natural_order(name: str) -> tuple[object, ...]:
    """A key to sort by that takes numbers as such: layers.2 before layers.10."""
    parts: list[object] = re.split("([0-9]+)", name)
    parts[1::2] = [(len(digits), digits) for part in parts[1::2] for digits in [str(part).lstrip("0")]]
    return tuple(parts)


def _check_presence(index: Source, needed: Iterable[Path], total: int) -> None:
    missing = [shard.name[:200] for shard in needed if not _exists(shard)]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{index.path}: the shard {missing[0]}{others} is missing",
            f"Put all {total} shards beside the index; a download or a copy was not complete.",
        )


def _open(path: Path, open_shard: Callable[[Path], Checkpoint]) -> Checkpoint:
    checkpoint = open_shard(path)
    if checkpoint.container not in (Container.SAFETENSORS, Container.ZIP, Container.LEGACY):
        checkpoint.close()
        raise InputError(f"{path}: a shard that is {checkpoint.format}", "Shards are safetensors or torch.save files.")
    return checkpoint


def _tensors_of(shard: Checkpoint) -> dict[str, ArrayRef]:
    """The tensors in the shard's own order, which safetensors does not keep: there the natural one of the names."""
    tensors = {ref.name: ref.array for ref in shard.list_references() if ref.name}
    if shard.container is Container.SAFETENSORS:
        return {name: tensors[name] for name in sorted(tensors, key=natural_order)}
    return tensors


def _ordered(
    places: Mapping[str, Path], opened: Iterable[Path], found: Mapping[Path, Mapping[str, ArrayRef]]
) -> Iterator[str]:
    """The names that index and shards agree on, in the model's order as far as it can be told.

    Most writers sort the index by name, and fill the shards in the model's order."""
    names = list(places)
    if names != sorted(names):
        return (name for name in names if name in found.get(places[name], ()))
    return (name for shard in opened for name in found[shard] if places.get(name) == shard)


def _disagreements(places: Mapping[str, Path], found: Mapping[Path, Mapping[str, ArrayRef]]) -> Iterator[str]:
    absent = [name for name, shard in places.items() if shard in found and name not in found[shard]]
    unlisted = [name for shard, tensors in found.items() for name in tensors if places.get(name) != shard]
    if absent:
        yield (
            f"named in the index but not in their shard, so that layers are judged without them: {len(absent):,} "
            f"(the first is {absent[0]} in {places[absent[0]].name})"
        )
    if unlisted:
        yield f"in the shards but not in the index, and not judged: {len(unlisted):,} (the first is {unlisted[0]})"


@dataclass(frozen=True)
class Cut:
    """The layers of one shard of which some tensors lie in another, and what is to be said of them."""

    names: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def cut_layers(checkpoint: Checkpoint) -> Cut:
    """Which layers of a single file lie partly in another shard, by the index beside it.

    Where there is none, but the name says that the file is a shard, those that lack what the others have; its
    two ends cut two layers at most. Nothing is raised here for an index that cannot be read."""
    path = Path(checkpoint.path)
    if checkpoint.container not in (Container.SAFETENSORS, Container.ZIP, Container.LEGACY):
        return Cut()
    number = SHARD_NAME.search(path.name)
    what = f"shard {int(number[1])} of {int(number[2])}" if number else "a shard"
    places, notes = _index_beside(path, MAX_BESIDE_SHARD if number else MAX_BESIDE)
    if places is not None:
        spread = {parent for parent, leaves in by_parent(places).items() if len(set(leaves.values())) > 1}
        names = [layer.name for layer in checkpoint.layers if layer.name in spread]
        if names:
            notes.append(f"{what}: {_lie(names)} partly in another shard, so not judged here; inspect the folder")
        return Cut(frozenset(names), tuple(notes))
    if number is None or int(number[2]) < 2:
        return Cut(notes=tuple(notes))
    names = [layer.name for layer in checkpoint.layers if _lacks_statistics(layer, checkpoint.layers)]
    if not 0 < len(names) <= ENDS:
        notes.append(f"{what}, without an index that lists it: layers may lie partly in another shard")
        return Cut(notes=tuple(notes))
    notes.append(
        f"{what}, without an index that lists it: {_lie(names)} partly in another shard, as it seems, so "
        "not judged here; inspect the folder of all shards and their index"
    )
    return Cut(frozenset(names), tuple(notes))


def without_cut_layers(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without the layers that lie partly in another shard, and with a note on them."""
    cut = cut_layers(checkpoint)
    models = checkpoint.models
    if cut.names:
        models = tuple(
            replace(model, layers=tuple(layer for layer in model.layers if layer.name not in cut.names))
            for model in models
        )
    return replace(checkpoint, models=models, notes=(*checkpoint.notes, *cut.notes)) if cut.notes else checkpoint


def _index_beside(path: Path, most: int) -> tuple[dict[str, Path] | None, list[str]]:
    """What the index that lists this file says, None where there is none; and notes on what cannot be read."""
    notes: list[str] = []
    with suppress(OSError, ValueError), os.scandir(path.parent) as entries:
        for entry in islice(entries, most):
            if entry.name.endswith(".json") and INDEX_NAME.search(entry.name):
                index = path.parent / entry.name
                try:
                    with Source(index) as source:
                        places = read_index(source) if is_index(source) and _mentions(source, path.name) else {}
                except InputError as error:
                    notes.append(f"{error}; layers may lie partly in another shard")
                    continue
                if path in places.values():
                    return places, []
    return None, sorted(notes)


def _mentions(source: Source, name: str) -> bool:
    """Whether the name of a file stands in an index, which is told far quicker than the index is read."""
    raw = source.read_at(0, min(source.size, MAX_INDEX))
    return any(json.dumps(name, ensure_ascii=escaped).encode(errors="replace") in raw for escaped in (True, False))


def _lacks_statistics(layer: NormLayer, others: Iterable[NormLayer]) -> bool:
    """Half of the running statistics is missing, or all of them where another BatchNorm has them."""
    if layer.kind not in TRACKING_KINDS:
        return False
    if layer.running_mean is None and layer.running_var is None:
        return any(other.kind is layer.kind and other.running_var is not None for other in others)
    return layer.running_mean is None or layer.running_var is None


def _lie(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    return f"{shown} {'lies' if len(names) == 1 else 'lie'}"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, a folder that may not be searched
        return False


def _size_of(path: Path) -> int:
    with suppress(OSError, ValueError):  # one that is not needed may be missing
        return path.stat().st_size
    return 0


def _damaged(source: Source, how: str) -> InputError:
    return InputError(f"{source.path}: the index is damaged: {how}", "Copy or download it again.")
