"""A path → Checkpoint. The content of the file decides which reader it is given to, never its suffix.

No reader imports torch, executes anything from a file or reads more of it than it is asked for.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from normdoctor.errors import InputError
from normdoctor.layers import Checkpoint
from normdoctor.readers.arrays import Source

OTHER_CONTENTS = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras .h5)", "Export the model to ONNX."),
    (b"GGUF", "a GGUF file", "Inspect the checkpoint it was converted from."),
    (b"\x93NUMPY", "a NumPy array", "Give the checkpoint, not the data."),
    (b"\x1f\x8b", "a gzip file", "Unpack it first."),
    (b"\xfd7zXZ", "an xz file", "Unpack it first."),
    (b"7z\xbc\xaf", "a 7z archive", "Unpack it first."),
    (b"version https://git-lfs", "a Git LFS pointer, not the model itself", "Fetch it with: git lfs pull"),
    (b"<!DOCTYPE", "an HTML page", "The download gave a web page instead of the file; download it again."),
    (b"<html", "an HTML page", "The download gave a web page instead of the file; download it again."),
)
"""First bytes, what the file is then, and what to do."""

READABLE = "normdoctor reads files of torch.save, torch.jit.save and torch.export.save, safetensors and ONNX."


@dataclass(frozen=True)
class Format:
    """One kind of file, in words for users."""

    name: str
    contents: str
    says: str
    """What it says beyond the tensors; the rest is None in the record and never guessed."""
    repaired: bool
    """Whether `recalibrate` writes it."""


FORMATS = (
    Format(
        "PyTorch zip (.pt, .pth, .ckpt, .bin)",
        "state_dicts, nested or several in one file; Lightning, DeepSpeed `module`",
        "update counters",
        True,
    ),
    Format(
        "PyTorch zip, whole module",
        "pickled nn.Module, its class need not be importable",
        "eps, momentum, mode, class",
        True,
    ),
    Format("PyTorch legacy container", "state_dicts and modules of torch before 1.6", "as the zip", True),
    Format(
        "TorchScript (.pt, .ts, .jit)",
        "scripted, traced and frozen modules of torch.jit.save",
        "eps, momentum, mode, class",
        True,
    ),
    Format(
        "PyTorch .pt2 (torch.export)",
        "one exported program or several, branches of control flow",
        "eps, momentum, mode, class",
        True,
    ),
    Format("safetensors", "flat tensors", "update counters", True),
    Format(
        "Hugging Face shards (folder or *.index.json)",
        "safetensors or torch.save; only shards that can hold norms are opened",
        "update counters",
        True,
    ),
    Format(
        "torch.distributed.checkpoint (folder)",
        "nested state_dicts; chunks of FSDP and DTensor are joined",
        "update counters",
        True,
    ),
    Format("ONNX, opset 6 and later", "inline or external data, subgraphs, functions", "eps, momentum, mode", True),
    Format(
        "live nn.Module, or its state_dict",
        "through `nd.inspect(module)`",
        "eps, momentum, mode, class; a state_dict only the counters",
        True,
    ),
)


def open_checkpoint(target: Any, *, cut_layers: bool = False) -> Checkpoint:
    """Open a model file, a folder that is one checkpoint (str or Path), a live nn.Module or its state_dict.

    Close it, or use `with`. cut_layers: of a single shard, keep the layers that lie partly in another one.

    Raises InputError for a file that is missing, damaged, or no model that normdoctor reads."""
    if isinstance(target, (str, Path)):
        from normdoctor.readers import sharded

        path = Path(target)
        with suppress(OSError, ValueError):  # opening it as a file then says what is wrong
            if path.is_dir():
                return _open_folder(path)
        checkpoint = _open_file(path)
        return checkpoint if cut_layers else sharded.without_cut_layers(checkpoint)
    from normdoctor.readers import live_module

    if live_module.is_module(target):
        return live_module.read(target)
    if live_module.is_state_dict(target):
        return live_module.read_state_dict(target)
    raise InputError(
        f"cannot inspect a {type(target).__name__}",
        "Give a path, a torch.nn.Module or its state_dict(): one flat mapping of names to tensors.",
    )


def _open_folder(folder: Path) -> Checkpoint:
    from normdoctor.readers import folders

    checkpoint = _open_file(folders.find_manifest(folder))
    return replace(checkpoint, path=str(folder))


def _open_file(path: Path, shard: bool = False) -> Checkpoint:
    """shard: the file is a part of a checkpoint and cannot be one in several files itself."""
    source = Source(path)
    try:
        several = None if shard else _read_several_files(source)
        return several or _read(source)
    except InputError as error:
        source.close()
        if str(path) in error.message:
            raise
        raise InputError(f"{path}: {error.message}", error.hint) from None  # a tensor does not know its file
    except BaseException:
        source.close()
        raise


def _read_several_files(source: Source) -> Checkpoint | None:
    """The checkpoint whose index or metadata the file is, None for any other file."""
    head = source.read_at(0, min(source.size, 1))
    if head == b"\x80":  # the pickle of a distributed checkpoint's metadata, or a checkpoint of torch before 1.6
        from normdoctor.readers import distributed

        return distributed.read(source) if distributed.is_metadata(source) else None
    if head in (b"{", b" ", b"\n", b"\r", b"\t"):  # JSON
        from normdoctor.readers import sharded

        if sharded.is_index(source):
            return sharded.read(source, lambda path: _open_file(path, shard=True))
    return None


def _read_zip(source: Source) -> Checkpoint:
    from normdoctor.readers import torch_pickle

    records = torch_pickle.ZipRecords(source)
    if torch_pickle.is_exported(records):
        from normdoctor.readers import torch_export

        return torch_export.read(source, records)
    if torch_pickle.is_torchscript(records):
        from normdoctor.readers import torchscript

        return torchscript.read(source, records)
    if records.root is None:
        raise torch_pickle.explain_other_zip(source.path, records)
    return torch_pickle.read_zip(source, records)


def _read(source: Source) -> Checkpoint:
    path = source.path
    if source.size == 0:
        raise InputError(f"{path}: the file is empty", "The save or download failed; do it again.")
    if path.suffix == ".distcp":
        raise InputError(
            f"{path}: what one rank wrote of a torch distributed checkpoint", f"Give its folder: {path.parent}"
        )
    from normdoctor.readers import safetensors, torch_pickle

    if torch_pickle.is_zip(source):
        return _read_zip(source)
    if torch_pickle.is_tar(source):
        raise InputError(
            f"{path}: a tar archive, not a checkpoint that normdoctor reads",
            "Unpack it; if torch before 0.1.10 wrote it, load it there and save it again.",
        )
    if torch_pickle.is_legacy(source):
        return torch_pickle.read_legacy(source)
    if safetensors.is_safetensors(source):
        return safetensors.read(source)
    head = source.read_at(0, min(source.size, 512))
    for start, what, hint in OTHER_CONTENTS:
        if head.startswith(start):
            raise InputError(f"{path}: {what}, not a checkpoint that normdoctor reads", hint)
    if torch_pickle.is_bare_pickle(source):
        raise torch_pickle.explain_bare_pickle(source)
    from normdoctor.readers import onnx

    if onnx.is_onnx(source):
        return onnx.read(source)
    raise InputError(f"{path}: not a model file ({_guess(head)})", READABLE)


def _guess(head: bytes) -> str:
    """What an unknown file looks like."""
    if all(byte >= 32 or byte in b"\t\r\n\f" for byte in head):
        return "it looks like text"
    return "zeros only" if not any(head) else "its first bytes are those of no known format"
