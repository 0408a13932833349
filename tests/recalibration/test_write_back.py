"""Repaired buffers in a copy: those bytes and their checksums differ, nothing else; refused means nothing written."""

from __future__ import annotations

import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import normdoctor as nd
from normdoctor.readers import open_checkpoint
from normdoctor.recalibration.write_back import Change, write_back

FIXTURES = Path(__file__).parents[2] / "fixtures"
CHANGED = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture
def net(nets: ModuleType) -> nn.Module:
    """The network of fixtures/slow_momentum_module.pt: momentum 0.001, 216 updates."""
    loaded: nn.Module = torch.load(FIXTURES / "slow_momentum_module.pt", weights_only=False)
    return loaded


def save(net: nn.Module, form: str, path: Path) -> None:
    if form == "safetensors":
        save_file(net.state_dict(), path)
        return
    content = net if "module" in form else net.state_dict()
    torch.save(content, path, _use_new_zipfile_serialization="legacy" not in form)


def load_state(form: str, path: Path) -> dict[str, torch.Tensor]:
    if form == "safetensors":
        return load_file(path)
    loaded = torch.load(path, weights_only="module" not in form)
    return loaded.state_dict() if "module" in form else loaded  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", ["zip", "legacy", "module", "legacy module", "safetensors"])
def test_only_the_repaired_buffers_change(net: nn.Module, form: str, tmp_path: Path) -> None:
    sick, fixed = tmp_path / "sick", tmp_path / "fixed"
    save(net, form, sick)
    before = sick.read_bytes()
    result = nd.recalibrate(sick, method="debias", output=fixed, momentum=0.001)
    assert result.path == fixed
    assert sick.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fixed", "sick"]
    old, new = load_state(form, sick), load_state(form, fixed)
    assert list(old) == list(new)
    left = 0.999**216
    for name, tensor in old.items():
        leaf = name.rpartition(".")[2]
        if leaf == "running_mean":
            torch.testing.assert_close(new[name], tensor / (1 - left))
        elif leaf == "running_var":
            torch.testing.assert_close(new[name], (tensor - left) / (1 - left), rtol=1e-5, atol=1e-6)
        elif leaf == "num_batches_tracked":
            assert new[name] > tensor
        else:
            assert torch.equal(new[name], tensor)
    assert len(fixed.read_bytes()) == len(before)
    report = nd.inspect(fixed, momentum=0.001)
    assert not {"S104", "S115", "S118"} & {finding.code for finding in report.findings}
    with pytest.raises(nd.RefusedError):
        nd.recalibrate(fixed, method="debias", output=tmp_path / "again", momentum=0.001)
    assert not (tmp_path / "again").exists()


def test_zip_records_and_checksums(net: nn.Module, tmp_path: Path) -> None:
    sick, fixed = tmp_path / "sick.pt", tmp_path / "fixed.pt"
    save(net, "module", sick)
    nd.recalibrate(sick, method="debias", output=fixed)
    with zipfile.ZipFile(sick) as old, zipfile.ZipFile(fixed) as new:
        assert new.testzip() is None
        assert old.namelist() == new.namelist()
        differ = [name for name in old.namelist() if old.read(name) != new.read(name)]
        assert len(differ) == 3 * 9
        # Everything outside those payloads and their two checksums is the same to the byte.
        masked = [bytearray(path.read_bytes()) for path in (sick, fixed)]
        for content in masked:
            for info in map(old.getinfo, differ):
                name_length, extra_length = struct.unpack_from("<HH", content, info.header_offset + 26)
                begin = info.header_offset + 30 + name_length + extra_length
                content[begin : begin + info.file_size] = bytes(info.file_size)
                content[info.header_offset + 14 : info.header_offset + 18] = bytes(4)
            at = old.start_dir
            for info in old.infolist():
                lengths = struct.unpack_from("<HHH", content, at + 28)
                if info.filename in differ:
                    content[at + 16 : at + 20] = bytes(4)
                at += 46 + sum(lengths)
        assert _without_descriptors(masked[0], old, differ) == _without_descriptors(masked[1], old, differ)


def _without_descriptors(content: bytearray, archive: zipfile.ZipFile, names: list[str]) -> bytes:
    """torch may write a record as a stream, with its checksum behind the data."""
    for info in map(archive.getinfo, names):
        if info.flag_bits & 0x08:
            name_length, extra_length = struct.unpack_from("<HH", content, info.header_offset + 26)
            end = info.header_offset + 30 + name_length + extra_length + info.file_size
            content[end : end + 8] = bytes(8)
    return bytes(content)


