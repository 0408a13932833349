"""Values passed between the processes of torchrun, over gloo; and what becomes of the others where one dies."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from normdoctor import errors
from normdoctor.errors import NormDoctorError, UsageError
from normdoctor.models.architecture import one_line
from normdoctor.processes import are_several

TIMEOUT = 600.0
"""Seconds after which a process that says nothing counts as lost: others may have more data to compute on."""

GRACE = 2.0
"""Seconds in which the operating system may be asked who is gone, once something is wrong."""

START_AGAIN = "Nothing is kept of a run that was cut off: start it again, with less data where memory ran out."


@dataclass(frozen=True)
class _Failure:
    """Sent in the place of a value by a process that gives up."""

    kind: str
    message: str
    hint: str

    @classmethod
    def of(cls, error: BaseException) -> _Failure:
        if isinstance(error, NormDoctorError):
            return cls(type(error).__name__, error.message, error.hint)
        return cls("", one_line(error), "")

    def error(self, rank: int) -> NormDoctorError:
        """The same error in another process."""
        if not self.kind:
            return NormDoctorError(f"rank {rank} failed ({self.message}): nothing was written", "It shows where.")
        kind = getattr(errors, self.kind, NormDoctorError)
        found: NormDoctorError = kind(f"rank {rank}: {self.message}", self.hint)
        return found


@dataclass(frozen=True)
class _Place:
    """Where a process runs."""

    host: str
    number: int

    @classmethod
    def here(cls) -> _Place:
        space = ""
        with contextlib.suppress(OSError):  # equal numbers in two containers are two processes
            space = str(Path("/proc/self/ns/pid").readlink())
        return cls(f"{socket.gethostname()} {space}", os.getpid())

    def is_gone(self) -> bool:
        """Whether there is no such process any more, or nothing but its exit status. Only for those of this host."""
        if os.name != "posix":  # elsewhere a signal 0 is no question
            return False
        try:
            os.kill(self.number, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        try:
            return Path(f"/proc/{self.number}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except (OSError, IndexError):
            return False


def _short(error: RuntimeError) -> str:
    """What gloo says, without the place in its source and advice that does not fit here."""
    text = one_line(error).removeprefix("RuntimeError: ")
    return re.sub(r"\[[^]]*\.(cc|cpp|h):\d+\] ?", "", text).partition(". This is")[0]


def _named(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} is"
    return f"ranks {', '.join(map(str, ranks))} are" if ranks else "another process is"


class Together:
    """The processes of one run. A context: an error in its block is passed on to the others, which raise it too."""

    rank: int
    count: int
    speaks: bool
    """Whether this process says what is to be said to the user. One of them does, the first that is alive."""

    def __init__(self, rank: int, count: int, timeout: float) -> None:
        self.rank, self.count = rank, count
        self.speaks = rank == 0
        self._timeout = timeout
        self._over = False
        """Nothing can be passed on any more."""
        self._group: Any = None
        self._begun = False
        """Whether the process group is ours to end."""
        self._places: list[_Place] = []
        self._before: Any = None
        """What SIGTERM did before."""

    def gather(self, value: Any) -> list[Any]:
        """What every process gives, in the order of their ranks; all must come here. value: anything picklable.

        Raises NormDoctorError in all of them where one is gone, or has raised an error in the block."""
        found = self._exchange(value)
        for rank, other in enumerate(found):
            if isinstance(other, _Failure):
                self._over = True
                raise other.error(rank)
        return found

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """What the process of this rank gives, to all of them; the others' values are not looked at."""
        return self.gather(value if self.rank == source else None)[source]

    def barrier(self) -> None:
        """Wait until all are here."""
        self.gather(None)

    def _exchange(self, value: Any) -> list[Any]:
        packed = pickle.dumps(value)  # what cannot be pickled is not the others' fault
        if self.count == 1:
            return [pickle.loads(packed)]
        found: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(found, packed, group=self._group)
        except RuntimeError as error:
            self._over = True
            raise self._lost(error) from error
        return [pickle.loads(other) for other in found]

    def _lost(self, error: RuntimeError) -> NormDoctorError:
        """Who is gone, as far as can be told from here."""
        gone = self._gone(GRACE)
        text = _short(error)
        self.speaks = not gone or all(rank in gone for rank in range(self.rank))
        if not gone and "timed out" in text.lower():
            minutes = self._timeout / 60
            return NormDoctorError(
                f"another process said nothing for {minutes:g} minutes: nothing was written",
                "Give every process about as much data.",
            )
        return NormDoctorError(f"{_named(gone)} gone ({text}): nothing was written", START_AGAIN)

    def _gone(self, seconds: float) -> list[int]:
        """The ranks of processes of this host that have ended; waits for one."""
        here = _Place.here().host
        others = {rank: place for rank, place in enumerate(self._places) if place.host == here and rank != self.rank}
        until = time.monotonic() + seconds
        while True:
            gone = [rank for rank, place in others.items() if place.is_gone()]
            if gone or time.monotonic() > until:
                return gone
            time.sleep(0.02)

    # from beginning to end

    def open(self) -> None:
        """Meet the others. Raises NormDoctorError where they do not come."""
        limit = timedelta(seconds=self._timeout)
        try:
            if dist.is_initialized():  # by the code of the user
                self._group = dist.new_group(backend="gloo", timeout=limit)
            else:
                self._begun = True
                dist.init_process_group("gloo", timeout=limit, rank=self.rank, world_size=self.count)
        except (RuntimeError, ValueError) as error:
            self._over = True
            raise NormDoctorError(
                f"the {self.count} processes did not come together ({one_line(error)})",
                "Look whether all of them were started, and reach MASTER_ADDR.",
            ) from error
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._stop)
        self._places = self._exchange(_Place.here())

    def _stop(self, *_: int | FrameType | None) -> None:
        """torchrun stops all processes where one fails; what this one has begun is undone on the way out."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._over = True
        gone = self._gone(0.0)
        self.speaks = all(rank in gone for rank in range(self.rank))
        why = f"{_named(gone)} gone" if gone else "torchrun does this where another process fails"
        raise NormDoctorError(f"stopped from outside (SIGTERM): {why}: nothing was written", START_AGAIN)

    def close(self, *, failed: bool = False) -> None:
        """Leave the others. May be called twice. failed: this process is about to say what is wrong, and end; that
        torchrun stops it too does not keep it from saying so."""
        self._over = True
        if self._before is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN if failed else self._before)
            self._before = None
        with contextlib.suppress(RuntimeError, ValueError, AssertionError):
            if self._begun:
                dist.destroy_process_group()
            elif self._group is not None:
                dist.destroy_process_group(self._group)
        self._begun, self._group = False, None

    def __enter__(self) -> Together:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception | SystemExit) and not self._over:
            with contextlib.suppress(NormDoctorError):
                self._exchange(_Failure.of(error))
                self.speaks = self.rank == 0
        self.close(failed=error is not None)


def open_processes(environment: Mapping[str, str], *, timeout: float = TIMEOUT) -> Together:
    """The processes that torchrun started, which have met when this returns; to be used in a `with` statement.

    timeout: seconds that one waits for the others. Raises UsageError where torchrun started none, NormDoctorError
    where they do not come together."""
    if not are_several(environment):
        if "RANK" not in environment:
            raise UsageError("torchrun has started no other processes", "Start it with torchrun --nproc-per-node 2.")
        return Together(0, 1, timeout)
    found = Together(int(environment["RANK"]), int(environment["WORLD_SIZE"]), timeout)
    try:
        found.open()
    except BaseException:
        found.close()
        raise
    return found
