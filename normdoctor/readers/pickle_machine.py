"""A symbolic pickle machine: runs the opcodes of a pickle and builds inert records instead of objects.

Nothing named in the pickle is imported, called or given attributes. What pickle.load would call is recorded
as a `Call` and listed, so that a file's intentions can be read without being carried out. The opcodes and
their arguments are those of the standard library's pickletools (protocols 0 to 5).

Work is bounded: by the number of opcodes, by the bytes of one argument, by never copying what one opcode can
refer to again, and by using only atoms as dictionary keys (hashing nested tuples that refer to each other takes
exponential time). Nesting costs no recursion.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterable
from typing import Any

from normdoctor.errors import InputError
from normdoctor.readers.pickle_records import ORDERED_DICT, Call, Global, OpaqueKey, PersistentId, Pickled, Skipped

MAX_OPCODES = 3_000_000
"""A few seconds of work. A checkpoint of ten thousand tensors with Adam state takes about one million."""

MAX_PAIRS = 200_000
"""Only Python 2 gave its OrderedDicts lists of pairs; its models were small."""

MAX_LITERAL = 1 << 16
"""A longer string or bytes argument is skipped and stands in the result as `Skipped`."""

MAX_KEPT = 64 << 20
"""Once literals of this many bytes are kept, only those as short as a parameter's name are. Lines end here."""


DAMAGED = "The file is truncated, damaged or not a checkpoint; copy or download it again."


class _Mark:
    pass


_MARK = _Mark()
_ATOMS = (str, bytes, int, float, bool, type(None), Global)