def repack(source: Path, target: Path, compression: int, stream: bool = False) -> None:
    """The same records compressed, or written to something that cannot seek (checksums behind the data)."""

    class Unseekable:
        def __init__(self, path: Path) -> None:
            self.file = path.open("wb")

        def write(self, data: bytes) -> int:
            return self.file.write(data)

        def flush(self) -> None:
            self.file.flush()

    where: Any = Unseekable(target) if stream else target
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(where, "w", compression) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info), compression)
    if stream:
        where.file.close()


@pytest.mark.parametrize(
    ("compression", "stream"),
    [(zipfile.ZIP_DEFLATED, False), (zipfile.ZIP_STORED, True), (zipfile.ZIP_DEFLATED, True)],
)
def test_other_zips(net: nn.Module, tmp_path: Path, compression: int, stream: bool) -> None:
    plain, sick, fixed, reference = (tmp_path / name for name in ("plain.pt", "sick.pt", "fixed.pt", "reference.pt"))
    save(net, "module", plain)
    repack(plain, sick, compression, stream)
    nd.recalibrate(plain, method="debias", output=reference)
    nd.recalibrate(sick, method="debias", output=fixed)
    with zipfile.ZipFile(fixed) as new, zipfile.ZipFile(reference) as expected:
        assert new.testzip() is None
        assert new.namelist() == expected.namelist()
        assert all(new.read(name) == expected.read(name) for name in new.namelist())
    assert {layer.name for layer in nd.inspect(fixed).layers} == {layer.name for layer in nd.inspect(plain).layers}


@pytest.mark.parametrize("form", ["legacy", "legacy module", "safetensors"])
def test_no_byte_outside_the_changed_buffers_differs(net: nn.Module, form: str, tmp_path: Path) -> None:
    sick, fixed = tmp_path / "sick", tmp_path / "fixed"
    save(net, form, sick)
    nd.recalibrate(sick, method="debias", output=fixed, momentum=0.001)
    old, new = (np.frombuffer(path.read_bytes(), np.uint8) for path in (sick, fixed))
    differs = old != new
    with open_checkpoint(sick) as checkpoint:
        for layer in checkpoint.layers:
            for array in (getattr(layer, field) for field in CHANGED):
                begin = array.storage.offset + array.offset * array.item_size
                differs[begin : begin + array.nbytes] = False
    assert not differs.any()


def test_other_records_of_a_deflated_zip_are_copied_as_they_are(net: nn.Module, tmp_path: Path) -> None:
    """Not packed again: their compressed bytes, dates and attributes are those of the input."""
    save(net, "module", tmp_path / "plain.pt")
    sick, fixed = tmp_path / "sick.pt", tmp_path / "fixed.pt"
    repack(tmp_path / "plain.pt", sick, zipfile.ZIP_DEFLATED)
    nd.recalibrate(sick, method="debias", output=fixed)

    def packed(path: Path) -> dict[str, tuple[bytes, Any]]:
        raw, found = path.read_bytes(), {}
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                lengths = struct.unpack_from("<HH", raw, info.header_offset + 26)
                begin = info.header_offset + 30 + sum(lengths)
                found[info.filename] = (raw[begin : begin + info.compress_size], (info.date_time, info.external_attr))
        return found

    old, new = packed(sick), packed(fixed)
    assert old.keys() == new.keys()
    assert sum(old[name][0] != new[name][0] for name in old) == 3 * 9
    assert all(old[name][1] == new[name][1] for name in old)


def test_big_endian_files(net: nn.Module, tmp_path: Path) -> None:
    little, big = tmp_path / "little.pt", tmp_path / "big.pt"
    torch.save(net.state_dict(), little)
    state = torch.load(little)
    with zipfile.ZipFile(little) as old, zipfile.ZipFile(big, "w") as new:
        for name, key in ((name, name.rpartition("/data/")[2]) for name in old.namelist()):
            data = b"big" if name.endswith("byteorder") else old.read(name)
            if key.isdigit():
                width = list(state.values())[int(key)].element_size()
                data = np.frombuffer(data, f"<u{width}").astype(f">u{width}").tobytes()
            new.writestr(name, data)
    for path in (little, big):
        nd.recalibrate(path, method="debias", momentum=0.001)
    fixed, expected = torch.load(tmp_path / "big.recalibrated.pt"), torch.load(tmp_path / "little.recalibrated.pt")
    assert not torch.equal(fixed["bn1.running_var"], state["bn1.running_var"])
    assert all(torch.equal(fixed[name], expected[name]) for name in expected)


