"""In place: the input is there whole at any moment, what was there is kept, and a failure changes nothing."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from normdoctor import writing
from normdoctor.errors import InputError, RefusedError
from normdoctor.readers import open_checkpoint
from normdoctor.recalibration import with_onnx
from normdoctor.writing import replace_in_place


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_file(path: Path) -> None:
    path.write_text("new")


def write_folder(path: Path) -> None:
    path.mkdir()
    (path / "a.bin").write_text("new a")
    (path / "sub").mkdir()
    (path / "sub" / "b.txt").write_text("b")


def write_with_data(path: Path) -> None:
    path.write_text("new")
    (path.parent / "weights").mkdir()
    (path.parent / "weights" / "changed").write_text("new data")
    (path.parent / "same").write_text("same data")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt"
    path.write_text("old")
    return path


def make_folder(path: Path) -> Path:
    write_folder(path)
    (path / "a.bin").write_text("old a")
    return path


def make_with_data(folder: Path) -> Path:
    (folder / "weights").mkdir()
    (folder / "weights" / "changed").write_text("old data")
    (folder / "same").write_text("same data")
    (folder / "model").write_text("old")
    return folder / "model"


@pytest.fixture(params=["exchanges", "only renames"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Folders change places in one step, or in two renames."""
    if request.param == "only renames":
        monkeypatch.setattr(writing, "_exchange", lambda first, second: False)
    return str(request.param)


def test_what_was_there_is_kept_and_never_replaced(model: Path, tmp_path: Path) -> None:
    for number, ending in enumerate(("bak", "bak2", "bak3"), start=1):

        def write(path: Path, text: str = f"{number}. result") -> None:
            path.write_text(text)

        assert replace_in_place(model, write) == tmp_path / f"model.pt.{ending}"
    assert contents(tmp_path) == {
        "model.pt": b"3. result",
        "model.pt.bak": b"old",
        "model.pt.bak2": b"1. result",
        "model.pt.bak3": b"2. result",
    }


def test_a_folder(tmp_path: Path, system: str) -> None:
    folder = make_folder(tmp_path / "model")
    (folder / "sub").chmod(0o750)
    (folder / "a.bin").chmod(0o600)
    assert replace_in_place(folder, write_folder) == tmp_path / "model.bak"
    assert (folder / "a.bin").read_text() == "new a" and (folder / "sub" / "b.txt").read_text() == "b"
    assert stat.S_IMODE((folder / "a.bin").stat().st_mode) == 0o600
    assert stat.S_IMODE((folder / "sub").stat().st_mode) == 0o750
    assert (tmp_path / "model.bak" / "a.bin").read_text() == "old a"
    assert replace_in_place(folder, write_folder) == tmp_path / "model.bak2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.bak", "model.bak2"]


def test_folders_change_places_in_one_step_where_the_system_can(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    if not writing._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this disk cannot")
    assert names(tmp_path) == ["a", "a/b", "b", "b/a"]
    assert not writing._exchange(tmp_path / "a", tmp_path / "none")


@pytest.mark.parametrize("mode", [0o600, 0o444, 0o664])
def test_rights_are_kept(model: Path, tmp_path: Path, mode: int) -> None:
    model.chmod(mode)
    backup = replace_in_place(model, write_file)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (model, backup)] == [mode, mode]
    assert model.read_text() == "new"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_stays_one(kind: str, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "here").mkdir()
    real = tmp_path / "store" / "blob"
    link = tmp_path / "here" / "model"
    link.symlink_to("../store/blob")
    if kind == "file":
        real.write_text("old")
    else:
        make_folder(real)
    backup = replace_in_place(link, write_file if kind == "file" else write_folder)
    assert backup == real.with_name("blob.bak") and backup.exists()
    assert link.is_symlink() and link.resolve() == real
    assert names(tmp_path / "here") == ["model"]
    if kind == "file":
        assert (link.read_text(), backup.read_text()) == ("new", "old")
    else:
        assert ((link / "a.bin").read_text(), (backup / "a.bin").read_text()) == ("new a", "old a")


