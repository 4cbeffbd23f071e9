"""What ext4 (data=ordered) and XFS may show after a power cut, from the record of what a run has done.

The names in folders, sizes that were set, modes and attributes ("metadata") become durable in the order in which they
were changed: what is there after a cut is what a first part of the run has made. That part reaches at least to the last
change of whatever has been synced: of a file by its fsync, of a folder's names by that folder's. ext4 makes everything
durable that was done before any fsync, so its states are some of these. The bytes of a file that were written after its
last fsync may be there or not, page by page; what is not there is what was there before, or zeros, or the file is
shorter.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_RECORD = struct.Struct("iiqqqiii4x")
PAGE = 4096
EXCHANGE = 2
DATA = ("all", "none", "zeros", "some", "some more")  # what of unsynced bytes is there


@dataclass
class Node:
    """A file or folder, whatever its names. `changed`: the operations that changed what is durable with it."""

    folder: bool
    inode: int
    mode: int
    content: bytes = b""  # before the run
    changed: list[int] = field(default_factory=list)
    synced: list[int] = field(default_factory=list)
    writes: list[tuple[int, int, bytes]] = field(default_factory=list)  # operation, first byte, bytes
    sizes: list[tuple[int, str, int]] = field(default_factory=list)  # operation, "to" or "at least", bytes
    modes: list[tuple[int, int]] = field(default_factory=list)
    attributes: list[tuple[int, str, bytes]] = field(default_factory=list)


@dataclass(frozen=True)
class State:
    """What is on the disk: for each path its node, and the bytes and SHA-256 of the files."""

    names: dict[str, Node]
    files: dict[str, tuple[bytes, str]]
    first: int  # operations whose names are durable

    def tree(self, folder: str) -> dict[str, str] | None:
        """SHA-256 by relative path, as sources.tree has it; None where the folder is not there."""
        if folder not in self.names:
            return None
        found = {name: sha for name, (_, sha) in sorted(self.files.items()) if name.startswith(folder + "/")}
        return {name[len(folder) + 1 :]: sha for name, sha in found.items()}

    def key(self) -> str:
        digest = hashlib.sha256()
        for name, node in sorted(self.names.items()):
            marks = self._marks(node)
            _, sha = self.files.get(name, (b"", ""))
            digest.update(f"{name} {node.folder} {self._mode(node):o} {marks} {sha}\n".encode())
        return digest.hexdigest()

    def _marks(self, node: Node) -> list[bytes]:
        """What a run has noted in a folder; its access lists are no matter of power cuts."""
        return [value for at, name, value in node.attributes if at < self.first and name.startswith("user.")]

    def _mode(self, node: Node) -> int:
        return next((mode for at, mode in reversed(node.modes) if at < self.first), node.mode)

    def write(self, place: Path) -> None:
        """Makes it on the disk, in place of what is there."""
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        inodes = {}
        for name, node in sorted(self.names.items()):
            path = place / name
            if node.folder:
                path.mkdir()
            else:
                path.write_bytes(self.files[name][0])
            inodes[node.inode] = path.stat().st_ino
        self._again(place, inodes)
        for name, node in sorted(self.names.items(), reverse=True):
            (place / name).chmod(self._mode(node))

    def _again(self, place: Path, inodes: dict[int, int]) -> None:
        """What names inodes names those that the files have now."""
        note = "out.partial/journal/publishing"
        content, _ = self.files.get(note, (b"", ""))
        if len(content.split()) == 2:
            inode, owner = content.split()
            (place / note).write_text(f"{inodes.get(int(inode), 0)} {owner.decode()}")
        from weights_conversion.output import descriptors, finished

        for name, node in self.names.items():
            marks = self._marks(node)
            if marks and node.folder:
                with descriptors.folder(place / name) as folder:
                    finished.mark(folder, marks[-1].decode().split()[0])


class Record:
    """The operations of one run, and every state that a cut may leave."""

    def __init__(self, place: Path) -> None:
        """`place` as it is before the run."""
        self._place = place
        self.before = {path.relative_to(place).as_posix(): _node(path) for path in sorted(place.rglob("*"))}
        self.operations: list[tuple[str, Any]] = []
        self._top = Node(True, place.stat().st_ino, 0o755)
        self._nodes = {node.inode: node for node in (self._top, *self.before.values())}
        self._names = dict(self.before)
        self._made: dict[tuple[int, int, int, int, str], tuple[bytes, str]] = {}

    def read(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            op, flags, inode, offset, length, one, two, size = _RECORD.unpack_from(data, at)
            at += _RECORD.size
            first, second = data[at : at + one].decode(), data[at + one : at + one + two].decode()
            at += one + two + size
            self._add(chr(op), flags, inode, offset, length, first, second, data[at - size : at])

    def _inside(self, path: str) -> str | None:
        start = str(self._place) + "/"
        return path.removesuffix(" (deleted)")[len(start) :].replace("/./", "/") if path.startswith(start) else None

    def _add(
        self, op: str, flags: int, inode: int, offset: int, length: int, first: str, second: str, data: bytes
    ) -> None:  # fmt: skip
        name, number = self._inside(first), len(self.operations)
        if name is None and not (op == "S" and inode == self._top.inode):
            return
        name = name or ""
        node = self._nodes.get(inode)
        if op in "OD":
            if name in self._names:
                return
            node = self._nodes[inode] = Node(op == "D", inode, offset & ~0o022)
            self._name(number, (name,), node)
            self.operations.append(("put", (name, node)))
        elif op in "UX":
            self._name(number, (name,), self._names[name])
            self.operations.append(("remove", name))
        elif op == "R":
            other = self._inside(second) or ""
            self._name(number, (name, other), self._names[name], *filter(None, [self._names.get(other)]))
            self.operations.append(("exchange" if flags & EXCHANGE else "rename", (name, other)))
        elif node is None:
            return
        else:
            self._content(op, number, node, offset, length, second, data)
            return
        self._names = _applied(self._names, [self.operations[-1]])

    def _name(self, number: int, names: Sequence[str], *nodes: Node) -> None:
        for name in names:
            above = name.rpartition("/")[0]
            (self._names[above] if above else self._top).changed.append(number)
        for node in nodes:
            node.changed.append(number)

    def _content(
        self, op: str, number: int, node: Node, offset: int, length: int, attribute: str, data: bytes
    ) -> None:  # fmt: skip
        if op == "W":
            node.writes.append((number, offset, data))
        elif op == "S":
            node.synced.append(number)
        elif op in "TA":
            node.sizes.append((number, "to" if op == "T" else "at least", offset if op == "T" else offset + length))
        elif op == "M":
            node.modes.append((number, offset))
        elif op == "E":
            node.attributes.append((number, attribute, data))
        if op in "TAME":
            node.changed.append(number)
        self.operations.append((op, node))

    def _durable(self, cut: int) -> int:
        """How many operations' metadata are on the disk for certain, when `cut` have been done."""
        least = 0
        for node in self._nodes.values():
            synced = [at for at in node.synced if at < cut]
            if synced:
                least = max([least, *(at + 1 for at in node.changed if at < synced[-1])])
        return least

    def states(self, seed: int = 0) -> Iterator[tuple[str, State]]:
        """Every state by what of the names is there, and for each, what of unsynced bytes may be there."""
        named = [self.before]
        for operation in self.operations:
            named.append(_applied(named[-1], [operation]))
        for cut in range(len(named)):
            for first in range(self._durable(cut), cut + 1):
                for what in DATA:
                    where = f"{cut} operations ({first} durable, of unsynced bytes {what})"
                    yield where, self._state(named[first], cut, first, what, seed)

    def last(self) -> State:
        """After the whole run, without a cut."""
        count = len(self.operations)
        return self._state(_applied(self.before, self.operations), count, count, "all", 0)

    def _state(self, names: dict[str, Node], cut: int, first: int, what: str, seed: int) -> State:
        files = {name: self._file(node, cut, first, what, seed) for name, node in names.items() if not node.folder}
        return State(names, files, first)

    def _file(self, node: Node, cut: int, first: int, what: str, seed: int) -> tuple[bytes, str]:
        """A file's bytes and their SHA-256. Equal ones are made once: most files of two states are the same."""
        synced = max((at for at in node.synced if at < cut), default=-1)
        written = [at for at, _, _ in node.writes if at < cut]
        if not written or written[-1] < synced:
            what = "all"
        key = (id(node), len(written), sum(at < first for at, _, _ in node.sizes), synced, what)
        if key not in self._made:
            rng = random.Random(f"{seed} {node.inode} {key[1:]}")
            data = _bytes(node, cut, first, what, synced, rng)
            self._made[key] = data, hashlib.sha256(data).hexdigest()
        return self._made[key]