def test_counters_may_be_kept(net: nn.Module, tmp_path: Path) -> None:
    save(net, "zip", tmp_path / "m.pt")
    result = nd.recalibrate(tmp_path / "m.pt", method="debias", momentum=0.001, keep_counters=True)
    fixed = load_state("zip", tmp_path / "m.recalibrated.pt")
    assert all(fixed[name] == 216 for name in fixed if name.endswith("num_batches_tracked"))
    assert not result.report.recognisable


def test_several_models_in_one_file(net: nn.Module, tmp_path: Path) -> None:
    state = net.state_dict()
    torch.save({"model": state, "ema": {name: tensor.clone() for name, tensor in state.items()}}, tmp_path / "m.pt")
    nd.recalibrate(tmp_path / "m.pt", method="debias", momentum=0.001, output=tmp_path / "both.pt")
    nd.recalibrate(tmp_path / "m.pt", method="debias", momentum=0.001, output=tmp_path / "one.pt", layer=["ema:*"])
    both, one = torch.load(tmp_path / "both.pt"), torch.load(tmp_path / "one.pt")
    assert torch.equal(both["model"]["bn1.running_var"], both["ema"]["bn1.running_var"])
    assert torch.equal(one["model"]["bn1.running_var"], state["bn1.running_var"])
    assert torch.equal(one["ema"]["bn1.running_var"], both["ema"]["bn1.running_var"])


@pytest.mark.parametrize("form", ["zip", "legacy", "module", "safetensors"])
def test_a_refusal_writes_nothing(net: nn.Module, form: str, tmp_path: Path) -> None:
    net.bn1.running_var[0] = 0.1
    save(net, form, tmp_path / "sick")
    before = (tmp_path / "sick").read_bytes()
    with pytest.raises(nd.RefusedError, match=r"bn1: running_var of channel 0") as caught:
        nd.recalibrate(tmp_path / "sick", method="debias", momentum=0.001)
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["sick"]
    assert (tmp_path / "sick").read_bytes() == before


def test_shared_and_expanded_buffers_are_refused_by_name(net: nn.Module, tmp_path: Path) -> None:
    state = net.state_dict()
    shared = dict(state)
    shared["head.running_var"] = shared["bn1.running_var"]
    flat = dict(state)
    memory = torch.stack([state["bn1.running_mean"], state["bn1.running_var"]], 1)
    flat["bn1.running_mean"], flat["bn1.running_var"] = memory[:, 0], memory[:, 1]
    for name, content, words in (("shared", shared, "head.running_var"), ("strided", flat, "bn1.running_mean")):
        path = tmp_path / f"{name}.pt"
        torch.save(content, path)
        with pytest.raises(nd.RefusedError, match=words):
            nd.recalibrate(path, method="debias", momentum=0.001)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shared.pt", "strided.pt"]


def test_memory_shared_with_training_state_is_refused(net: nn.Module, tmp_path: Path) -> None:
    state = net.state_dict()
    torch.save({"model": state, "optimizer": {"state": {0: {"x": state["bn1.running_var"]}}}}, tmp_path / "c.pt")
    before = (tmp_path / "c.pt").read_bytes()
    with pytest.raises(nd.RefusedError, match="shares its memory"):
        nd.recalibrate(tmp_path / "c.pt", method="debias", momentum=0.001)
    assert (tmp_path / "c.pt").read_bytes() == before


def test_views_of_one_storage_that_do_not_overlap_are_written(net: nn.Module, tmp_path: Path) -> None:
    state = net.state_dict()
    memory = torch.cat([state["bn1.running_mean"], state["bn1.running_var"]])
    state["bn1.running_mean"], state["bn1.running_var"] = memory[:8], memory[8:]
    torch.save(state, tmp_path / "views.pt")
    nd.recalibrate(tmp_path / "views.pt", method="debias", momentum=0.001, output=tmp_path / "fixed.pt")
    fixed = torch.load(tmp_path / "fixed.pt")
    left = 0.999**216
    torch.testing.assert_close(fixed["bn1.running_var"], (memory[8:] - left) / (1 - left), rtol=1e-5, atol=1e-6)


