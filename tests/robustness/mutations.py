"""What `fuzz` does to a checkpoint: changes to headers, JSON, pickles, archives, trackers and rank folders."""

from __future__ import annotations

import json
import pickletools
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.robustness.sources import tm  # noqa: F401  (makes the tests' own modules importable)

import torch  # isort: skip
from megatron_files import SAFE  # isort: skip

Mutation = Callable[[random.Random, Path], None]

# --- JSON -------------------------------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**31, 2**63, 2**64, 10**30, 10**400,
    0.5, -0.0, 1e308, float("inf"), float("nan"), "", "x", "release", "../../../etc/passwd", "/etc/passwd", "a\0b",
    "\ud800", "x" * 5000, [], [1], [[]], {}, {"x": 1}, [None], "BF16", "F32", "I64",
    [2**62, 2**62], [0, 0], [-1, 5], "linear",
    {"rope_type": "linear", "factor": "x"}, {"rope_type": "yarn"}, {"rope_theta": [], "rope_type": "default"},
    "llama", "16",
)  # fmt: skip


def mutate_tree(rng: random.Random, tree: Any) -> Any:
    """Changes one place in a JSON value."""
    holders: list[Any] = []

    def walk(value: Any) -> None:
        if isinstance(value, (dict, list)) and value:
            holders.append(value)
            for part in value.values() if isinstance(value, dict) else value:
                walk(part)

    walk(tree)
    if not holders:
        return rng.choice(ODD)
    holder = rng.choice(holders)
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    key = rng.choice(keys)
    kind = rng.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(["", "x", "../x", str(key) + "2", "__metadata__", "\ud800"])] = holder[key]
    elif kind == 2:
        holder[key] = holder[rng.choice(keys)]
    elif kind == 3 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
        holder[key] += rng.choice([1, -1, 2, 8, 64, -64, 2**32, 2**63])
    else:
        holder[key] = rng.choice(ODD)
    return tree


def json_text(rng: random.Random, content: bytes) -> bytes:
    """A mutated JSON text: a changed value, or bytes that are no JSON."""
    kind = rng.randrange(8)
    if kind == 0:
        return bytes_of(rng, content)
    if kind == 1:
        return b"[" * rng.choice([10, 1000, 100_000]) + content
    if kind == 2:
        texts = [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"\xef\xbb\xbf" + content, b"9" * 10_000, b'{"a":' * 50_000]
        return rng.choice(texts)
    try:
        return json.dumps(mutate_tree(rng, json.loads(content))).encode()
    except (ValueError, RecursionError):
        return bytes_of(rng, content)


def mutate_json(rng: random.Random, path: Path) -> None:
    path.write_bytes(json_text(rng, path.read_bytes()))


