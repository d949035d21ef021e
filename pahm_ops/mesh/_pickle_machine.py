"""Reading pickles of arrays into inert records.

Python's own unpickler calls whatever a file names, sets attributes on classes and allocates whatever the file
claims. This one knows the opcodes of protocols 0 to 5, calls nothing, and makes only numbers, strings, lists,
tuples and `Record`s.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

OPCODE_LIMIT = 1_000_000
"""A pickle of arrays has a few hundred opcodes; a pickle of lists has one opcode per number."""

SPARSE = {
    f"{form}_{kind}"
    for form in ("bsr", "coo", "csc", "csr", "dia", "dok", "lil")
    for kind in ("matrix", "array")
}
CHUMPY = {"Ch", "Select"}

_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
_BUILTINS = ("__builtin__", "builtins")
_NAMES: dict[str, tuple[str, ...]] = {
    "ndarray": ("numpy", *_MULTIARRAY),
    "dtype": ("numpy", *_MULTIARRAY),
    "_reconstruct": _MULTIARRAY,
    "scalar": _MULTIARRAY,
    "_frombuffer": _NUMERIC,
    "encode": ("_codecs",),
    "_reconstructor": ("copy_reg", "copyreg"),
    "object": _BUILTINS,
    "dict": _BUILTINS,
    "set": _BUILTINS,
    "frozenset": _BUILTINS,
    "bytes": _BUILTINS,
    "bytearray": _BUILTINS,
    "Ch": ("chumpy.ch",),
    "Select": ("chumpy.reordering",),
}


class Name(NamedTuple):
    """A class or function named in a pickle: the last part of its name."""

    name: str


class Dictionary:
    """The pairs of a dictionary, not hashed, because a file may choose keys that are slow to hash."""

    __slots__ = ("pairs",)

    def __init__(self) -> None:
        self.pairs: list[tuple[Any, Any]] = []

    def by_name(self) -> dict[str, Any]:
        """The items whose keys are strings."""
        return {key: value for key, value in self.pairs if type(key) is str}


class Record:
    """An object in a pickle: the arguments that made it, its state and its items."""

    __slots__ = ("arguments", "items", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...] = ()) -> None:
        self.name = name
        self.arguments = arguments
        self.state: Any = None
        self.items = Dictionary()


def read_pickle(data: bytes) -> Any:
    """The object in a pickle: None, bool, int, float, str, bytes, list, tuple, `Dictionary` or `Record`.

    Sets become lists. Strings of Python 2, and bytes that Python 3 wrote for Python 2, are decoded as latin1.
    Raises ValueError for data that is not a pickle, for classes other than those of arrays, and for more than
    `OPCODE_LIMIT` opcodes.
    """
    return _Machine(data).run()


def _refuse(reason: str) -> NoReturn:
    raise ValueError(reason)


def _find(module: Any, name: Any) -> Name:
    if type(module) is not str or type(name) is not str:
        _refuse("it names a class by other than text")
    sparse = name in SPARSE and (module == "scipy.sparse" or module.startswith("scipy.sparse."))
    if sparse or module in _NAMES.get(name, ()):
        return Name(name)
    asked = "".join(c if c.isprintable() else "?" for c in f"{module}.{name}"[:100])
    _refuse(
        f"the pickle asks for {asked}, and only numpy's and scipy.sparse's arrays are admitted; "
        "open it where you trust it, convert that object with numpy.array(...), and save it again"
    )


def _call(function: Any, arguments: Any) -> Any:
    """The value that stands for the result of a call."""
    if type(function) is not Name or type(arguments) is not tuple:
        _refuse("it calls what is no function of arrays")
    name, count = function.name, len(arguments)
    if name == "encode" and count == 2 and type(arguments[0]) is str:
        if arguments[1] not in ("latin1", "latin-1"):
            _refuse("a pickle of arrays encodes as latin1 only")
        return arguments[0]
    if name in ("bytes", "bytearray") and count <= 2:
        return arguments[0] if arguments and type(arguments[0]) in (bytes, str) else b""
    if name in ("set", "frozenset") and count <= 1:
        return arguments[0] if arguments and type(arguments[0]) is list else []
    if name == "_reconstruct" and arguments[:1] == (Name("ndarray"),):
        return Record("ndarray")
    if name in ("dtype", "scalar", "_frombuffer"):
        return Record(name, arguments)
    if name == "_reconstructor":
        return _new(*arguments) if count == 3 else _refuse("it makes an object of too few arguments")
    return _refuse(f"a pickle of arrays does not call {name}")


_BASES = (Name("object"), Name("dict"))


def _new(cls: Any, base: Any = _BASES[0], state: Any = None) -> Record:
    if type(cls) is not Name or cls.name not in SPARSE | CHUMPY or base not in _BASES:
        _refuse(f"a pickle of arrays builds no {cls.name if type(cls) is Name else type(cls).__name__}")
    record = Record(cls.name)
    if type(state) is Dictionary:
        record.items = state
    return record


def _number(text: bytes) -> int:
    if len(text) > 24:
        _refuse(f"it has an integer of {len(text)} digits")
    return int(text)


def _int_or_bool(text: bytes) -> int:
    return {b"00": False, b"01": True}[text] if text in (b"00", b"01") else _number(text)


def _long(raw: bytes) -> int:
    if len(raw) > 9:
        _refuse(f"it has an integer of {len(raw)} bytes")
    return int.from_bytes(raw, "little", signed=True)


def _float(text: bytes) -> float:
    if len(text) > 64:
        _refuse(f"it has a number of {len(text)} digits")
    return float(text)


def _quoted(text: bytes) -> str:
    if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
        _refuse("it has a string without quotes")
    return text[1:-1].decode("unicode_escape")


def _utf8(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


def _latin1(raw: bytes) -> str:
    return raw.decode("latin1")


def _unpacked(form: str) -> Callable[[bytes], Any]:
    return lambda raw: struct.unpack(form, raw)[0]


_byte, _long_index = _unpacked("<B"), _unpacked("<I")

# The length of an opcode's argument: a fixed number of bytes, to the end of the line, or given by a count.
_FIXED = {b"J": 4, b"K": 1, b"M": 2, b"G": 8, b"h": 1, b"j": 4, b"q": 1, b"r": 4, b"\x80": 1, b"\x95": 8}
_LINES = {b"I", b"L", b"F", b"S", b"V", b"g", b"p", b"c", b"i"}
_COUNTED = {
    **dict.fromkeys((b"U", b"C", b"\x8a", b"\x8c"), "<B"),
    **dict.fromkeys((b"T", b"B", b"\x8b", b"X"), "<I"),
    **dict.fromkeys((b"\x8d", b"\x8e", b"\x96"), "<Q"),
}
_VALUES: dict[bytes, Callable[[bytes], Any]] = {
    b"N": lambda _: None,
    b"\x88": lambda _: True,
    b"\x89": lambda _: False,
    b")": lambda _: (),
    b"]": lambda _: [],
    b"}": lambda _: Dictionary(),
    b"\x8f": lambda _: [],
    b"I": _int_or_bool,
    b"J": _unpacked("<i"),
    b"K": _byte,
    b"M": _unpacked("<H"),
    b"L": lambda text: _number(text.removesuffix(b"L")),
    b"\x8a": _long,
    b"\x8b": _long,
    b"F": _float,
    b"G": _unpacked(">d"),
    b"S": _quoted,
    b"T": _latin1,
    b"U": _latin1,
    b"V": lambda text: text.decode("raw_unicode_escape"),
    b"X": _utf8,
    b"\x8c": _utf8,
    b"\x8d": _utf8,
    b"B": bytes,
    b"C": bytes,
    b"\x8e": bytes,
    b"\x96": bytes,
}
_INDICES = {b"p": _number, b"q": _byte, b"r": _long_index, b"g": _number, b"h": _byte, b"j": _long_index}


class _Machine:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.array_bytes = 0

    def run(self) -> Any:
        steps = 0
        try:
            while (opcode := self.take(1)) != b".":
                steps += 1
                if steps > OPCODE_LIMIT:
                    _refuse(f"it has more than {OPCODE_LIMIT} opcodes")
                argument = self.argument(opcode)
                if opcode in _VALUES:
                    self.stack.append(_VALUES[opcode](argument))
                elif opcode in _STEPS:
                    _STEPS[opcode](self, argument)
                elif opcode in _INDICES:
                    self.remember(opcode, _INDICES[opcode](argument))
                elif opcode not in (b"\x80", b"\x95"):
                    _refuse(f"it has the opcode {opcode!r}")
            return self.stack.pop()
        except IndexError:
            _refuse("it takes from an empty stack")

    def take(self, count: int) -> bytes:
        start = self.position
        self.position += count
        if self.position > len(self.data):
            _refuse(f"it ends after {len(self.data)} bytes, within an entry of {count}")
        return self.data[start : self.position]

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.position)
        if end < 0:
            _refuse("it ends within a line")
        return self.take(end + 1 - self.position)[:-1]

    def argument(self, opcode: bytes) -> bytes:
        if opcode in _COUNTED:
            form = _COUNTED[opcode]
            return self.take(struct.unpack(form, self.take(struct.calcsize(form)))[0])
        if opcode in _LINES:
            return self.line()
        return self.take(_FIXED.get(opcode, 0))

    def remember(self, opcode: bytes, index: int) -> None:
        if opcode in b"pqr":
            self.memo[index] = self.stack[-1]
        elif index in self.memo:
            self.stack.append(self.memo[index])
        else:
            _refuse(f"it takes entry {index} of a memo of {len(self.memo)}")

    def since_mark(self) -> list[Any]:
        found = self.stack
        self.stack = self.marked.pop()
        return found

    def mark(self, _: bytes) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def pop(self, _: bytes) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def pop_mark(self, _: bytes) -> None:
        self.since_mark()

    def duplicate(self, _: bytes) -> None:
        self.stack.append(self.stack[-1])

    def memoize(self, _: bytes) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def make_tuple(self, _: bytes) -> None:
        values = tuple(self.since_mark())
        self.stack.append(values)

    def tuple_of(self, count: int) -> None:
        values = [self.stack.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(values)))

    def make_list(self, _: bytes) -> None:
        values = self.since_mark()
        self.stack.append(values)

    def append(self, _: bytes) -> None:
        self.extend([self.stack.pop()])

    def appends(self, _: bytes) -> None:
        self.extend(self.since_mark())

    def extend(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            _refuse(f"it appends to {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(values)

    def make_dictionary(self, _: bytes) -> None:
        values = self.since_mark()
        self.stack.append(Dictionary())
        self.set_pairs(values)

    def set_item(self, _: bytes) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_pairs([key, value])

    def set_items(self, _: bytes) -> None:
        self.set_pairs(self.since_mark())

    def set_pairs(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is Record:
            target = target.items
        if type(target) is not Dictionary or len(values) % 2:
            _refuse(f"it sets items of {type(target).__name__}")
        target.pairs.extend(zip(values[::2], values[1::2], strict=True))

    def find(self, argument: bytes) -> None:
        self.stack.append(_find(_utf8(argument), _utf8(self.line())))

    def find_on_stack(self, _: bytes) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_find(module, name))

    def call(self, _: bytes) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        result = _call(function, arguments)
        self.stack.append(result)
        if type(result) is Record:
            self.count(arguments)

    def new(self, _: bytes) -> None:
        _, cls = self.stack.pop(), self.stack.pop()
        self.stack.append(_new(cls))

    def new_old(self, argument: bytes) -> None:
        """An instance of a Python 2 old-style class. Arrays never use these."""
        _new(_find(_utf8(argument), _utf8(self.line())), None)

    def build(self, _: bytes) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is not Record:
            _refuse(f"it sets the state of {type(target).__name__}")
        target.state = state
        self.count(state)

    def count(self, parts: Any) -> None:
        """Adds up the bytes of arrays: arrays that share bytes could need more memory than the file."""
        if type(parts) is tuple:
            self.array_bytes += sum(len(part) for part in parts if type(part) in (bytes, str))
        if self.array_bytes > len(self.data):
            _refuse(f"its arrays have more bytes than the {len(self.data)} of the file")


_STEPS: dict[bytes, Callable[[_Machine, bytes], None]] = {
    b"(": _Machine.mark,
    b"0": _Machine.pop,
    b"1": _Machine.pop_mark,
    b"2": _Machine.duplicate,
    b"\x94": _Machine.memoize,
    b"t": _Machine.make_tuple,
    b"\x85": lambda machine, _: machine.tuple_of(1),
    b"\x86": lambda machine, _: machine.tuple_of(2),
    b"\x87": lambda machine, _: machine.tuple_of(3),
    b"l": _Machine.make_list,
    b"a": _Machine.append,
    b"e": _Machine.appends,
    b"\x90": _Machine.appends,
    b"\x91": _Machine.make_list,
    b"d": _Machine.make_dictionary,
    b"s": _Machine.set_item,
    b"u": _Machine.set_items,
    b"c": _Machine.find,
    b"\x93": _Machine.find_on_stack,
    b"R": _Machine.call,
    b"\x81": _Machine.new,
    b"i": _Machine.new_old,
    b"b": _Machine.build,
}
