"""What a pickle of ``torch.save`` says, found out without loading it.

A pickle is a program for a small stack machine that can call anything that Python can import. This
is another machine for it. It imports nothing and calls nothing: it knows the few names that
checkpoints of tensors need (`della_dist.storage.torch_files.records`), keeps them as names, and
notes what they would have made. Every other name is refused, and so is every instruction that plain
data and tensors do not need. What it takes of memory and time is in proportion to the length of the
pickle, which is bounded.

Source: ``pickletools`` of Python's library, which describes the instructions.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NoReturn, TypeAlias

from della_dist.storage.torch_files.records import KNOWN_NAMES, Name, Storage, Table, call, shown

#: Some 300 bytes and 46 instructions a tensor.
MAX_PICKLE_BYTES = 64 << 20
MAX_INSTRUCTIONS = 4_000_000
#: Python hands over a thousand entries of a dictionary at once; and a tensor needs few levels.
_MAX_STACK = 20_000
_MAX_MARKS = 100
_PROTOCOLS = range(2, 6)


def read_pickle(data: bytes) -> object:
    """Return what a pickle holds.

    Dictionaries are a `Table`, tensors a `View`, and everything else what it is in Python: text,
    bytes, numbers, truth values, None, lists and tuples.

    Raises
    ------
    ValueError
        If the pickle is damaged, or would need more than that: what.
    """
    machine = _Machine(data)
    try:
        return machine.run()
    except (IndexError, struct.error):
        position = min(machine.position, len(data))
        raise ValueError(f"its pickle is damaged or cut short at byte {position}") from None


class _Machine:
    """A stack, what was memorised, and where in the pickle the next instruction is."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0
        self._stack: list[object] = []
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}

    def run(self) -> object:
        data, stack, instructions = self.data, self._stack, _INSTRUCTIONS
        for _ in range(MAX_INSTRUCTIONS):
            code = data[self.position]
            self.position += 1
            if code == _STOP:
                if len(stack) != 1 or self._marks or self.position != len(data):
                    raise IndexError
                return stack[0]
            instruction = instructions.get(code)
            if instruction is None:
                self._refuse(code)
            instruction(self)
            if len(stack) > _MAX_STACK or len(self._marks) > _MAX_MARKS:
                raise ValueError("its pickle is nested deeper than any checkpoint's")
        raise ValueError(f"its pickle has more than {MAX_INSTRUCTIONS} instructions")

    def _refuse(self, code: int) -> NoReturn:
        import pickletools

        known: dict[str, pickletools.OpcodeInfo] = pickletools.code2op  # type: ignore[attr-defined]
        name = known[chr(code)].name if chr(code) in known else f"0x{code:02x}"
        raise ValueError(f"its pickle has the instruction {name}, which no checkpoint needs")

    def _take(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise IndexError
        return self.data[start : self.position]

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _pop(self) -> object:
        if self._marks and self._marks[-1] == len(self._stack):
            raise IndexError  # below a mark is nobody's
        return self._stack.pop()

    def _pop_many(self, count: int) -> list[object]:
        return [self._pop() for _ in range(count)][::-1]

    def _pop_to_mark(self) -> list[object]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _top(self) -> object:
        top = self._pop()
        self._stack.append(top)
        return top

    def protocol(self) -> None:
        if self._number(1) not in _PROTOCOLS or self.position != 2:
            raise ValueError("its pickle is of no protocol that torch writes")

    def frame(self) -> None:
        if self._number(8) > len(self.data) - self.position:
            raise IndexError

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def constant(self, value: object) -> None:
        self._stack.append(value)

    def empty_list(self) -> None:
        self._stack.append([])

    def empty_dict(self) -> None:
        self._stack.append(Table([]))

    def whole_number(self, size: int) -> None:
        self._stack.append(self._number(size))

    def signed_number(self) -> None:
        self._stack.append(int.from_bytes(self._take(4), "little", signed=True))

    def long_number(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._number(1)), "little", signed=True))

    def double(self) -> None:
        self._stack.append(struct.unpack(">d", self._take(8))[0])

    def text(self, size: int) -> None:
        try:
            self._stack.append(self._take(self._number(size)).decode())
        except UnicodeDecodeError:
            raise ValueError("its pickle has text that is not UTF-8") from None

    def binary(self, size: int) -> None:
        self._stack.append(self._take(self._number(size)))

    def tuple_of(self, count: int) -> None:
        self._stack.append(tuple(self._pop_many(count)))

    def tuple_to_mark(self) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def append(self) -> None:
        (value,) = self._pop_many(1)
        self._as_list(self._top()).append(value)

    def appends(self) -> None:
        values = self._pop_to_mark()
        self._as_list(self._top()).extend(values)

    def _as_list(self, value: object) -> list[object]:
        if not isinstance(value, list):
            raise ValueError("its pickle appends to what is no list")  # noqa: TRY004
        return value

    def set_item(self) -> None:
        self._set_items(self._pop_many(2))

    def set_items(self) -> None:
        self._set_items(self._pop_to_mark())

    def _set_items(self, items: list[object]) -> None:
        table = self._top()
        if not isinstance(table, Table) or len(items) % 2:
            raise ValueError("its pickle adds entries to what is no dictionary")
        table.pairs.extend(zip(items[::2], items[1::2], strict=True))

    def remember(self, size: int) -> None:
        self._memo[self._number(size)] = self._top()

    def remember_next(self) -> None:
        self._memo[len(self._memo)] = self._top()

    def recall(self, size: int) -> None:
        number = self._number(size)
        if number not in self._memo:
            raise IndexError
        self._stack.append(self._memo[number])

    def global_name(self) -> None:
        self._name(self._line(), self._line())

    def stacked_name(self) -> None:
        module, name = self._pop_many(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("its pickle names something by what is no text")  # noqa: TRY004
        self._name(module, name)

    def _line(self) -> str:
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise IndexError
        line = self._take(end + 1 - self.position)[:-1]
        return line.decode("utf-8", "backslashreplace")

    def _name(self, module: str, name: str) -> None:
        found = Name(module, name)
        if str(found) not in KNOWN_NAMES or "." in name:
            raise ValueError(f"it names {shown(found)}, which plain tensors do not need")
        self._stack.append(found)

    def persistent(self) -> None:
        (found,) = self._pop_many(1)
        match found:
            case ("storage", Name() as kind, str(key), str(), int(num_elements)):
                self._stack.append(Storage(kind, key, num_elements))
            case _:
                raise ValueError("its pickle refers to what is no storage of numbers")

    def call(self) -> None:
        function, arguments = self._pop_many(2)
        if not isinstance(arguments, tuple):
            raise ValueError(f"it calls {shown(function)} with no arguments")  # noqa: TRY004
        self._stack.append(call(function, arguments))

    def set_state(self) -> None:
        """Leave the attributes of a dictionary out: versions of modules."""
        (state,) = self._pop_many(1)
        made = self._top()
        pairs = state.pairs if isinstance(state, Table) else []
        if not isinstance(made, Table) or len(pairs) != 1 or pairs[0][0] != "_metadata":
            raise ValueError(f"it sets the state of {shown(made)}, which tensors do not need")


_Instruction: TypeAlias = Callable[[_Machine], None]


def _with(method: Callable[[_Machine, int], None], value: int) -> _Instruction:
    return lambda machine: method(machine, value)


def _constant(value: object) -> _Instruction:
    return lambda machine: machine.constant(value)


_STOP = ord(".")
_INSTRUCTIONS: dict[int, _Instruction] = {
    0x80: _Machine.protocol,
    0x95: _Machine.frame,
    ord("("): _Machine.mark,
    ord("N"): _constant(None),
    0x88: _constant(True),
    0x89: _constant(False),
    ord(")"): _constant(()),
    ord("]"): _Machine.empty_list,
    ord("}"): _Machine.empty_dict,
    ord("K"): _with(_Machine.whole_number, 1),
    ord("M"): _with(_Machine.whole_number, 2),
    ord("J"): _Machine.signed_number,
    0x8A: _Machine.long_number,
    ord("G"): _Machine.double,
    0x8C: _with(_Machine.text, 1),
    ord("X"): _with(_Machine.text, 4),
    0x8D: _with(_Machine.text, 8),
    ord("C"): _with(_Machine.binary, 1),
    ord("B"): _with(_Machine.binary, 4),
    0x8E: _with(_Machine.binary, 8),
    0x85: _with(_Machine.tuple_of, 1),
    0x86: _with(_Machine.tuple_of, 2),
    0x87: _with(_Machine.tuple_of, 3),
    ord("t"): _Machine.tuple_to_mark,
    ord("a"): _Machine.append,
    ord("e"): _Machine.appends,
    ord("s"): _Machine.set_item,
    ord("u"): _Machine.set_items,
    ord("q"): _with(_Machine.remember, 1),
    ord("r"): _with(_Machine.remember, 4),
    0x94: _Machine.remember_next,
    ord("h"): _with(_Machine.recall, 1),
    ord("j"): _with(_Machine.recall, 4),
    ord("c"): _Machine.global_name,
    0x93: _Machine.stacked_name,
    ord("Q"): _Machine.persistent,
    ord("R"): _Machine.call,
    ord("b"): _Machine.set_state,
}
