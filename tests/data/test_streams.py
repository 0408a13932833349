"""Batches of the user's own code: loaders, generators, lists, and what their entries are to the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from normdoctor.data import Batch
from normdoctor.data.opening import open_data
from normdoctor.data.options import DataOptions
from normdoctor.data.wanted import Wanted, wanted_of
from normdoctor.errors import InputError, MissingDependencyError, NormDoctorError, UsageError
from normdoctor.models.loaded import Kind, Loaded

X = torch.arange(20 * 3, dtype=torch.float32).reshape(20, 3)
Y = torch.arange(20) % 4
ONE = (Wanted("x", None, loose=True),)


def entry(name: str, optional: bool = False) -> Wanted:
    return Wanted(name, None, optional=optional, loose=True)


def pairs(size: int = 8) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    yield from zip(X.split(size), Y.split(size), strict=True)


def taken(source: Any, wanted: Any = ONE, **options: Any) -> list[Batch]:
    with open_data(source, DataOptions(**options), wanted) as data:
        return list(data.batches())


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(TensorDataset(X, Y), batch_size=8),
        lambda: list(pairs()),
        pairs,
        lambda: iter(list(pairs())),
        lambda: [{"x": x, "label": y} for x, y in pairs()],
        lambda: [{"image": x, "target": y.numpy()} for x, y in pairs()],
        lambda: [(x.numpy(), y.numpy()) for x, y in pairs()],
    ],
)
def test_what_gives_batches(make: Any) -> None:
    with open_data(make(), wanted=ONE) as data:
        for _ in range(3):
            batches = list(data.batches())
            assert [batch.size for batch in batches] == [8, 8, 4] and [batch.index for batch in batches] == [0, 1, 2]
            assert not any(batch.kwargs for batch in batches)
            np.testing.assert_array_equal(np.concatenate([np.asarray(batch.args[0]) for batch in batches]), X)
            np.testing.assert_array_equal(np.concatenate([batch.labels for batch in batches]), Y)  # type: ignore[misc]
        assert data.has_labels and data.repeatable and data.total in (20, None) and not data.notes
        parts = [list(data.batches(part=(rank, 2))) for rank in (0, 1)]
        assert [[batch.index for batch in part] for part in parts] == [[0, 2], [1]]
        assert torch.equal(torch.as_tensor(parts[1][0].args[0]), X[8:16])


def test_whole_sets_are_cut_into_batches() -> None:
    for source in (X, X.numpy(), (X, Y), {"x": X, "y": Y}, {"anything": X}):
        batches = taken(source, batch_size=6)
        assert [batch.size for batch in batches] == [6, 6, 6, 2]
        assert all(isinstance(batch.args[0], np.ndarray) for batch in batches)
        if not isinstance(source, (torch.Tensor, np.ndarray)) and len(source) == 2:
            for batch in batches:
                np.testing.assert_array_equal(batch.labels, batch.args[0][:, 0].astype(int) // 3 % 4)  # type: ignore[arg-type]


def test_a_walk_given_up_is_taken_up_again() -> None:
    with open_data(pairs(), wanted=ONE) as data:
        first, second = data.batches(), data.batches()
        next(first)
        assert [next(second).index for _ in range(2)] == [0, 1]
        assert [batch.size for batch in first] == [8, 4] and [batch.size for batch in data.batches()] == [8, 8, 4]


def test_a_model_may_write_into_its_input() -> None:
    own = [X.clone(), X.numpy().copy()]
    for source in (own, iter(own), own[0], own[1]):
        with open_data(source, wanted=ONE) as data:
            for batch in data.batches():
                batch.args[0][:] = -1
            assert not any((np.asarray(batch.args[0]) == -1).any() for batch in data.batches())
    assert torch.equal(own[0], X)


@pytest.mark.parametrize(
    "names, entries, args, has_labels, dropped",
    [
        ("x", (X, Y), 1, True, ""),
        ("x", (X, Y, X), 1, False, "entry 1, entry 2"),
        ("x", (X, X), 1, False, "entry 1"),
        ("x m?", (X, X), 2, False, ""),
        ("x m?", (X, Y), 1, True, ""),
        ("x m?", (X, Y, X), 1, False, "entry 1, entry 2"),
        ("x m? n?", (X, X, Y), 1, False, "entry 1, entry 2"),
        ("x m", (X, Y), 2, False, ""),
        ("x m", (X, X, Y), 2, True, ""),
        ("*xs", (X, X, X), 3, False, ""),
        ("*xs", (X, Y), 1, True, ""),
        ("x *xs", (X, X), 2, False, ""),
        ("x", (X, 3), 1, False, "entry 1"),
    ],
)
def test_tuples(names: str, entries: tuple[Any, ...], args: int, has_labels: bool, dropped: str) -> None:
    wanted = [entry(name.rstrip("?"), name.endswith("?") or name.startswith("*")) for name in names.split()]
    with open_data([entries], wanted=wanted) as data:
        (batch,) = data.batches()
        assert (len(batch.args), batch.kwargs, data.has_labels) == (args, {}, has_labels)
        assert (batch.labels is not None) is has_labels
        assert data.notes == ((f"not used, since the model does not take it: {dropped}",) if dropped else ())


def test_mappings() -> None:
    taking = [entry("ids"), entry("mask", True), entry("labels", True)]
    batch = taken([{"labels": Y, "mask": X, "ids": X}], taking)[0]
    assert len(batch.args) == 3 and batch.labels is None  # the model takes them
    with open_data([{"x": X, "y": Y, "name": ["a"] * 20}], wanted=ONE) as data:
        assert data.has_labels and "name" in data.notes[0]
    batch = taken([{"x": X, "y": Y, "more": X, "flag": True}], [entry("x"), entry("**rest", True)])[0]
    assert list(batch.kwargs) == ["more", "flag"] and batch.labels is not None
    with pytest.raises(UsageError, match="batch 0: has nothing for input x") as caught:
        taken([{"a": X, "b": X}])
    assert "It holds a, b" in caught.value.hint


def test_what_a_module_takes() -> None:
    class Net(nn.Module):
        def forward(self, ids: Any, mask: Any = None, *rest: Any, **more: Any) -> Any: ...

    class Optional(nn.Module):
        def forward(self, x: Any = None, y: Any = None) -> Any: ...

    found = wanted_of(Loaded(Kind.MODULE, Net(), "net"), "float16")
    assert [(e.name, e.optional) for e in found] == [
        ("ids", False),
        ("mask", True),
        ("*rest", True),
        ("**more", True),
    ]
    assert {entry.dtype for entry in found} == {"float16"}
    assert taken([X], found)[0].args[0].dtype == torch.float16
    assert taken([X], wanted_of(Loaded(Kind.MODULE, Optional(), "net")))[0].args[0].shape == (20, 3)
    assert len(taken([(X, Y)], ())[0].args) == 1 and len(taken([(X, X)], ())[0].args) == 2


def test_types_of_tensors() -> None:
    with open_data([X.double()], wanted=ONE) as data:
        assert next(data.batches()).args[0].dtype == torch.float32
        assert data.notes == ("x: float64 is cast to float32",)
    assert taken([X.half()])[0].args[0].dtype == torch.float32
    assert taken([Y], ONE)[0].args[0].dtype == torch.int64
    assert taken([X], [Wanted("x", None, "bfloat16", loose=True)])[0].args[0].dtype == torch.bfloat16
    assert not taken([X.clone().requires_grad_()])[0].args[0].requires_grad
    with pytest.raises(UsageError, match="batch 0: x is uint8"):
        taken([X.byte()])


@pytest.mark.parametrize("array", [False, True])
def test_nan(array: bool) -> None:
    values = X.clone()
    values[13, 1] = torch.nan
    batches = [batch.numpy() if array else batch for batch in values.split(8)]
    with pytest.raises(InputError, match=r"list: sample 5 of batch 1, x: .* NaN or Inf") as caught:
        taken(batches)
    assert "--drop-nonfinite" in caught.value.hint
    with open_data(batches, DataOptions(drop_nonfinite=True), ONE) as data:
        for _ in range(2):
            assert [batch.size for batch in data.batches()] == [8, 7, 4]
            assert data.notes == ("1 sample left out: sample 5 of batch 1, x (NaN or Inf)",)
    with open_data([values[13:14], X], DataOptions(drop_nonfinite=True), ONE) as data:
        assert [batch.index for batch in data.batches()] == [1]
    with pytest.raises(InputError, match="no sample is left"):
        taken([values[13:14]], drop_nonfinite=True)


def test_how_many() -> None:
    assert [batch.size for batch in taken(pairs(), samples=10)] == [8, 2]
    cut = taken(pairs(), samples=10)[1]
    assert cut.labels is not None and len(cut.labels) == len(cut.args[0]) == 2

    def endless() -> Iterator[torch.Tensor]:
        while True:
            yield torch.zeros(4096, 1)

    with open_data(endless(), wanted=ONE) as data:
        assert sum(batch.size for batch in data.batches()) == 10_000
        assert "only the first 10,000 samples" in data.notes[0] and data.total is None
    loader = DataLoader(TensorDataset(X), batch_size=8, drop_last=True)
    with open_data(loader, wanted=ONE) as data:
        assert data.total == 16 == sum(batch.size for batch in data.batches())


def test_a_loader_that_shuffles() -> None:
    with open_data(DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True), wanted=ONE) as data:
        assert not data.repeatable
        with pytest.raises(UsageError, match="shuffles"):
            data.batches(part=(0, 2))
        with (
            open_data(DataLoader(TensorDataset(X, Y), batch_size=8), wanted=ONE) as first,
            open_data(list(pairs()), wanted=ONE) as second,
        ):
            assert first.fingerprint == second.fingerprint != data.fingerprint
        assert sum(batch.size for batch in data.batches()) == 20

    class Augmenting:
        def __iter__(self) -> Iterator[torch.Tensor]:
            return iter([X + torch.rand(())])

    with open_data(Augmenting(), wanted=ONE) as data:
        assert data.repeatable
        for _ in range(2):
            list(data.batches())
        assert not data.repeatable and "other batches in every pass" in data.notes[0]


def test_a_loader_of_each_process() -> None:
    found = []
    for rank in (0, 1):
        sampler: DistributedSampler[Any] = DistributedSampler(X, 2, rank, shuffle=False)
        with open_data(DataLoader(TensorDataset(X), 4, sampler=sampler), wanted=ONE) as data:
            found += list(data.batches(part=(rank, 2)))
    assert sorted(batch.index for batch in found) == list(range(6))
    assert sorted(float(x) for batch in found for x in batch.args[0][:, 0]) == X[:, 0].tolist()


def test_whole_batches() -> None:
    fixed = [Wanted("x", (8, 3))]
    with open_data(pairs(), wanted=fixed) as data:
        assert [batch.size for batch in data.batches()] == [8, 8]
        assert "the model takes whole batches of 8" in data.notes[0]
    with pytest.raises(UsageError, match="batch 0 has 10 samples, the model takes 8"):
        taken(pairs(10), fixed)


class Samples(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(X)


@pytest.mark.parametrize(
    "source, message",
    [
        ([], "gives no batches"),
        (iter(()), "gives no batches"),
        (3, "a int gives no batches"),
        (None, "gives no batches"),
        ({}, "gives no batches"),
        (TensorDataset(X), "gives single samples"),
        (Samples(), "gives single samples"),
        (["text"], "batch 0 is a str"),
        ([()], "batch 0: 0 entries"),
        ([(X, X)], "batch 0: a has 20 samples, b has 5"),
        ([X[:0]], "is empty"),
        ([torch.tensor(1.0)], "holds no tensor"),
        ([{"x": [X, X]}], "x is a list"),
        ([(X, Y), X], "labels in some batches only"),
        ([X.to("meta")], "meta"),
    ],
)
def test_what_is_no_data(source: Any, message: str) -> None:
    wanted = ONE
    if message.startswith("batch 0: a has"):
        source, wanted = [(X, X[:5])], (entry("a"), entry("b"))
    with pytest.raises(NormDoctorError, match=message) as caught:
        taken(source, wanted)
    assert caught.value.hint


CODE = """
import torch
X = torch.arange(60.).reshape(20, 3)
calls = []
ready = [X, X]
def generator():
    calls.append(1)
    print("loading")
    yield X[:8], torch.arange(8)
    yield X[8:], torch.arange(12)
