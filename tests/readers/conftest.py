"""Files for the tests of readers: checkpoints around any pickle, in both of torch's containers."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from normdoctor.layers import Checkpoint
from normdoctor.readers import open_checkpoint

torch.set_num_threads(1)  # for tensors this small more threads only wait for each other

MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
HEADERS = MAGIC + pickle.dumps(1001, 2) + pickle.dumps({"protocol_version": 1001, "little_endian": True}, 2)


@pytest.fixture
def read() -> Iterator[Callable[[Any], Checkpoint]]:
    """open_checkpoint, closed when the test ends."""
    with ExitStack() as stack:
        yield lambda target: stack.enter_context(open_checkpoint(target))


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """An object → a file by torch.save; legacy=True for the older container."""

    def write(content: Any, name: str = "model.pt", *, legacy: bool = False, **options: Any) -> Path:
        path = tmp_path / name
        torch.save(content, path, _use_new_zipfile_serialization=not legacy, **options)
        return path

    return write


@pytest.fixture
def reread(save: Callable[..., Path], read: Callable[[Any], Checkpoint]) -> Callable[..., Checkpoint]:
    """An object → what normdoctor reads from its file."""
    return lambda content, **options: read(save(content, **options))


@pytest.fixture(params=["zip", "legacy"])
def wrap(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    """The bytes of a pickle → a file of each container, with storages given as key → (elements, bytes)."""

    def write(pickled: bytes, storages: Mapping[str, tuple[int, bytes]] | None = None, name: str = "m.pt") -> Path:
        storages, path = storages or {}, tmp_path / name
        if request.param == "zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/data.pkl", pickled)
                archive.writestr("archive/byteorder", b"little")
                for key, (_, data) in storages.items():
                    archive.writestr(f"archive/data/{key}", data)
                archive.writestr("archive/version", b"3\n")
        else:
            data = b"".join(struct.pack("<q", count) + raw for count, raw in storages.values())
            path.write_bytes(HEADERS + pickled + pickle.dumps(list(storages), 2) + data)
        return path

    return write