def test_a_value_its_type_cannot_hold_is_refused(tmp_path: Path) -> None:
    state = {
        "bn.weight": torch.ones(4).half(),
        "bn.bias": torch.ones(4).half(),
        "bn.running_mean": torch.full((4,), 60000.0).half(),
        "bn.running_var": torch.full((4,), 2.0).half(),
        "bn.num_batches_tracked": torch.tensor(216),
    }
    torch.save(state, tmp_path / "half.pt")
    with pytest.raises(nd.RefusedError, match=r"bn\.running_mean: float16 cannot hold"):
        nd.recalibrate(tmp_path / "half.pt", method="debias", momentum=0.001)


def test_names_of_outputs(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.best.pt"
    save(net, "module", path)
    result = nd.recalibrate(path, method="debias")
    assert result.path == tmp_path / "model.best.recalibrated.pt"
    with pytest.raises(nd.UsageError, match="exists already"):
        nd.recalibrate(path, method="debias")
    nd.recalibrate(path, method="debias", overwrite=True)
    with pytest.raises(nd.UsageError, match="is the input itself"):
        nd.recalibrate(path, method="debias", output=path, overwrite=True)
    with pytest.raises(nd.UsageError, match="no such folder"):
        nd.recalibrate(path, method="debias", output=tmp_path / "none" / "f.pt")
    with pytest.raises(nd.UsageError, match="no layer matches"):
        nd.recalibrate(path, method="debias", output=tmp_path / "g.pt", layer=["nothing*"])


def test_only_chosen_layers(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    save(net, "module", path)
    result = nd.recalibrate(path, method="debias", output=tmp_path / "f.pt", layer=["layer3.*"])
    assert {repair.layer.name.split(".")[0] for repair in result.report.repairs} == {"layer3"}
    old, new = load_state("module", path), load_state("module", tmp_path / "f.pt")
    assert all(torch.equal(old[n], new[n]) for n in old if not n.startswith("layer3"))


def test_live_module_in_place(net: nn.Module) -> None:
    assert {f.code for f in nd.inspect(net).findings} >= {"S104"}
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    places = {name: buffer.data_ptr() for name, buffer in net.named_buffers()}
    result = nd.recalibrate(net, method="debias")
    assert result.module is net and result.path is None
    left = 0.999**216
    for name, buffer in net.named_buffers():
        assert buffer.data_ptr() == places[name]
        if name.endswith("running_var"):
            torch.testing.assert_close(buffer, (before[name] - left) / (1 - left), rtol=1e-5, atol=1e-6)
    assert "S104" not in {f.code for f in nd.inspect(net).findings}


def test_interrupted_writing_leaves_nothing(net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.pt"
    save(net, "module", path)

    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(KeyboardInterrupt):
        nd.recalibrate(path, method="debias")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.pt"]


def test_accuracy_returns(nets: ModuleType, tmp_path: Path) -> None:
    fixed = tmp_path / "fixed.pt"
    nd.recalibrate(FIXTURES / "slow_momentum_module.pt", method="debias", output=fixed)
    sick = torch.load(FIXTURES / "slow_momentum_module.pt", weights_only=False)
    assert nets.accuracy(sick) < 0.5
    assert nets.accuracy(torch.load(fixed, weights_only=False)) > 0.97


def test_values_are_rounded_once(make_layer: Callable[..., Any]) -> None:
    from normdoctor.readers.arrays import decode, encode

    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-9, 3.14159])
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        expected = torch.tensor(values, dtype=torch.float64).to(getattr(torch, dtype)).double().numpy()
        for big_endian in (False, True):
            np.testing.assert_array_equal(decode(encode(values, dtype, big_endian), dtype, big_endian), expected)


class TestGivenValues:
    """write_back with values of any origin, as from measuring."""

    @staticmethod
    def norm(eps: float = 1e-5, dtype: torch.dtype = torch.float32) -> nn.Module:
        norm = nn.BatchNorm1d(4, eps=eps).to(dtype)
        norm.running_mean[:] = torch.nan
        norm.running_var[:] = torch.tensor([torch.nan, torch.inf, -1.0, 0.0])
        return nn.Sequential(nn.Linear(3, 4).to(dtype), norm).eval()

    @staticmethod
    def write(path: Path, output: Path, mean: Any, var: Any) -> None:
        with open_checkpoint(path) as checkpoint:
            (layer,) = checkpoint.layers
            new = (("running_mean", mean), ("running_var", var))
            write_back(
                checkpoint, [Change(layer, name, np.array(values, dtype=np.float64)) for name, values in new], output
            )

    @pytest.mark.parametrize("form", ["zip", "legacy", "module", "legacy module", "safetensors", "script", "exported"])
    def test_broken_buffers_are_replaced(self, form: str, tmp_path: Path) -> None:
        net, sick, fixed = self.norm(), tmp_path / "sick", tmp_path / "fixed.pt2"
        if form == "script":
            torch.jit.script(net).save(sick)
        elif form == "exported":
            sick = tmp_path / "sick.pt2"
            torch.export.save(torch.export.export(net, (torch.ones(2, 3),)), sick)
        else:
            save(net, form, sick)
        before = sick.read_bytes()
        self.write(sick, fixed, [1, 2, 3, 4], [5, 6, 7, 0.5])
        assert sick.read_bytes() == before and len(fixed.read_bytes()) == len(before)
        expected = self.norm()
        expected.load_state_dict(net.state_dict())
        expected[1].running_mean[:] = torch.tensor([1.0, 2, 3, 4])
        expected[1].running_var[:] = torch.tensor([5.0, 6, 7, 0.5])
        if form == "script":
            found = torch.jit.load(fixed).state_dict()
        elif form == "exported":
            found = torch.export.load(fixed).state_dict
        else:
            found = load_state(form, fixed)
        for name, tensor in expected.state_dict().items():
            assert torch.equal(found[name], tensor), name

    @pytest.mark.parametrize(
        ("eps", "var", "refused"),
        [
            (1e-5, 1e-9, False),  # becomes 0, and eps alone decides before and after
            (1e-3, 1e-6, False),
            (1e-5, 9e-8, False),  # becomes 6e-8 or 1.2e-7
            (1e-12, 1e-9, True),  # 30 times the output
            (1e-8, 2.9e-8, True),
            (0.0, 1e-9, True),
            (0.0, 0.0, False),
            (0.0, 1e-3, False),
        ],
    )
    def test_variances_too_small_for_half_precision(
        self, eps: float, var: float, refused: bool, tmp_path: Path
    ) -> None:
        """Refused where the layer would multiply by something else, written where it would not."""
        sick, fixed = tmp_path / "sick.pt", tmp_path / "fixed.pt"
        save(self.norm(eps, torch.float16), "module", sick)
        if refused:
            with pytest.raises(nd.RefusedError, match=r"1\.running_var: float16 cannot hold .*for an eps of") as caught:
                self.write(sick, fixed, np.zeros(4), [1, 1, var, 1])
            assert caught.value.hint and not fixed.exists()
            return
        self.write(sick, fixed, np.zeros(4), [1, 1, var, 1])
        found = torch.load(fixed, weights_only=False)[1].running_var[2].double()
        assert np.sqrt((var + eps + 1e-300) / (float(found) + eps + 1e-300)) == pytest.approx(1, abs=0.01)

    def test_an_eps_that_the_file_does_not_say_is_taken_for_the_usual_one(self, tmp_path: Path) -> None:
        save(self.norm(1e-12, torch.float16), "zip", tmp_path / "sick.pt")
        self.write(tmp_path / "sick.pt", tmp_path / "fixed.pt", np.zeros(4), np.full(4, 1e-9))
        assert torch.load(tmp_path / "fixed.pt")["1.running_var"].tolist() == [0.0] * 4

    @pytest.mark.parametrize(
        ("mean", "words"),
        [
            ([1.0, 2, 3], r"1\.running_mean: 3 new values for the shape \[4\]"),
            ([1.0, 2, 3, np.nan], r"1\.running_mean: its new values hold NaN or infinity"),
            ([1.0, 2, 3, 1e39], r"1\.running_mean: float32 cannot hold 1e\+39"),
        ],
    )
    def test_values_that_do_not_fit(self, mean: list[float], words: str, tmp_path: Path) -> None:
        save(self.norm(), "zip", tmp_path / "sick.pt")
        with pytest.raises(nd.RefusedError, match=words):
            self.write(tmp_path / "sick.pt", tmp_path / "fixed.pt", mean, np.ones(4))
        assert [path.name for path in tmp_path.iterdir()] == ["sick.pt"]