def counted():
    calls.append(1)
    return (batch for batch in (X[:8], X[8:]))
def tensor(): return X
def fails(): raise ValueError("no disk\\nhere")
def fails_later():
    yield X
    raise KeyError("path")
def stops():
    yield X
    raise SystemExit(0)
def needs(path): return X
def lacks():
    import no_such_package
def nothing(): pass
class Loader:
    def __iter__(self): return iter([X])
class Other:
    @staticmethod
    def loader(): return {"x": X}
"""


def test_code_by_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "mydata.py").write_text(CODE)
    for place, sizes in (
        ("mydata:generator", [8, 12]),
        ("mydata.py:generator", [8, 12]),
        ("mydata:ready", [20, 20]),
        ("mydata:tensor", [20]),
        ("mydata:X", [20]),
        ("mydata:Loader", [20]),
        ("mydata:Other.loader", [20]),
    ):
        with open_data(place, wanted=ONE) as data:
            assert data.words.startswith(f"--data {place}: x (")
            for _ in range(2):
                assert [batch.size for batch in data.batches()] == sizes
    assert not capsys.readouterr().out
    import mydata  # type: ignore[import-not-found]

    mydata.calls.clear()
    with open_data("mydata:counted", wanted=ONE) as data:
        assert len(mydata.calls) == 1  # the first pass goes on with what was asked for
        list(data.batches())
        assert len(mydata.calls) == 1
        list(data.batches())
        assert len(mydata.calls) == 2


@pytest.mark.parametrize(
    "place, message",
    [
        ("mydata:fails", "--data mydata:fails: raises ValueError: no disk"),
        ("mydata:fails_later", r"--data mydata:fails_later: batch 1: raises KeyError: 'path'"),
        ("mydata:stops", "batch 1: raises SystemExit"),
        ("mydata:needs", "missing a required argument: 'path'"),
        ("mydata:nothing", "a NoneType gives no batches"),
        ("mydata:generater", "mydata has no generater"),
        ("mydata.py:nope", "mydata.py has no nope"),
        ("other.py:nope", "other.py: no such file"),
        ("mydata:", "names no callable"),
        ("mydata.py", "names no callable"),
    ],
)
def test_code_that_fails(here: Path, place: str, message: str) -> None:
    (here / "mydata.py").write_text(CODE)
    with pytest.raises(NormDoctorError, match=message) as caught:
        taken(place)
    assert caught.value.hint and "\n" not in caught.value.message and "--arch" not in caught.value.hint
    for missing in ("mydata:lacks", "no_such_module:f"):
        with pytest.raises(MissingDependencyError):
            taken(missing)


def test_options_for_files_only() -> None:
    for options in ({"labels": "y.npy"}, {"image_size": 32}):
        with pytest.raises(UsageError, match="--"):
            taken(pairs(), **options)
