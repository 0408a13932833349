"""Outputs appear whole or not at all, where they may, with the rights of an ordinary file."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from normdoctor.errors import InputError, UsageError
from normdoctor.writing import check_output, replacing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "out.pt"
    target.write_text("old")
    with replacing(target) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert names(tmp_path) == ["out.pt"]


@pytest.mark.parametrize("error", [ValueError("a defect"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_nothing_is_left_of_a_failure(error: BaseException, tmp_path: Path) -> None:
    target = tmp_path / "out.pt"
    target.write_text("old")
    with pytest.raises(type(error)), replacing(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert names(tmp_path) == ["out.pt"]


def test_a_full_disk_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be written \(No space left") as caught, replacing(tmp_path / "o"):
        raise OSError(28, "No space left on device")
    assert caught.value.hint and names(tmp_path) == []


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_rights_follow_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "out") as temporary:
            temporary.write_text("x")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o666 & ~mask


def test_a_device_is_written_to_and_not_replaced() -> None:
    with replacing(Path("/dev/null")) as temporary:
        temporary.write_text("x")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_a_long_name_still_has_a_temporary_one(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 250)
    with replacing(target) as temporary:
        temporary.write_text("x")
    assert target.read_text() == "x"


@pytest.fixture
def places(tmp_path: Path) -> Path:
    (tmp_path / "model.pt").write_text("x")
    (tmp_path / "other.pt").write_text("x")
    (tmp_path / "link.pt").symlink_to("model.pt")
    (tmp_path / "hard.pt").hardlink_to(tmp_path / "model.pt")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.pt", "is the input itself"),
        ("link.pt", "is the input itself"),
        ("hard.pt", "is the input itself"),
        ("folder/../model.pt", "is the input itself"),
        ("folder", "is a folder"),
        ("none/out.pt", "no such folder"),
    ],
)
def test_outputs_that_are_refused_even_with_overwrite(name: str, words: str, places: Path) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        check_output(places / name, places / "model.pt", overwrite=True)
    assert caught.value.hint


def test_an_existing_file_needs_a_word(places: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        check_output(places / "other.pt", places / "model.pt", overwrite=False)
    check_output(places / "other.pt", places / "model.pt", overwrite=True)
    check_output(places / "new.pt", places / "model.pt", overwrite=False)
    check_output(places / "new.pt", None, overwrite=False)


@pytest.mark.parametrize("name", ["n" * 300, "model.pt/inside"])
def test_impossible_names(name: str, places: Path) -> None:
    with pytest.raises((InputError, UsageError)) as caught:
        check_output(places / name, places / "model.pt", overwrite=False)
    assert caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    undo: Callable[[], None] = lambda: folder.chmod(0o700)  # noqa: E731
    request.addfinalizer(undo)
    with pytest.raises(InputError, match="cannot be written"), replacing(folder / "out"):
        raise AssertionError("there is nothing to write to")