def _node(path: Path) -> Node:
    status = path.stat()
    content = b"" if path.is_dir() else path.read_bytes()
    return Node(path.is_dir(), status.st_ino, status.st_mode & 0o7777, content)


def _applied(names: dict[str, Node], operations: Sequence[tuple[str, Any]]) -> dict[str, Node]:
    names = dict(names)
    for kind, what in operations:
        if kind == "put":
            names[what[0]] = what[1]
        elif kind == "remove":
            del names[what]
        elif kind in ("rename", "exchange"):
            one, two = (_taken(names, name) for name in what)
            for inner, node in one.items():
                names[what[1] + inner] = node
            if kind == "exchange":
                for inner, node in two.items():
                    names[what[0] + inner] = node
    return names


def _taken(names: dict[str, Node], name: str) -> dict[str, Node]:
    """A name and all below it, by what follows it; taken out of `names`."""
    found = {path: node for path, node in names.items() if path == name or path.startswith(name + "/")}
    for path in found:
        del names[path]
    return {path[len(name) :]: node for path, node in found.items()}


def _bytes(node: Node, cut: int, first: int, what: str, synced: int, rng: random.Random) -> bytes:
    """The bytes of a file when `cut` operations were done, the last fsync was `synced`, and the metadata of `first` are
    there."""
    content = bytearray(node.content)
    changes = [(at, "write", offset, data) for at, offset, data in node.writes if at < cut]
    changes += [(at, how, size, b"") for at, how, size in node.sizes if at < first]
    some = {"some": 0.5, "some more": 0.8}.get(what)
    for at, how, offset, data in sorted(changes, key=lambda change: change[0]):
        if how == "to":
            del content[offset:]
            content.extend(bytes(offset - len(content)))
        elif how == "at least":
            content.extend(bytes(max(offset - len(content), 0)))
        elif at < synced or what == "all":
            _put(content, offset, data)
        elif what == "zeros":
            content.extend(bytes(max(offset + len(data) - len(content), 0)))
        elif some is not None:
            for start in range(0, len(data), PAGE):
                if rng.random() < some:
                    _put(content, offset + start, data[start : start + PAGE])
    return bytes(content)


def _put(content: bytearray, offset: int, data: bytes) -> None:
    content.extend(bytes(max(offset - len(content), 0)))
    content[offset : offset + len(data)] = data


def recorded(place: Path, run: Any) -> Record:
    """What `run(descriptor)` does in `place`, which notes it in the file that is open at the descriptor."""
    record, notes = Record(place), os.memfd_create("record")
    try:
        run(notes)
        size = os.fstat(notes).st_size
        record.read(os.pread(notes, size, 0))
    finally:
        os.close(notes)
    return record