def test_a_name_relative_to_here(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert replace_in_place(Path("model.pt"), write_file) == Path("model.pt.bak")
    (tmp_path / "folder").mkdir()
    make_folder(tmp_path / "folder" / "model")
    monkeypatch.chdir(tmp_path / "folder" / "model")
    assert replace_in_place(Path(), write_folder) == tmp_path / "folder" / "model.bak"


def test_external_data_has_a_backup_of_the_same_ending(tmp_path: Path) -> None:
    model = make_with_data(tmp_path)
    (tmp_path / "weights" / "changed.bak").write_text("of somebody else")
    assert replace_in_place(model, write_with_data) == tmp_path / "model.bak2"
    assert contents(tmp_path) == {
        "model": b"new",
        "model.bak2": b"old",
        "same": b"same data",
        "weights/changed": b"new data",
        "weights/changed.bak": b"of somebody else",
        "weights/changed.bak2": b"old data",
    }


def test_a_copy_where_the_disk_knows_no_second_names(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    os.utime(model, (1, 1))
    backup = replace_in_place(model, write_file)
    assert (model.read_text(), backup.read_text(), backup.stat().st_mtime) == ("new", "old", 1)


FAILURES = [KeyboardInterrupt(), SystemExit(3), RefusedError("it is worse"), OSError(28, "No space left on device")]


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nothing_is_left_where_writing_fails(failure: BaseException, kind: str, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "model") if kind == "folder" else make_with_data(tmp_path)
    before = names(tmp_path), contents(tmp_path)

    def write(path: Path) -> None:
        (write_folder if kind == "folder" else write_with_data)(path)
        raise failure

    with pytest.raises((type(failure), InputError)):
        replace_in_place(source, write)
    assert (names(tmp_path), contents(tmp_path)) == before


class Interrupted:
    """Lets the steps on the disk happen, but for one: before it, or behind it, the user interrupts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, check: Callable[[], None]) -> None:
        self.left, self.when, self.check = 0, "before", check
        for owner, name in ((os, "rename"), (os, "replace"), (os, "link"), (writing, "_exchange")):
            monkeypatch.setattr(owner, name, self.around(getattr(owner, name)))

    def around(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0 and self.when == "before":
                raise KeyboardInterrupt
            result = step(*arguments, **options)
            if self.left >= 0:
                self.check()
            if self.left == 0 and self.when == "behind":
                raise KeyboardInterrupt
            return result

        return stepped

    def places(self) -> Iterator[tuple[int, str]]:
        for place in range(1, 20):
            for when in ("before", "behind"):
                self.left, self.when = place, when
                yield place, when


@pytest.mark.parametrize("kind", ["file", "data", "folder"])
def test_interrupted_at_any_step(kind: str, system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old or the new, whole, whatever the step; the old without anything left over where the call fails."""
    if kind == "folder":
        source, write = make_folder(tmp_path / "model"), write_folder
    elif kind == "data":
        source, write = make_with_data(tmp_path), write_with_data
    else:
        source, write = tmp_path / "model", write_file
        source.write_text("old")
    before = names(tmp_path), contents(tmp_path)
    old, new = ("old a", "new a") if kind == "folder" else ("old", "new")

    def is_whole() -> None:
        if kind == "folder" and system == "only renames" and not source.exists():
            assert (tmp_path / "model.bak" / "a.bin").read_text() == old  # between two renames
            return
        text = (source / "a.bin").read_text() if kind == "folder" else source.read_text()
        assert text in (old, new)

    interrupted = Interrupted(monkeypatch, is_whole)
    failures = 0
    for _ in interrupted.places():
        try:
            replace_in_place(source, write)
        except KeyboardInterrupt:
            failures += 1
            is_whole()
            left = names(tmp_path), contents(tmp_path)
            if left != before:  # all was done already
                assert kind == "folder" and system == "only renames"
                assert (source / "a.bin").read_text() == new
                assert (tmp_path / "model.bak" / "a.bin").read_text() == old
                source.rename(tmp_path / "spent")
                (tmp_path / "model.bak").rename(source)
                shutil.rmtree(tmp_path / "spent")
        else:
            break
    assert failures >= 4
    assert ((source / "a.bin").read_text() if kind == "folder" else source.read_text()) == new
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def make_onnx(folder: Path) -> Path:
    """One BatchNorm whose statistics lie in a data file, and another in the model itself."""
    rng = np.random.default_rng(0)
    tensors = []
    for norm in ("outside", "inside"):
        for role in ("scale", "bias", "mean", "var"):
            values = rng.uniform(0.5, 1.5, 4).astype(np.float32)
            tensors.append(onnx.numpy_helper.from_array(values, f"{norm}.{role}"))
    nodes = [
        onnx.helper.make_node(
            "BatchNormalization", [x, *(f"{norm}.{role}" for role in ("scale", "bias", "mean", "var"))], [y], name=norm
        )
        for norm, x, y in (("outside", "x", "h"), ("inside", "h", "y"))
    ]
    shapes = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 4, 2, 2]) for name in "xy"]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", shapes[:1], shapes[1:], tensors),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=8,
    )
    for tensor in model.graph.initializer[:4]:
        onnx.external_data_helper.set_external_data(tensor, "model.onnx.data")
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def statistics(path: Path) -> dict[str, Any]:
    tensors = onnx.load(path).graph.initializer
    return {tensor.name: onnx.numpy_helper.to_array(tensor).tolist() for tensor in tensors}


@pytest.mark.parametrize("linked", [False, True])
def test_an_onnx_model_with_external_data(linked: bool, tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    model = make_onnx(real)
    if linked:  # as in huggingface_hub's cache: links to blobs without a suffix
        links = tmp_path / "links"
        links.mkdir()
        for path in (model, real / "model.onnx.data"):
            (links / path.name).symlink_to(path)
        model = links / "model.onnx"
    before = statistics(real / "model.onnx")
    with open_checkpoint(model) as checkpoint:
        layers = [layer.name for layer in checkpoint.layers]
    values = {name: {"running_mean": np.full(4, 7.0), "running_var": np.full(4, 9.0)} for name in layers}
    backup = replace_in_place(model, lambda path: with_onnx.write_onnx(model, path, values, "exact"))
    assert backup == real / "model.onnx.bak"
    expected = ["model.onnx", "model.onnx.bak", "model.onnx.data", "model.onnx.data.bak"]
    assert names(real) == expected
    changed = {"mean": [7.0] * 4, "var": [9.0] * 4}
    assert statistics(real / "model.onnx") == {  # onnx itself refuses links
        name: changed.get(name.partition(".")[2], old) for name, old in before.items()
    }
    for name in expected[::2]:  # back again: both files
        (real / f"{name}.bak").replace(real / name)
    assert statistics(real / "model.onnx") == before