def mutate_safetensors(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header, rest = data[8 : 8 + length], data[8 + length :]
    kind = rng.randrange(8)
    if kind == 0:
        lie = rng.choice([0, 1, length + 1, length - 1, 2**20, 2**40, 2**63, 2**64 - 1, len(data), len(data) - 8])
        path.write_bytes(struct.pack("<Q", lie) + header + rest)
        return
    if kind == 1:
        rest = rng.choice([rest[:-1], rest[: len(rest) // 2], rest + b"\0" * rng.choice([1, 4096]), b""])
    elif kind == 2:
        entries = json.loads(header)
        one, two = rng.sample([name for name in entries if name != "__metadata__"], 2)
        entries[one]["data_offsets"] = entries[two]["data_offsets"]
        header = json.dumps(entries).encode()
    elif kind == 3:
        header = header.replace(b'{"', b'{"lm_head.weight":{"dtype":"BF16","shape":[0],"data_offsets":[0,0]},"', 1)
    else:
        header = json_text(rng, header)
    path.write_bytes(struct.pack("<Q", len(header)) + header + rest)


# --- bytes and pickles ------------------------------------------------------------------------------------------------


def bytes_of(rng: random.Random, data: bytes) -> bytes:
    """Flips, cuts, repeats or inserts bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        if not changed:
            break
        at, kind = rng.randrange(len(changed)), rng.randrange(6)
        if kind <= 1:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            changed[at] = rng.randrange(256)
        elif kind == 3:
            del changed[at : at + rng.choice([1, 4, 100])]
        elif kind == 4:
            changed[at:at] = changed[at : at + rng.choice([1, 8, 64])]
        else:
            del changed[at:]
    return bytes(changed)


OPCODES = [ord(code.code) for code in pickletools.opcodes]


def bombs() -> dict[str, bytes]:
    """Pickles that ask for more than they are: each is complete in itself, and none holds weights."""
    nested = b"]" + b"".join(b"q%c]h%ca" % (i % 256, i % 256) for i in range(40)) + b"."
    tuples = b"N" + b"2\x86" * 60
    dag = b"}" + b"".join(b"q%c}(U\x01ah%cU\x01bh%cu" % (i, i, i) for i in range(60))
    return {
        "memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "memo text": b"Np99999999999999\n.",
        "bytes8": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
        "unicode8": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"x.",
        "bytearray8": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",
        "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
        "long4": b"\x80\x02\x8b\xff\xff\xff\x7fx.",
        "long": b"L" + b"9" * 100_000 + b"L\n.",
        "deep list": b"]" * 100_000 + b"a" * 99_999 + b".",
        "deep tuple": b"N" + b"\x85" * 200_000 + b".",
        "shared lists": nested,
        "shared tuples": tuples + b".",
        "shared tuples as a key": b"}" + tuples + b"Ns.",
        "shared tuples in a set": b"\x80\x04\x8f(" + tuples + b"\x90.",
        "shared tuples in a frozenset": b"\x80\x04(" + tuples + b"\x91.",
        "shared dicts": b"}(U\x05model" + dag + b"u.",
        "shared dicts at the top": dag + b".",
        "itself": b"}q\x00(U\x01ah\x00U\x01bh\x00u.",
        "model itself": b"}q\x00(U\x05modelh\x00U\x01bh\x00u.",
        "extension": b"\x80\x02\x82\x01.",
        "extension 4": b"\x80\x02\x84\xff\xff\xff\x7f.",
        "persistent text": b"Pid\n.",
        "instance": b"(ios\nsystem\n.",
        "object": b"(cbuiltins\neval\nU\x041+1o.",
        "ordered of tuples": b"ccollections\nOrderedDict\n(]" + b"(" + tuples + b"Nta\x85R.",
        "many marks": b"(" * 1_000_000 + b".",
        "no end": b"\x80\x02}",
        "nothing": b".",
        "list": b"].",
        "args": b"}(U\x05model}U\x04args]u.",
        "args of dags": b"}(U\x05model}U\x04argscargparse\nNamespace\n)R}(U\x0ahidden_size" + tuples + b"ubu.",
        "iteration of dags": b"}(U\x05model}U\x09iteration"
        + tuples
        + b"U\x12checkpoint_version"
        + tuples
        + b"U\x04argscargparse\nNamespace\n)R}bu.",
    }


# Built by hand and never unpickled here: each would create a file where it to run.
def crafted(target: Path) -> dict[str, bytes]:
    """Pickles that would create the file `target` were anything executed, by the name that must be refused."""
    text, sq = str(target).encode(), b"(S'%s'\n" % str(target).encode()
    command = b"(S'touch %s'\n" % text
    short = bytes([len(text)]) + text
    return {
        "posix.system": b"cposix\nsystem\n" + command + b"tR.",
        "os.system": b"cos\nsystem\n" + command + b"tR.",
        "subprocess.Popen": b"csubprocess\nPopen\n(](S'touch'\nS'%s'\nelp0\n0g0\ntR." % text,
        "builtins.eval": b"cbuiltins\neval\n(S'open(%r, \"w\")'\ntR." % str(target).encode(),
        "builtins.open": b"cbuiltins\nopen\n" + sq + b"S'w'\ntR.",
        "builtins.getattr": b"cbuiltins\ngetattr\n(cbuiltins\nopen\nS'__call__'\ntR" + sq + b"S'w'\ntR.",
        "pathlib.Path": b"\x80\x04\x8c\x07pathlib\x8c\x04Path\x93\x8c" + short + b"\x85R.",
        "torch.hub.load": b"ctorch.hub\nload\n(S'.'\nS'x'\ntR.",
        "torch.load": b"ctorch\nload\n" + sq + b"tR.",
        "numpy.save": b"cnumpy\nsave\n" + sq + b"I1\ntR.",
        "_io.FileIO": b"\x80\x04c_io\nFileIO\n" + sq + b"S'w'\nt\x81.",
        "INST": b"(S'touch %s'\nios\nsystem\n." % text,
        "os.system through OBJ": b"(cos\nsystem\nS'touch %s'\no." % text,
        "EXT1": b"\x80\x02\x82\x01.",
        "torch._utils.__builtins__": b"ctorch._utils\n__builtins__\n.",
        "collections.OrderedDict.__init__": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
    }


def pickled(rng: random.Random, data: bytes) -> bytes:
    """A mutated pickle: bytes, opcodes, or another pickle altogether."""
    kind = rng.randrange(10)
    if kind < 3:
        return bytes_of(rng, data)
    if kind == 3:
        return rng.choice(list(bombs().values()))
    if kind == 4:
        return rng.choice(list(crafted(Path("/nonexistent/touched")).values()))
    if kind == 5:
        bomb = rng.choice(list(bombs().values()))[:-1].removeprefix(b"\x80\x02").removeprefix(b"\x80\x04")
        return data[:2] + bomb + b"0" + data[2:]
    operations = list(pickletools.genops(data))
    ends = [position for _, _, position in operations[1:]] + [len(data)]
    pieces = [data[start or 0 : end] for (_, _, start), end in zip(operations, ends, strict=True)]
    for _ in range(rng.choice([1, 1, 2, 4])):
        at, how = rng.randrange(len(pieces)), rng.randrange(6)
        if how == 0:
            del pieces[at]
        elif how == 1:
            pieces.insert(at, pieces[rng.randrange(len(pieces))])
        elif how == 2:
            pieces[at] = pieces[rng.randrange(len(pieces))]
        elif how == 3:
            pieces.insert(at, bytes([rng.choice(OPCODES)]))
        elif how == 4:
            wide = b"\x8a\x09" + b"\xff" * 8 + b"\x00"
            pieces.insert(at, rng.choice([b"K\x00", b"K\x07", b"M\xff\xff", b"J\xff\xff\xff\xff", wide, b"N", b"}"]))
        else:
            nan = b"G" + struct.pack(">d", float("nan"))
            pieces[at] = rng.choice([b"K\x00", b"J\xff\xff\xff\x7f", b"K\x01", nan, b"U\x01x"])
    return b"".join(pieces)


# --- archives ---------------------------------------------------------------------------------------------------------


def rezip(
    path: Path, change: Callable[[str, bytes], bytes | None], compressed: bool = False, extra: Any = None
) -> None:
    """Writes an archive again, with right CRCs and sizes, its records passed through `change` (None: left out)."""
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in records:
            new = change(name, content)
            if new is not None:
                archive.writestr(name, new)
        for name, content in extra or ():
            archive.writestr(name, content)


def mutate_archive(rng: random.Random, path: Path) -> None:
    import warnings

    warnings.simplefilter("ignore")
    kind = rng.randrange(14)
    with zipfile.ZipFile(path) as archive:
        start, names = archive.start_dir, archive.namelist()
        headers = [info.header_offset for info in archive.infolist()]
    if kind < 6:
        rezip(path, lambda name, content: pickled(rng, content) if name.endswith("data.pkl") else content)
    elif kind == 6:
        gone = rng.choice(names)
        rezip(path, lambda name, content: None if name == gone else content)
    elif kind == 7:
        rezip(path, lambda name, content: content, compressed=True)
    elif kind == 8:
        inside = names[0].split("/")[0] + "/data/../../x"
        name = rng.choice(["../../etc/x", "/etc/x", names[0], inside, "x/data.pkl", "a\0b"])
        rezip(path, lambda _, content: content, extra=[(name, rng.choice([b"", b"x", bytes(1000)]))])
    elif kind == 9:
        short = rng.choice(names)
        rezip(path, lambda name, content: content[: len(content) // 2] if name == short else content)
    else:
        data = bytearray(path.read_bytes())
        if kind == 10:
            data = bytearray(bytes_of(rng, bytes(data[:]))) if rng.random() < 0.5 else data[: rng.randrange(len(data))]
            path.write_bytes(data)
            return
        # A local header, or the directory and the end behind it.
        at = rng.choice(headers) + rng.randrange(30) if kind == 11 else rng.randrange(start, len(data))
        wide = rng.choice([1, 2, 4, 8])
        data[at : at + wide] = rng.choice([b"\xff" * wide, b"\0" * wide, rng.randbytes(wide), b"\x7f" * wide])
        path.write_bytes(data)


# --- kinds of input ---------------------------------------------------------------------------------------------------


def mutate_tracker(rng: random.Random, path: Path) -> None:
    path.write_bytes(
        rng.choice(
            [b"", b"0", b"-1", b"release", b"release\n", b"7", b" 7 \n", b"../hf", b"/etc", b"iter_0000007",
             b"\xff\xfe", b"7\0", "\u0667".encode(), b"9" * 12, b"9" * 10_000, b"1e3", b"7\n7", b"release/../..",
             bytes(1 << 20)]
        )
    )  # fmt: skip


def mutate_ranks(rng: random.Random, folder: Path) -> None:
    """Folders of ranks that are gone, doubled, swapped, or named for ranks that cannot be."""
    ranks = sorted(folder.glob("mp_rank_*"))
    one, two = rng.choice(ranks), rng.choice(ranks)
    kind = rng.randrange(6)
    if kind == 0:
        shutil.rmtree(one)
    elif kind == 1:
        names = ("mp_rank_99", "mp_rank_999999_999999", "mp_rank_00", "mp_rank_9" + "9" * 30, "mp_rank_02_001")
        name = rng.choice([*names, "mp_rank_\u0660\u0660"])
        if not (folder / name).exists():
            shutil.copytree(one, folder / name)
    elif kind == 2:
        name = rng.choice(["mp_rank_99", "mp_rank_999999_999999", "mp_rank_0", "release"])
        if not (folder / name).exists():
            one.rename(folder / name)
    elif kind == 3 and one != two:
        file = "model_optim_rng.pt"
        (one / file).rename(one / "x")
        (two / file).rename(one / file)
        (one / "x").rename(two / file)
    elif kind == 4:
        (one / "model_rng.pt").write_bytes(rng.choice([b"", (one / "model_optim_rng.pt").read_bytes()]))
    else:
        (one / "model_optim_rng.pt").write_bytes(rng.choice([b"", b"PK\x05\x06" + bytes(18), b"PK", b"\x80\x02}."]))


def edit_args(rng: random.Random, path: Path) -> None:
    """One of the args of a rank file gets another value."""
    with torch.serialization.safe_globals(SAFE):
        content = torch.load(path, weights_only=True)
    args = vars(content["args"])
    odd = rng.choice([value for value in ODD if value is not None] + [None, 100_000, 99_999_999, 10**9, 4, 8])
    further = ("virtual_pipeline_model_parallel_size", "standalone_embedding_stage", "padded_vocab_size")
    args[rng.choice([*args, *further])] = odd
    torch.save(content, path)


def mutate_metadata(rng: random.Random, path: Path) -> None:
    """`.metadata`: a pickle of which tensors there are, and which bytes of which file hold their parts."""
    path.write_bytes(pickled(rng, path.read_bytes()))


def mutate_items(rng: random.Random, path: Path) -> None:
    """`.distcp`: small archives one behind the other. Most of a file is weights, so the archives' ends are sought."""
    data = path.read_bytes()
    if rng.random() < 0.3:
        path.write_bytes(bytes_of(rng, data))
        return
    changed = bytearray(data)
    mark = rng.choice([b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"\x80\x02ctorch"])
    at, places = data.find(mark), []
    while at >= 0:
        places.append(at)
        at = data.find(mark, at + 1)
    at = rng.choice(places or [0]) + rng.randrange(60)
    wide = rng.choice([1, 2, 4, 8])
    changed[at : at + wide] = rng.choice([b"\xff" * wide, b"\0" * wide, rng.randbytes(wide), b"\x7f" * wide])
    path.write_bytes(changed)


BINARY: dict[str, Mutation] = {
    ".metadata": mutate_metadata,
    ".distcp": mutate_items,
    ".safetensors": mutate_safetensors,
    ".pt": mutate_archive,
    ".pth": mutate_archive,
    ".bin": mutate_archive,
}
