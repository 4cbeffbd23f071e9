"""Reads the pickle inside a torch file without torch, without its data, and without running anything it names.

Stricter than `torch.load(weights_only=True)`: an interpreter of its own for the opcodes that checkpoints use, in which
every global on the list in stand_ins is an inert stand-in (a tensor becomes a `StoredTensor`, its place in the file),
so that nothing is imported, called or allocated on a file's behalf. Anything else is refused by name, but for what
training leaves beside the weights: there a class of any library is kept as its name, and only what Python itself brings
(`os.system`) is refused. Work and memory grow with the bytes of the pickle and no faster: no opcode may announce a
size, only plain values may be keys, and what the objects take is counted. `pickle.Unpickler` (with `find_class` and
`persistent_load`), as Python 3.10 to 3.12 have it, bounds none of these: a memo index of four bytes makes it allocate
sixteen times as many bytes as the index says, a claimed length is allocated before that many bytes are known to be
there, and the hash of a nested tuple that is shared takes twice as long with each level.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from weights_conversion.errors import ConversionError
from weights_conversion.formats import unlisted
from weights_conversion.formats.pickle_opcodes import (
    BYTES_AT_LEAST,
    BYTES_PER_BYTE,
    CONSTANTS,
    COST,
    COSTS,
    LITERALS,
    WITHOUT_ARGUMENT,
    Operations,
)
from weights_conversion.formats.pickle_quick import Quick
from weights_conversion.formats.stand_ins import ENUMS, GLOBALS, EnumMember, Foreign, Storage, member_of, storage_of

MAX_PICKLE_BYTES = 64 << 20  # hundreds of thousands of tensors
CERTAIN = 8  # bytes: further in front of the end, an argument of few bytes is whole


def load(
    data: bytes, where: str, further: Mapping[tuple[str, str], Any] = MappingProxyType({}), *, training: bool = False,
    storages: dict[str, Storage] | None = None,
) -> Any:  # fmt: skip
    """The object in a pickle, tensors as StoredTensor and Namespaces as plain objects. Errors name `where`.

    `further` are inert stand-ins for globals that only this kind of file may name. `training`: it is a dict that
    training wrote, in whose args and states (unlisted.py) globals of any name become Foreign; `storages` takes its own.
    """
    try:
        machine = _Machine(where, further, training, {} if storages is None else storages)
        content = machine.run(data)
        name = unlisted.misplaced(content, machine.unknown)
        if name is not None:
            raise machine.refusal(name)
        return content
    except ConversionError:
        raise
    except RecursionError as error:
        raise ConversionError(f"{where} is nested too deeply to be a checkpoint") from error
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        raise ConversionError(f"{where} holds a damaged pickle ({type(error).__name__}: {str(error)[:200]})") from error


class _Machine(Quick):
    """One run over one pickle, whose opcodes `operations` takes apart; handlers are named after them."""

    def __init__(
        self, where: str, further: Mapping[tuple[str, str], Any], training: bool, storages: dict[str, Storage]
    ) -> None:  # fmt: skip
        super().__init__(where)
        self._training, self._storages = training, storages
        self._by_name = ""  # what a refusal says in front of the name
        self.unknown: set[str] = set()  # globals that are on no list
        # Classes of its own, so that no file can touch a shared one. torch hangs `_metadata` on an OrderedDict.
        self._arguments, self._ordered = type("Arguments", (), {}), type("OrderedDict", (dict,), {})
        self._allowed: dict[tuple[str, str], Any] = {
            ("argparse", "Namespace"): self._arguments,
            ("types", "SimpleNamespace"): self._arguments,
            ("collections", "OrderedDict"): self._ordered,
            **GLOBALS,
            **further,
        }
        self._stubs = {Foreign, *(stub for stub in further.values() if isinstance(stub, type))}

    def run(self, data: bytes) -> Any:
        handlers = {name.removeprefix("_op_"): getattr(self, name) for name in dir(self) if name.startswith("_op_")}
        handlers |= {name: self._constant(make) for name, make in CONSTANTS.items()}
        self._plain = tuple(handlers.get(WITHOUT_ARGUMENT.get(code, "")) for code in range(256))
        self._left = BYTES_AT_LEAST + BYTES_PER_BYTE * len(data)
        others = Operations(data)
        while True:
            others.position = self._quick(data, others.position, len(data) - CERTAIN)
            name, argument = others.next()
            if name == "STOP":
                self._plain = ()  # which hold this run, and all that it has made
                return self._stack.pop()
            self._other(name, argument, handlers)

    def _constant(self, make: Callable[[], Any]) -> Callable[[Any], None]:
        return lambda _: self._stack.append(make())

    def _other(self, name: str, argument: Any, handlers: Mapping[str, Callable[[Any], None]]) -> None:
        """One operation of any kind."""
        self._spend(COSTS.get(name, COST))
        if name in LITERALS:
            self._stack.append(argument)
        elif name in ("BINGET", "GET", "LONG_BINGET"):
            self._stack.append(self._memo[int(argument or 0)])
        elif name in ("BINPUT", "PUT", "LONG_BINPUT"):
            self._memo[int(argument or 0)] = self._stack[-1]
        elif name in handlers:
            handlers[name](argument)
        elif name not in ("PROTO", "FRAME"):
            raise ConversionError(
                f"{self._where} uses the pickle opcode {name}, which no checkpoint of these models needs: "
                "it was not loaded; save it again with torch.save if you trust where it comes from"
            )

    def _since_mark(self) -> list[Any]:
        position = self._marks.pop()
        if position > len(self._stack):
            raise pickle.UnpicklingError("a mark beyond the stack")
        items = self._stack[position:]
        del self._stack[position:]
        return items

    def _key(self, key: Any) -> Any:
        """A key whose hash takes time in proportion to its bytes. (That of a shared, nested tuple is exponential.)"""
        if isinstance(key, tuple) and len(key) < 64 and not any(isinstance(part, tuple) for part in key):
            for part in key:
                self._key(part)
        elif not (
            key is None or isinstance(key, (str, bytes)) or type(key) in self._stubs or type(key) is bool
            or (type(key) is int and abs(key) < 1 << 63)
            or (isinstance(key, EnumMember) and (key.value is None or type(key.value) is str))
            or (isinstance(key, EnumMember) and type(key.value) is int and abs(key.value) < 1 << 63)
        ):  # fmt: skip
            raise pickle.UnpicklingError(f"a {type(key).__name__} as a key")
        return key

    def _counted(self, pairs: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        """Pairs that a pickle may pass any number of times."""
        for pair in pairs:
            self._spend(COST)
            yield pair

    def _fill(self, target: Any, pairs: Iterable[tuple[Any, Any]]) -> None:
        if isinstance(target, Foreign):  # a dict of some class: nothing of it is needed
            return
        if not isinstance(target, dict):
            raise pickle.UnpicklingError(f"items for a {type(target).__name__}")
        for key, value in pairs:
            target[key if type(key) is str else self._key(key)] = value

    def _append(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, Foreign):
            return
        if not isinstance(target, list):
            raise pickle.UnpicklingError(f"elements for a {type(target).__name__}")
        target.extend(items)

    def _find(self, module: str, name: str) -> Any:
        if (module, name) in self._allowed:
            return self._allowed[module, name]
        if (module, name) == ("builtins", "getattr") and self._training:
            self._by_name = "builtins.getattr, and then for "
            return member_of
        if (module, name) in ENUMS:
            return lambda value=None, *_: EnumMember(name, value)
        if not self._training or unlisted.is_harmful(module, name):
            raise self.refusal(f"{module}.{name}")
        self.unknown.add(f"{module}.{name}")
        return Foreign(f"{module}.{name}")

    def refusal(self, name: str) -> ConversionError:
        return ConversionError(
            f"{self._where} asks for {self._by_name}{name}, which no checkpoint of these models needs: it was not "
            "loaded; re-save the file without it if you trust where it comes from"
        )

    def _op_MARK(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def _op_POP(self, _: Any) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def _op_POP_MARK(self, _: Any) -> None:
        self._since_mark()

    def _op_DUP(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def _op_MEMOIZE(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _op_TUPLE(self, _: Any) -> None:
        self._stack.append(tuple(self._since_mark()))

    def _op_TUPLE1(self, _: Any) -> None:
        self._stack[-1:] = [(self._stack[-1],)]

    def _op_TUPLE2(self, _: Any) -> None:
        self._stack[-2:] = [(self._stack[-2], self._stack[-1])]

    def _op_TUPLE3(self, _: Any) -> None:
        self._stack[-3:] = [(self._stack[-3], self._stack[-2], self._stack[-1])]

    def _op_LIST(self, _: Any) -> None:
        self._stack.append(self._since_mark())

    def _op_APPEND(self, _: Any) -> None:
        value = self._stack.pop()
        self._append(self._stack[-1], [value])

    def _op_APPENDS(self, _: Any) -> None:
        items = self._since_mark()
        self._append(self._stack[-1], items)

    def _op_DICT(self, _: Any) -> None:
        items, made = self._since_mark(), {}
        self._spend(COST * (len(items) // 2))
        self._fill(made, zip(items[::2], items[1::2], strict=True))
        self._stack.append(made)

    def _op_SETITEM(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._spend(COST)
        self._fill(self._stack[-1], [(key, value)])

    def _op_SETITEMS(self, _: Any) -> None:
        items = self._since_mark()
        self._spend(COST * (len(items) // 2))
        self._fill(self._stack[-1], zip(items[::2], items[1::2], strict=True))

    def _op_ADDITEMS(self, _: Any) -> None:
        items = self._since_mark()
        if not isinstance(self._stack[-1], set):
            raise pickle.UnpicklingError(f"members for a {type(self._stack[-1]).__name__}")
        self._stack[-1].update([self._key(item) for item in items])

    def _op_FROZENSET(self, _: Any) -> None:
        self._stack.append(frozenset([self._key(item) for item in self._since_mark()]))

    def _op_GLOBAL(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._stack.append(self._find(module, name))

    def _op_STACK_GLOBAL(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise pickle.UnpicklingError("a global without a name")
        self._stack.append(self._find(module, name))

    def _op_BINPERSID(self, _: Any) -> None:
        storage = storage_of(self._stack.pop())
        if self._storages.setdefault(storage.key, storage) != storage:
            raise pickle.UnpicklingError(f"two storages {storage.key}")
        self._stack.append(storage)

    def _op_REDUCE(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("a call without arguments")
        self._stack.append(self._call(function, arguments) if arguments else function())

    _op_NEWOBJ = _op_REDUCE

    def _op_NEWOBJ_EX(self, _: Any) -> None:
        self._stack.pop()  # keyword arguments: no stand-in has any
        self._op_REDUCE(None)

    def _call(self, function: Callable[..., Any], arguments: tuple) -> Any:
        if function is self._ordered:
            made = self._ordered()
            self._fill(made, *map(self._counted, arguments))
            return made
        if function is self._arguments:
            return self._arguments()
        for group in (arguments, *arguments):  # which a pickle may pass any number of times, and a stand-in copy
            if isinstance(group, (list, tuple, dict, set)):
                self._spend(8 * len(group))
        return function(*arguments)

    def _op_BUILD(self, _: Any) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(state, dict):
            self._spend(COST * len(state))
        if type(target) in self._stubs:
            if (set_state := getattr(type(target), "__setstate__", None)) is not None:  # not one that a state brought
                set_state(target, state)
        elif isinstance(target, self._arguments):
            if not isinstance(state, dict) or not all(type(name) is str for name in state):
                raise pickle.UnpicklingError("malformed arguments")
            vars(target).update(state)
        elif not isinstance(target, self._ordered):
            raise pickle.UnpicklingError(f"a state for a {type(target).__name__}")
