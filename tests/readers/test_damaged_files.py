"""Files cut short, flipped, padded, doubled or of another kind: an InputError that helps, or a checkpoint. No more."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from normdoctor.errors import InputError
from normdoctor.inspection import inspect
from normdoctor.layers import Checkpoint
from normdoctor.readers import open_checkpoint, torch_pickle
from normdoctor.readers.safetensors import MAX_HEADER

Read = Callable[[Any], Checkpoint]
Save = Callable[..., Path]


def refused(path: Path, words: str = "") -> None:
    with pytest.raises(InputError, match=words or None) as caught:
        inspect(path)
    assert caught.value.hint
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def outcome(path: Path) -> str:
    """What happens to a damaged file. Anything but an InputError comes through."""
    try:
        report = inspect(path)
    except InputError as error:
        assert error.hint and str(path) in error.message, error.message
        return "refused"
    return f"{len(report.layers)} layers"


def small(folder: Path, form: str) -> Path:
    """The smallest honest file of each container: one BatchNorm of two channels."""
    state, path = nn.BatchNorm1d(2).state_dict(), folder / "small"
    if form == "safetensors":
        safetensors.torch.save_file(state, path)
    elif form == "deflated":
        torch.save(state, folder / "plain")
        repack(folder / "plain", path, zipfile.ZIP_DEFLATED)
        (folder / "plain").unlink()
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form != "legacy")
    return path


def repack(source: Path, target: Path, compression: int = zipfile.ZIP_STORED, **changes: bytes | None) -> None:
    """The records of a zip written anew; `changes` by the end of a record's name (None: left out)."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            data = changes.get(name.rpartition("/")[2].replace(".", "_"), old.read(name))
            if data is not None:
                new.writestr(name, data)


FORMS = ["zip", "deflated", "legacy", "safetensors"]


@pytest.mark.parametrize("form", FORMS)
def test_cut_at_every_byte(form: str, tmp_path: Path) -> None:
    path = small(tmp_path, form)
    assert outcome(path) == "1 layers"
    for length in reversed(range(path.stat().st_size)):
        os.truncate(path, length)
        assert outcome(path) == "refused", length


@pytest.mark.parametrize("form", FORMS)
def test_single_bits_flipped(form: str, tmp_path: Path) -> None:
    raw = small(tmp_path, form).read_bytes()
    dice, seen = random.Random(form), set()
    for _ in range(400):
        place, bit = dice.randrange(len(raw)), 1 << dice.randrange(8)
        flipped = bytearray(raw)
        flipped[place] ^= bit
        path = tmp_path / "flipped"
        path.write_bytes(flipped)
        seen.add(outcome(path))
    assert "refused" in seen and "1 layers" in seen


@pytest.mark.parametrize("form", FORMS)
def test_random_bytes_overwritten(form: str, tmp_path: Path) -> None:
    raw = small(tmp_path, form).read_bytes()
    dice = random.Random(form)
    for _ in range(150):
        broken = bytearray(raw)
        for _ in range(dice.randrange(1, 9)):
            place = dice.randrange(len(raw))
            broken[place : place + 4] = dice.choice([b"\xff" * 4, b"\x00" * 4, dice.randbytes(4)])
        path = tmp_path / "broken"
        path.write_bytes(broken)
        outcome(path)


# Other files ---------------------------------------------------------------------------------------------


def test_what_is_no_file(tmp_path: Path) -> None:
    refused(tmp_path / "missing.pt", "no such file")
    refused(tmp_path, "is a folder")
    refused(tmp_path / "a" / "b", "no such file")
    refused(tmp_path / ("a" * 300), "cannot be read")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "empty")
    refused(tmp_path / "file" / "inside", "cannot be read|no such file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(tmp_path / "loop", "cannot be read")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "pipe")
    with pytest.raises(InputError, match="cannot be read"):
        open_checkpoint("zero\0byte")
    with pytest.raises(InputError, match="cannot inspect a dict") as caught:
        open_checkpoint({})
    assert caught.value.hint


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path, save: Save) -> None:
    path = save(nn.BatchNorm1d(2).state_dict())
    path.chmod(0)
    refused(path, "no permission")


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.ones(3))
    return stream.getvalue()


def tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    return stream.getvalue()