class PickleMachine:
    """Reads one pickle from `stream`, which is left just behind its STOP.

    max_opcodes: how much work it may be; MAX_OPCODES unless the format is known to need more.
    Raises InputError for everything that is not a whole, well-formed pickle."""

    def __init__(self, stream: io.BufferedReader | io.BytesIO, what: str, max_opcodes: int | None = None) -> None:
        self._stream = stream
        self._read = stream.read
        self._what = what
        self._max_opcodes = MAX_OPCODES if max_opcodes is None else max_opcodes
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self.calls: list[Call] = []
        """Every call so far, also where the pickle breaks off: loading it would have made them by then."""
        self._persistent_ids: list[PersistentId] = []
        self._kept = 0
        self._kept_lines = 0
        self._pairs = 0

    def run(self) -> Pickled:
        read = self._read
        handlers = _HANDLERS
        try:
            for _ in range(self._max_opcodes):
                code = read(1)
                if code == b".":
                    return Pickled(self._pop(), self.calls, self._persistent_ids)
                handler = handlers.get(code)
                if handler is None:
                    raise self._error(f"has the unknown opcode {code!r}" if code else "ends in the middle")
                handler(self)
        except (IndexError, KeyError, TypeError, ValueError, struct.error, OverflowError) as error:
            raise self._error(f"is not well-formed ({type(error).__name__})") from error
        except EOFError as error:
            raise self._error("ends in the middle") from error
        raise self._error(
            f"has more than {self._max_opcodes:,} operations",
            "No checkpoint that normdoctor knows is that large; it may have been made to keep readers busy.",
        )

    def _error(self, how: str, hint: str = DAMAGED) -> InputError:
        return InputError(f"{self._what} {how}", hint)

    # stack and memo

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("mark")
        return value

    def _pop_mark(self) -> list[Any]:
        stack = self._stack
        for place in range(len(stack) - 1, -1, -1):
            if stack[place] is _MARK:
                values = stack[place + 1 :]
                del stack[place:]
                return values
        raise IndexError("no mark")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    # arguments

    def _bytes(self, count: int) -> bytes:
        data = self._read(count)
        if len(data) != count:
            raise EOFError
        return data

    def _unsigned(self, width: int) -> int:
        data = self._read(width)
        if len(data) != width:
            raise EOFError
        return int.from_bytes(data, "little")

    def _line(self) -> bytes:
        line = self._stream.readline(MAX_LITERAL)
        if not line.endswith(b"\n"):
            raise EOFError
        self._kept_lines += len(line)
        if self._kept_lines > MAX_KEPT:
            raise ValueError("names")
        return line[:-1]

    def _literal(self, length: int) -> bytes | Skipped:
        self._kept += length
        if length <= (MAX_LITERAL if self._kept <= MAX_KEPT else 256):
            return self._bytes(length)
        here = self._stream.tell()
        end = self._stream.seek(0, io.SEEK_END)
        if length > end - here:
            raise EOFError
        self._stream.seek(here + length)
        return Skipped(length)

    def _text(self, length: int) -> str | Skipped:
        literal = self._literal(length)
        return literal if isinstance(literal, Skipped) else literal.decode("utf-8", "surrogatepass")

    # records

    def _call(self, function: Any, args: Any, *, creates: bool) -> None:
        args = args if isinstance(args, tuple) else (args,)
        if not creates and function == ORDERED_DICT:
            # By far the commonest call: as light as a plain dictionary. Python 2 gave it a list of pairs.
            pairs = args[0] if args and isinstance(args[0], list) else []
            self._pairs += len(pairs)
            if self._pairs > MAX_PAIRS:  # one list of pairs, given to call after call
                raise ValueError("pairs")
            self._push({})
            for pair in pairs:
                if len(pair) != 2:
                    raise ValueError("pair")
                self._set_items(self._stack[-1], [*pair])
            return
        call = Call(function, args, creates)
        self.calls.append(call)
        self._push(call)

    def _global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("name")
        self._push(Global(module, name))

    def _set_items(self, target: Any, flat: list[Any]) -> None:
        if len(flat) % 2:
            raise ValueError("odd items")
        if isinstance(target, Call):
            if target.items is None:
                target.items = {}
            target = target.items
        elif not isinstance(target, dict):
            raise TypeError("not a dictionary")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            target[key if isinstance(key, _ATOMS) else OpaqueKey(id(key))] = value

    def _extend(self, target: Any, values: Iterable[Any]) -> None:
        if isinstance(target, Call):
            if target.members is None:
                target.members = []
            target = target.members
        elif not isinstance(target, list):
            raise TypeError("not a list")
        target.extend(values)

    def _build(self) -> None:
        state = self._pop()
        target = self._stack[-1]
        if isinstance(target, Call):
            target.state = state
        elif not isinstance(target, dict):  # an OrderedDict may carry attributes (_metadata): of no interest
            raise TypeError("cannot be built")

    def _memoize(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _refer(self, record: PersistentId) -> None:
        self._persistent_ids.append(record)
        self._push(record)

    def _extension(self, width: int) -> None:
        self._push(Global("copyreg", f"extension {self._unsigned(width)}"))


def _int_line(m: PickleMachine) -> None:
    line = m._line()
    m._push(line == b"01" if line in (b"00", b"01") else int(line, 0))


def _long_line(m: PickleMachine) -> None:
    m._push(int(m._line().removesuffix(b"L"), 0))


def _long(m: PickleMachine, length: int) -> None:
    literal = m._literal(length)
    m._push(literal if isinstance(literal, Skipped) else int.from_bytes(literal, "little", signed=True))


def _string_line(m: PickleMachine) -> None:
    line = m._line().strip()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise ValueError("string")
    m._push(line[1:-1].decode("latin-1"))


def _global_line(m: PickleMachine) -> None:
    module = m._line().decode("utf-8")
    m._global(module, m._line().decode("utf-8"))


def _stack_global(m: PickleMachine) -> None:
    name = m._pop()
    m._global(m._pop(), name)


def _reduce(m: PickleMachine) -> None:
    args = m._pop()
    m._call(m._pop(), args, creates=False)


def _newobj(m: PickleMachine) -> None:
    args = m._pop()
    m._call(m._pop(), args, creates=True)


def _newobj_ex(m: PickleMachine) -> None:
    m._pop()  # keywords: what they call has been listed, and no object of torch has any
    _newobj(m)


def _obj(m: PickleMachine) -> None:
    values = m._pop_mark()
    m._call(values[0], tuple(values[1:]), creates=False)


def _inst(m: PickleMachine) -> None:
    _global_line(m)
    function = m._pop()
    m._call(function, tuple(m._pop_mark()), creates=False)


def _setitem(m: PickleMachine) -> None:
    value, key = m._pop(), m._pop()
    m._set_items(m._stack[-1], [key, value])


def _setitems(m: PickleMachine) -> None:
    flat = m._pop_mark()
    m._set_items(m._stack[-1], flat)


def _append(m: PickleMachine) -> None:
    value = m._pop()
    m._extend(m._stack[-1], [value])


def _appends(m: PickleMachine) -> None:
    values = m._pop_mark()
    m._extend(m._stack[-1], values)


def _additems(m: PickleMachine) -> None:
    values = m._pop_mark()
    target = m._stack[-1]
    m._extend(target, values)


def _dict(m: PickleMachine) -> None:
    flat = m._pop_mark()
    target: dict[Any, Any] = {}
    m._set_items(target, flat)
    m._push(target)


def _tuple(m: PickleMachine, length: int) -> None:
    values = [m._pop() for _ in range(length)]
    m._push(tuple(reversed(values)))


def _pop_opcode(m: PickleMachine) -> None:
    m._stack.pop()


def _protocol(m: PickleMachine) -> None:
    if m._unsigned(1) > 5:
        raise ValueError("protocol")


def _persistent_line(m: PickleMachine) -> None:
    m._refer(PersistentId(m._line().decode("ascii")))


def _persistent(m: PickleMachine, value: Any) -> None:
    # torch's older container wraps a module's class with its source text: ("module", class, file, source)
    is_class = isinstance(value, tuple) and len(value) == 4 and value[0] == "module"
    if is_class and isinstance(value[1], Global):
        m._push(value[1])
    else:
        m._refer(PersistentId(value))


_HANDLERS: dict[bytes, Callable[[PickleMachine], Any]] = {
    b"(": lambda m: m._push(_MARK),
    b"0": _pop_opcode,
    b"1": lambda m: m._pop_mark(),
    b"2": lambda m: m._push(m._stack[-1]),
    b"F": lambda m: m._push(float(m._line())),
    b"G": lambda m: m._push(struct.unpack(">d", m._bytes(8))[0]),
    b"I": _int_line,
    b"J": lambda m: m._push(struct.unpack("<i", m._bytes(4))[0]),
    b"K": lambda m: m._stack.append(m._read(1)[0]),  # the next three make up half of a checkpoint: short
    b"L": _long_line,
    b"M": lambda m: m._push(m._unsigned(2)),
    b"N": lambda m: m._push(None),
    b"P": _persistent_line,
    b"Q": lambda m: _persistent(m, m._pop()),
    b"R": _reduce,
    b"S": _string_line,
    b"T": lambda m: m._push(m._text(m._unsigned(4))),
    b"U": lambda m: m._push(m._bytes(m._unsigned(1)).decode("latin-1")),
    b"V": lambda m: m._push(m._line().decode("raw-unicode-escape")),
    b"X": lambda m: m._push(m._text(m._unsigned(4))),
    b"a": _append,
    b"b": lambda m: m._build(),
    b"c": _global_line,
    b"d": _dict,
    b"}": lambda m: m._push({}),
    b"e": _appends,
    b"g": lambda m: m._push(m._memo[int(m._line())]),
    b"h": lambda m: m._stack.append(m._memo[m._read(1)[0]]),
    b"i": _inst,
    b"j": lambda m: m._push(m._memo[m._unsigned(4)]),
    b"l": lambda m: m._push(m._pop_mark()),
    b"]": lambda m: m._push([]),
    b"o": _obj,
    b"p": lambda m: m._memoize(int(m._line())),
    b"q": lambda m: m._memo.__setitem__(m._read(1)[0], m._stack[-1]),
    b"r": lambda m: m._memoize(m._unsigned(4)),
    b"s": _setitem,
    b"t": lambda m: m._push(tuple(m._pop_mark())),
    b")": lambda m: m._push(()),
    b"u": _setitems,
    # protocol 2
    b"\x80": _protocol,
    b"\x81": _newobj,
    b"\x82": lambda m: m._extension(1),
    b"\x83": lambda m: m._extension(2),
    b"\x84": lambda m: m._extension(4),
    b"\x85": lambda m: _tuple(m, 1),
    b"\x86": lambda m: _tuple(m, 2),
    b"\x87": lambda m: _tuple(m, 3),
    b"\x88": lambda m: m._push(True),
    b"\x89": lambda m: m._push(False),
    b"\x8a": lambda m: _long(m, m._unsigned(1)),
    b"\x8b": lambda m: _long(m, m._unsigned(4)),
    # protocol 3
    b"B": lambda m: m._push(m._literal(m._unsigned(4))),
    b"C": lambda m: m._push(m._bytes(m._unsigned(1))),
    # protocol 4
    b"\x8c": lambda m: m._push(m._text(m._unsigned(1))),
    b"\x8d": lambda m: m._push(m._text(m._unsigned(8))),
    b"\x8e": lambda m: m._push(m._literal(m._unsigned(8))),
    b"\x8f": lambda m: m._push([]),  # a set: only its members matter
    b"\x90": _additems,
    b"\x91": lambda m: m._push(tuple(m._pop_mark())),  # a frozenset
    b"\x92": _newobj_ex,
    b"\x93": _stack_global,
    b"\x94": lambda m: m._memoize(len(m._memo)),
    b"\x95": lambda m: m._bytes(8),  # FRAME: only a hint for buffering
    # protocol 5
    b"\x96": lambda m: m._push(m._literal(m._unsigned(8))),
    b"\x97": lambda m: m._push(None),  # NEXT_BUFFER
    b"\x98": lambda m: None,  # READONLY_BUFFER
}