def zip_of(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return stream.getvalue()


OTHERS: dict[str, tuple[bytes, str]] = {
    "text": (b"lr: 0.1\nepochs: 3\n", "looks like text"),
    "zeros": (bytes(5000), "zeros only"),
    "noise": (random.Random(0).randbytes(5000), "no known format"),
    "one byte": (b"\x80", "not a model"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "GGUF": (b"GGUF" + bytes(100), "GGUF"),
    "npy": (b"\x93NUMPY\x01\x00", "NumPy array"),
    "npz": (npz(), r"NumPy archive \(.npz\)"),
    "gzip": (gzip.compress(b"x" * 100), "gzip"),
    "xz": (b"\xfd7zXZ\x00\x00", "xz file"),
    "tar": (tar(), "tar archive"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    "a web page": (b"<!DOCTYPE html><html></html>", "HTML page"),
    "a bare pickle": (pickle.dumps({"a": 1}), r"plain Python pickle, not written by torch\.save$"),
    "Keras": (zip_of("model.weights.h5", "config.json"), "Keras"),
    "pt2 without a graph": (
        zip_of("archive/archive_format", "archive/models/model.json", "archive/version"),
        "model.json is not valid JSON",
    ),
    "pt2 without its mark": (zip_of("archive/models/model.json", "archive/version"), "without its archive_format"),
    "AOTInductor": (zip_of("archive/data/aotinductor/model/wrapper.so", "archive/version"), "AOTInductor"),
    "an empty zip": (zip_of(), "without a data.pkl"),
    "any zip": (zip_of("a.txt", "deep/er/data.pkl"), "without a data.pkl"),
}


@pytest.mark.parametrize("raw, words", OTHERS.values(), ids=OTHERS)
def test_other_kinds_of_files_are_named(raw: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(raw)
    refused(path, words)


class Acting:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo loaded > loaded",)


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_what_a_bare_pickle_would_call(cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it breaks off after the call, which loading would have made by then."""
    monkeypatch.chdir(tmp_path)
    raw = pickle.dumps([Acting(), "x"])
    path = tmp_path / "model.pkl"
    path.write_bytes(raw[: len(raw) - cut])
    with pytest.raises(InputError, match=r"loading it would call (posix|nt)\.system") as caught:
        open_checkpoint(path)
    assert caught.value.hint.startswith("Do not load it")
    assert not (tmp_path / "loaded").exists()


def test_a_harmless_bare_pickle_is_a_matter_of_trust(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"w": np.zeros(3)}))
    with pytest.raises(InputError, match="plain Python pickle") as caught:
        open_checkpoint(path)
    assert caught.value.hint.startswith("If you trust where it comes from, ")


def test_a_bare_pickle_without_end_takes_little_time(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(b"\x80\x04" + b"N0" * 5_000_000)
    begin = time.process_time()
    refused(path, "plain Python pickle")
    assert time.process_time() - begin < 3


def test_the_suffix_decides_nothing(save: Save, tmp_path: Path) -> None:
    state = nn.BatchNorm1d(2).state_dict()
    assert inspect(save(state, name="model.safetensors")).format.startswith("PyTorch")
    safetensors.torch.save_file(state, tmp_path / "model.pt")
    assert inspect(tmp_path / "model.pt").format.startswith("safetensors")


def test_a_tar_that_begins_like_a_pickle_is_a_tar(tmp_path: Path) -> None:
    """torch.load looks for a tar before it looks for pickles, and unpickles what is inside."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("a"))
    raw = bytearray(stream.getvalue())
    head = pickle.dumps(torch_pickle.LEGACY_MAGIC, 2) + pickle.dumps(torch_pickle.LEGACY_PROTOCOL, 2)
    raw[: len(head)] = head
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    (tmp_path / "both.pt").write_bytes(raw)
    refused(tmp_path / "both.pt", "tar archive")


# Zip -----------------------------------------------------------------------------------------------------


@pytest.fixture
def plain(save: Save) -> Path:
    return save(nn.BatchNorm1d(300).state_dict(), name="plain.pt")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "changed.pt"


def record(path: Path, ending: str) -> zipfile.ZipInfo:
    with zipfile.ZipFile(path) as archive:
        return next(info for info in archive.infolist() if info.filename.endswith(ending))


def data_place(path: Path, ending: str) -> int:
    """Where the bytes of a record begin."""
    info = record(path, ending)
    raw = path.read_bytes()
    name_length, extra_length = struct.unpack_from("<HH", raw, info.header_offset + 26)
    return info.header_offset + 30 + name_length + extra_length


def directory_place(path: Path, ending: str) -> int:
    """Where the entry of a record in the central directory begins."""
    with zipfile.ZipFile(path) as archive:
        place = archive.start_dir
    raw = path.read_bytes()
    while True:
        lengths = struct.unpack_from("<3H", raw, place + 28)
        if raw[place + 46 : place + 46 + lengths[0]].decode().endswith(ending):
            return place
        place += 46 + sum(lengths)


def patch(path: Path, place: int, data: bytes) -> None:
    with path.open("rb+") as file:
        file.seek(place)
        file.write(data)


def test_a_corrupt_record_is_named(plain: Path) -> None:
    patch(plain, data_place(plain, "data/0") + 8, b"\x12\x34")
    refused(plain, "data/0 does not match its checksum")


def test_a_corrupt_pickle(plain: Path) -> None:
    with zipfile.ZipFile(plain) as archive:
        pickled = archive.read("plain/data.pkl")
    place = data_place(plain, "data.pkl") + pickled.index(b"weight")
    patch(plain, place, b"WEIGHT")
    refused(plain, "data.pkl does not match its checksum")


@pytest.mark.parametrize("names", [("data/0", "data/0"), ("data.pkl", "DATA.PKL"), ("data/0", "DATA/0")])
def test_two_records_that_a_loader_may_take_for_each_other(names: tuple[str, str], plain: Path, target: Path) -> None:
    """torch finds records without regard to case: with data.PKL in front it loads another pickle than we read."""
    repack(plain, target)
    with zipfile.ZipFile(target, "a") as archive:
        place = archive.infolist()[0].filename.partition("/")[0]
        archive.filelist = [info for info in archive.filelist if not info.filename.endswith(names[0])]
        for name in names:
            archive.NameToInfo.clear()
            archive.writestr(f"{place}/{name}", pickle.dumps({}))
    refused(target, "two records can be read as")


def test_a_name_with_an_end_of_its_own(plain: Path, target: Path) -> None:
    """zipfile reads a name up to its first zero byte."""
    repack(plain, target)
    with zipfile.ZipFile(target, "a") as archive:
        archive.writestr("plain/data.pklXhidden", b"")
    raw = target.read_bytes().replace(b"data.pklXhidden", b"data.pkl\0hidden")
    target.write_bytes(raw)
    refused(target, "two records can be read as plain/data.pkl")


def test_two_pickles(plain: Path, target: Path) -> None:
    repack(plain, target)
    with zipfile.ZipFile(target, "a") as archive:
        archive.writestr("other/data.pkl", pickle.dumps({}))
    refused(target, "several data.pkl")


def test_two_directories(tmp_path: Path) -> None:
    """zipfile looks for the directory in front of its end, torch where the end says it is."""

    def archive(word: str) -> tuple[bytes, bytes, bytes]:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"word": word}, 2))
            archive.writestr("archive/version", b"3\n")
            start = archive.start_dir
        raw = stream.getvalue()
        end = raw.rindex(b"PK\x05\x06")
        start = struct.unpack_from("<I", raw, end + 16)[0]
        return raw[:start], raw[start:end], raw[end:]

    (good, good_directory, end), (evil, evil_directory, _) = archive("good"), archive("evil")
    path = tmp_path / "two.pt"
    path.write_bytes(evil + evil_directory + good + good_directory + end)
    with zipfile.ZipFile(path) as seen:
        assert b"good" in seen.read("archive/data.pkl")
    assert torch.load(path) == {"word": "evil"}
    refused(path, "directory of the zip is not where its end says")


@pytest.mark.parametrize("cut", [1, 100, 500, 2000, 5000])
def test_a_lost_end_behind_another_zip(cut: int, tmp_path: Path) -> None:
    """A .pt2 holds whole zips. When its end is cut off, the end of one of those is the last in the file."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("a/data.pkl", b"x" * 1000)
    path = tmp_path / "cut.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/archive_format", b"pt2")
        archive.writestr("m/data/weights/a.pt", inner.getvalue())
        for number in range(60):
            archive.writestr(f"m/extra/{number}", b"y" * 100)
    os.truncate(path, path.stat().st_size - cut)
    with pytest.raises(InputError, match=r"zip container is damaged: its end is missing|not a zip file") as caught:
        open_checkpoint(path)
    assert "truncated" in caught.value.hint and "copy or download it again" in caught.value.hint


def test_bytes_around_the_zip(plain: Path, target: Path) -> None:
    target.write_bytes(plain.read_bytes() + b"trailing" * 100)
    assert outcome(target) in ("refused", "1 layers")
    target.write_bytes(b"#!/bin/sh\n" + plain.read_bytes())
    refused(target)
    with zipfile.ZipFile(plain, "a") as archive:
        archive.comment = b"a comment"
    assert outcome(plain) == "1 layers"


def test_a_header_that_names_something_else(plain: Path) -> None:
    patch(plain, record(plain, "data/0").header_offset + 30, b"PLAIN")
    refused(plain, "header of its own that names something else")


def test_lying_sizes(plain: Path) -> None:
    entry = directory_place(plain, "data/0")
    for place, value in ((20, 10**6), (24, 10**6), (20, 4), (24, 4)):
        raw = plain.read_bytes()
        patch(plain, entry + place, struct.pack("<I", value))
        refused(plain)
        plain.write_bytes(raw)
    patch(plain, entry + 20, struct.pack("<II", 2**31, 2**31))
    refused(plain, "claims a size")


def test_offsets_beyond_the_file(plain: Path) -> None:
    patch(plain, directory_place(plain, "data/0") + 42, struct.pack("<I", 2**31))
    refused(plain)


def test_a_record_shorter_than_its_tensor(plain: Path, target: Path) -> None:
    repack(plain, target, **{"0": b"1234"})
    refused(target, "does not fit its storage")
    repack(plain, target, **{"0": None})
    refused(target, "data/0 is missing")


def test_flags_and_methods_that_torch_does_not_read(plain: Path) -> None:
    entry, raw = directory_place(plain, "data/0"), plain.read_bytes()
    patch(plain, entry + 8, b"\x01")
    refused(plain, "encrypted")
    plain.write_bytes(raw)
    patch(plain, entry + 10, struct.pack("<H", zipfile.ZIP_LZMA))
    refused(plain, "compressed in a way")


def test_deflated_records_are_read_and_checked(plain: Path, target: Path, read: Read) -> None:
    state = nn.BatchNorm1d(300).state_dict()
    repack(plain, target, zipfile.ZIP_DEFLATED)
    (layer,) = read(target).layers
    np.testing.assert_array_equal(layer.running_var.numpy(), state["running_var"].numpy())
    place = data_place(target, "data/0")
    patch(target, place, bytes([target.read_bytes()[place] ^ 0x06]))
    refused(target, "data/0 does not match its checksum")


def test_bombs(plain: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One record that inflates to more than all may together, or many that do so together."""
    monkeypatch.setattr(torch_pickle, "MAX_INFLATED", 4 << 20)
    repack(plain, target, zipfile.ZIP_DEFLATED, data_pkl=bytes(5 << 20))
    assert target.stat().st_size < 20_000
    refused(target, "data.pkl is compressed and would take 5,242,880 bytes")
    repack(plain, target, zipfile.ZIP_DEFLATED, **{key: bytes(1 << 20) for key in "0123"})
    refused(target, "compressed records take more than")


def test_zip64(plain: Path, target: Path) -> None:
    """Sizes and offsets in the fields for files beyond 4 GB."""
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            with new.open(name, "w", force_zip64=True) as file:
                file.write(old.read(name))
    assert outcome(target) == "1 layers"
    raw = target.read_bytes()
    end = raw.rindex(b"PK\x05\x06")
    entries, size, start = struct.unpack_from("<HII", raw, end + 10)
    end64 = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, entries, entries, size, start)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
    short = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
    target.write_bytes(raw[:end] + end64 + locator + short)
    assert outcome(target) == "1 layers"
    assert set(torch.load(target)) == set(torch.load(plain))
    target.write_bytes(raw[:end] + end64 + locator.replace(struct.pack("<Q", end), struct.pack("<Q", 0)) + short)
    refused(target)


# Legacy --------------------------------------------------------------------------------------------------


def legacy(keys: Any, storages: bytes, count: int = 4) -> bytes:
    tensor = (
        b"\x80\x02}X\x09\x00\x00\x00bn.weightctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n"
        b"FloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ" + struct.pack("<i", count) + b"NtQK\x00"
        b"J" + struct.pack("<i", count) + b"\x85K\x01\x85\x89}tRs."
    )
    headers = [torch_pickle.LEGACY_MAGIC, torch_pickle.LEGACY_PROTOCOL, {"little_endian": True}]
    return b"".join(pickle.dumps(h, 2) for h in headers) + tensor + pickle.dumps(keys, 2) + storages


FOUR = struct.pack("<q4f", 4, 1, 2, 3, 4)


def test_the_legacy_container_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "l.pt"
    path.write_bytes(legacy(["0"], FOUR))
    assert torch.load(path)["bn.weight"].tolist() == [1, 2, 3, 4]
    assert outcome(path) == "1 layers"


@pytest.mark.parametrize(
    "raw, words",
    [
        (legacy(["0"], struct.pack("<q", 2**40)), "more than the file holds"),
        (legacy(["0"], struct.pack("<q", -1)), "more than the file holds"),
        (legacy(["0", "0"], FOUR * 2), "listed twice"),
        (legacy([], b""), "cannot be located"),
        (legacy(["9"], FOUR), "cannot be located"),
        (legacy([["0"]], FOUR), "cannot be located"),
        (legacy({"0": 1}, FOUR), "headers"),
        (legacy(["0"], struct.pack("<q2f", 2, 1, 2)), "does not fit"),
        (legacy(["0"], FOUR)[:-9], "more than the file holds"),
        (legacy(["0"], FOUR).replace(b"\x80\x02M\xe9\x03.", b"\x80\x02M\xe9\x04."), "headers"),
    ],
)  # fmt: skip
def test_damaged_legacy_containers(raw: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "l.pt").write_bytes(raw)
    refused(tmp_path / "l.pt", words)


# safetensors ---------------------------------------------------------------------------------------------


def safe(header: Any, data: bytes = bytes(16), length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes


BAD_HEADERS: dict[str, tuple[bytes, str]] = {
    "no JSON": (safe(b"{not json at all"), "not valid JSON"),
    "not UTF-8": (safe(b'{"\xff": 1}'), "not valid JSON"),
    "a name twice": (safe(b'{"a": {}, "a": {}}'), "occurs twice"),
    "deep": (safe(b'{"a":' * 100_000), "not valid JSON"),
    "a long header": (safe({"w": entry()}, length=10**6), "claims"),
    "no entry": (safe({"w": 3}), "malformed"),
    "no shape": (safe({"w": {"dtype": "F32", "data_offsets": [0, 16]}}), "malformed"),
    "a text for a shape": (safe({"w": entry(shape="4")}), "malformed"),
    "a negative shape": (safe({"w": entry(shape=[-4])}), "malformed"),
    "a fraction": (safe({"w": entry(shape=[4.0])}), "malformed"),
    "a list for a type": (safe({"w": entry(dtype=["F32"])}), "malformed"),
    "a number for a type": (safe({"w": entry(dtype=32)}), "malformed"),
    "three offsets": (safe({"w": entry(data_offsets=[0, 8, 16])}), "malformed"),
    "offsets the wrong way": (safe({"w": entry(data_offsets=[16, 0])}), "beyond"),
    "offsets beyond": (safe({"w": entry(data_offsets=[16, 32])}), "beyond"),
    "too few bytes": (safe({"w": entry(shape=[3])}), "16 bytes for the shape"),
    "too many bytes": (safe({"w": entry(shape=[10**30])}), "fit"),
    "overlap": (safe({"v": entry(), "w": entry(shape=[2], data_offsets=[4, 12])}), "overlap"),
}


@pytest.mark.parametrize("raw, words", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_damaged_safetensors(raw: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(raw)
    refused(tmp_path / "m.safetensors", words)


def test_odd_but_readable_safetensors(tmp_path: Path, read: Read) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "bn.weight": entry(),
        "bn.bias": entry(data_offsets=[16, 32]),
        "empty": entry(shape=[0], data_offsets=[32, 32]),
        "of a later version": entry(dtype="F4", data_offsets=[32, 40]),
    }
    (tmp_path / "m.safetensors").write_bytes(safe(header, bytes(40)))
    (layer,) = read(tmp_path / "m.safetensors").layers
    assert (layer.name, layer.channels) == ("bn", 4)


def test_a_header_length_beyond_all_reason_is_another_file(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(safe(b"{}", length=MAX_HEADER + 1))
    refused(tmp_path / "m", "not a model file")


def test_a_file_that_shrinks_while_it_is_read(plain: Path) -> None:
    checkpoint = open_checkpoint(plain)
    os.truncate(plain, 100)
    with checkpoint, pytest.raises(InputError, match=r"became shorter|beyond the end"):
        checkpoint.layers[0].numbers.load()
