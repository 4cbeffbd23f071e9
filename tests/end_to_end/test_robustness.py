"""Nothing lost, nothing let in: samples of the long runs in tests/robustness, and what they found, one by one.

The full counts: `python -m tests.robustness.kill_runs`, `... .full_disk` and `... .fuzz`, from the repository's root.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
import torch
from conftest import Script

from tests.robustness import full_disk, fuzz, kill_runs, mutations, sources
from weights_conversion.engine import identity
from weights_conversion.errors import ConversionError
from weights_conversion.formats import huggingface, iterations, pickles, stored_args, torch_files
from weights_conversion.layouts.placement import TensorRef, Written
from weights_conversion.output import beginning, file_sums, finishing, partial, place, publish
from weights_conversion.output import journal as journals

GQA = tm.MODELS["llama2-gqa"]


# --- samples of the long runs -----------------------------------------------------------------------------------------


def test_kills(capsys: pytest.CaptureFixture[str]) -> None:
    assert kill_runs.main(["--runs", "8", "--small", "--seed", "7"]) == 0
    assert "equal to undisturbed runs" in capsys.readouterr().out


def test_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    assert full_disk.main(["--points", "3", "--no-mount"]) == 0
    assert "every rerun ended right" in capsys.readouterr().out


def test_mutated_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    code = fuzz.main(["--inputs", "60", "--seed", "11"])
    assert code == 0, capsys.readouterr().out


# --- pickles ----------------------------------------------------------------------------------------------------------


def with_pickle(path: Path, data: bytes) -> None:
    """Puts `data` in the place of a file's pickle: inside its archive, or as all of it (.metadata)."""
    if zipfile.is_zipfile(path):
        mutations.rezip(path, lambda name, content: data if name.endswith("data.pkl") else content)
    else:
        path.write_bytes(data)


def hf_bin(folder: Path, _: Callable[..., Path]) -> tuple[Path, list[Any]]:
    source = tm.write_huggingface(folder / "hf", GQA, kind="bin", tokenizer=False)
    return source / "pytorch_model.bin", ["hf_to_megatron", "llama2", "--model-path", source, "--out"]


def meta_pth(folder: Path, _: Callable[..., Path]) -> tuple[Path, list[Any]]:
    tm.write_meta(folder / "meta", GQA, 1)
    line = ["hf_to_megatron", "llama2", "--cache-dir", folder / "meta", "--out"]
    return folder / "meta" / "consolidated.00.pth", line


def exported(file: str, *options: str) -> Callable[[Path, Callable[..., Path]], tuple[Path, list[Any]]]:
    """A file of a Megatron checkpoint that the import wrote with `options`."""

    def make(folder: Path, imported: Callable[..., Path]) -> tuple[Path, list[Any]]:
        root = shutil.copytree(imported("llama2-gqa", *options), folder / "mt")
        return root / file, ["megatron_to_hf", "--no_tokenizer", "--input_dir", root, "--output_dir"]

    return make


# Every file that other loaders unpickle.
LOADERS = {
    ".bin": hf_bin,
    ".pth": meta_pth,
    ".pt": exported("release/mp_rank_00/model_optim_rng.pt"),
    ".metadata": exported("release/.metadata", "--target", "megatron-core"),
    "common.pt": exported("release/common.pt", "--target", "megatron-core"),
}


@pytest.fixture(scope="module", params=list(LOADERS))
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, imported: Callable[..., Path]
) -> tuple[Path, list[Any]]:
    return LOADERS[request.param](tmp_path_factory.mktemp("loader"), imported)


def run_script(to_megatron: Script, to_hf: Script, line: list[Any], out: Path) -> Any:
    return {"hf_to_megatron": to_megatron, "megatron_to_hf": to_hf}[line[0]](*line[1:], out)


def test_crafted_pickles(loaded, to_megatron, to_hf, tmp_path: Path) -> None:
    """What would touch a file, were anything executed, is refused by name, and the file stays untouched."""
    path, line = loaded
    touched = tmp_path / "touched"
    for name, data in mutations.crafted(touched).items():
        with_pickle(path, data)
        run_script(to_megatron, to_hf, line, tmp_path / "out").refused(name.split()[0], path.name)
        assert not touched.exists(), f"{name} was executed"
        assert not (tmp_path / "out").exists()


def test_crafted_pickles_do_what_they_say(tmp_path: Path) -> None:
    """Were they harmless, the test above would show nothing. Each kind of call is made here, by pickle itself."""
    for name in ("posix.system", "builtins.eval", "builtins.open", "INST", "os.system through OBJ"):
        touched = tmp_path / name.split()[-1]  # the command is a shell line: no spaces
        subprocess.run(
            [sys.executable, "-c", "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"],
            input=mutations.crafted(touched)[name], check=True, capture_output=True,
        )  # fmt: skip
        assert touched.exists(), name + subprocess.run(["ls", tmp_path], capture_output=True, text=True).stdout


@pytest.mark.parametrize("name", list(mutations.bombs()))
def test_pickle_bombs(name: str, tmp_path: Path) -> None:
    """Sizes that lie, deep nesting, and parts shared so often that to walk, hash or print them takes forever."""
    path = tmp_path / "model_optim_rng.pt"
    torch.save({}, path)
    with_pickle(path, mutations.bombs()[name])
    began, said = time.process_time(), str(path)
    try:
        opened = torch_files.read_torch_file(path)
        found = torch_files.tensors(opened, opened.content)
        stored_args.plain_args(opened.content.get("args"), path)
        assert found == {}
    except ConversionError as error:
        said = str(error)
    assert str(path) in said
    assert time.process_time() - began < 15, "not bounded by the file's size"


def test_what_training_pickles_is_read() -> None:
    """Protocols 0 to 5 and the shapes of what checkpoints hold come out as pickle itself would give them."""
    import pickle

    value = {
        "text": "grüße", "bytes": b"\0\xff", "numbers": [0, -1, 255, 65536, 2**31, -(2**70), 1.5, float("inf")],
        "flags": (True, False, None), "nested": {"a": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)], 7: {"b": []}},
        "sets": [{1, 2}, frozenset({"x"})],
    }  # fmt: skip
    shared = ["shared"]
    for protocol in range(6):
        plain = {key: part for key, part in value.items() if protocol >= 4 or key not in ("sets", "bytes")}
        back = pickles.load(pickle.dumps({**plain, "one": shared, "two": shared}, protocol), "x")
        assert {key: back[key] for key in plain} == plain
        assert back["one"] is back["two"]


# --- archives ---------------------------------------------------------------------------------------------------------


def archive(path: Path) -> Path:
    torch.save({"a": torch.arange(8), "b": torch.ones(3, 3)}, path)
    return path


def test_archives_are_read(tmp_path: Path) -> None:
    opened = torch_files.read_torch_file(archive(tmp_path / "x.pt"))
    assert {name: ref.shape for name, ref in torch_files.tensors(opened, opened.content).items()} == {
        "a": (8,), "b": (3, 3)
    }  # fmt: skip


@pytest.mark.parametrize("name", ["../../escaped", "/escaped", "x/data/../../escaped", "elsewhere/data/0"])
def test_archive_names_outside(name: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pt")
    mutations.rezip(path, lambda _, content: content, extra=[(name, b"x")])
    with pytest.raises(ConversionError, match="not in its folder"):
        torch_files.read_torch_file(path)


def directory(path: Path) -> int:
    with zipfile.ZipFile(path) as opened:
        return opened.start_dir


def patched(path: Path, at: int, value: bytes) -> Path:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(value)
    return path


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (10, struct.pack("<H", 8)),  # compressed
        (8, struct.pack("<H", 1)),  # encrypted
        (20, struct.pack("<II", 1 << 30, 1 << 30)),  # sizes beyond the file
        (20, struct.pack("<II", 0xFFFFFFFF, 0xFFFFFFFF)),  # sizes in a field that is not there
        (42, struct.pack("<I", 0x7FFFFFFF)),  # a header beyond the file
        (42, struct.pack("<I", 0xFFFFFFFF)),
        (34, struct.pack("<H", 1)),  # in another part of the archive
        (38, b"\x10"),  # a folder, which torch reads as nothing
        (28, struct.pack("<H", 0xFFFF)),  # a name beyond the directory
        (16, struct.pack("<I", 0xDEADBEEF)),  # the CRC of the pickle
    ],
)
def test_directories_that_lie(field: int, value: bytes, tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pt")
    patched(path, directory(path) + field, value)
    with pytest.raises(ConversionError, match=r"x\.pt is"):
        torch_files.read_torch_file(path)


@pytest.mark.parametrize(
    ("record", "field", "word"),
    [
        (b"PK\x05\x06", 4, "disagree"),  # which part this is, in the narrow directory
        (b"PK\x05\x06", 10, "disagree"),  # how many records there are
        (b"PK\x05\x06", 16, "disagree"),  # where they begin
        (b"PK\x06\x06", 16, "disagree"),
        (b"PK\x06\x07", 4, "several files"),
        (b"PK\x06\x07", 8, "64-bit"),  # where the wide directory is
    ],
)
def test_directories_that_disagree(record: bytes, field: int, word: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pt")
    patched(path, path.read_bytes().rindex(record) + field, struct.pack("<H", 0x0107))
    with pytest.raises(ConversionError, match=word):
        torch_files.read_torch_file(path)


def test_records_that_overlap(tmp_path: Path) -> None:
    """Two records in the same bytes: which tensor is it?"""
    path = archive(tmp_path / "x.pt")
    with zipfile.ZipFile(path) as opened:
        infos = {info.filename.partition("/")[2]: info for info in opened.infolist()}
        entries = path.read_bytes()[opened.start_dir :]
    at = entries.index(b"x/data/1") - 46
    patched(path, directory(path) + at + 42, struct.pack("<I", infos["data/0"].header_offset))
    with pytest.raises(ConversionError, match="reaches into others"):
        torch_files.read_torch_file(path)


def test_folders_of_an_archive_are_passed_over(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pt")
    folders = [("x/", b""), ("x/data/", b"")]
    mutations.rezip(path, lambda _, content: content, extra=folders)
    opened = torch_files.read_torch_file(path)
    assert set(torch_files.tensors(opened, opened.content)) == set(torch.load(path, weights_only=True)) == {"a", "b"}


def test_records_named_twice(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pt")
    with pytest.warns(UserWarning, match="Duplicate"):
        mutations.rezip(path, lambda _, content: content, extra=[("x/data/0", bytes(64))])
    with pytest.raises(ConversionError, match="twice"):
        torch_files.read_torch_file(path)


# --- headers, indexes, trackers, ranks ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":[],"shape":[4],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":[true,4],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16,32]}}',
        b"[" * 100_000,
    ],
)
def test_safetensors_headers(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(ConversionError, match="not a complete safetensors file"):
        huggingface.read_safetensors(path)


@pytest.mark.parametrize("length", [1 << 40, (1 << 64) - 1, 99_000_000])
def test_header_lengths_that_lie(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ConversionError, match="claims"):
        huggingface.read_safetensors(path)


@pytest.mark.parametrize("name", ["../escaped.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "a\\b", "a\0b"])
def test_index_entries_outside(name: str, tmp_path: Path, to_megatron: Script) -> None:
    source = tm.write_huggingface(tmp_path / "hf", GQA, parts=2, tokenizer=False)
    index = source / "model.safetensors.index.json"
    shutil.copy(source / "model-00001-of-00002.safetensors", tmp_path / "escaped.safetensors")
    content = tm.read_json(index)
    first = next(iter(content["weight_map"]))
    content["weight_map"][first] = name
    tm.write_json(index, content)
    to_megatron("llama2", "--model-path", source, "--out", tmp_path / "out").refused(index.name)


@pytest.mark.parametrize(
    "text", [b"../mt2", b"/tmp", b"release/..", b"iter_0000007", "\u0667".encode(), b"9" * 5000, b"7\0", b"", b"\xff"]
)
def test_trackers(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "release").mkdir()
    (tmp_path / iterations.TRACKER).write_bytes(text)
    with pytest.raises(ConversionError, match="latest_checkpointed_iteration"):
        iterations.find_iteration(tmp_path, None)


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ({"tensor_model_parallel_size": 100_000, "pipeline_model_parallel_size": 100_000}, "are missing"),
        ({"virtual_pipeline_model_parallel_size": 99_999}, "model0"),
        ({"num_layers": 10**8, "encoder_num_layers": 10**8}, "layers"),
        ({"num_attention_heads": 0}, "positive"),
        ({"hidden_size": "64"}, "positive"),
        ({"rope_theta": float("nan")}, "positive"),
        ({"layernorm_epsilon": []}, "positive"),
        ({"vocab_file": 7}, "text"),
    ],
)
def test_args_that_cannot_be(args: dict[str, Any], word: str, imported, tmp_path: Path, to_hf: Script) -> None:
    root = shutil.copytree(imported("llama2-gqa"), tmp_path / "mt")
    (root / "conversion_manifest.json").unlink()
    path = root / "release" / "mp_rank_00" / "model_optim_rng.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, weights_only=True)
    vars(content["args"]).update(args)
    torch.save(content, path)
    to_hf("--input_dir", root, "--output_dir", tmp_path / "out", "--no_tokenizer").refused(word)


def test_names_cannot_steer_a_terminal(tmp_path: Path, to_megatron: Script) -> None:
    tensors = {**GQA.tensors(), "\x1b[2Jcleared\u202e": torch.zeros(4)}
    source = tm.write_huggingface(tmp_path / "hf", GQA, tensors=tensors, tokenizer=False)
    result = to_megatron("llama2", "--model-path", source, "--out", tmp_path / "out").refused("cleared")
    assert "\x1b" not in result.text
    assert "\u202e" not in result.text


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> list[sources.Command]:
    return sources.commands(tmp_path_factory.mktemp("commands"), sources.SMALL)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(number: signal.Signals, code: int, commands: list[sources.Command], tmp_path: Path) -> None:
    """At any moment, planning included: exit in seconds, a sentence on how to continue, and then it does."""
    log, rng, ends = tmp_path / "log", random.Random(int(number)), []
    for turn in range(8):
        command, out = commands[turn % len(commands)], tmp_path / f"out{turn}"
        child = kill_runs.start(command.line(out), log)
        while not log.exists():
            time.sleep(0.001)
        time.sleep(0.02 + rng.uniform(0, 0.25))
        os.kill(child, number)
        began = time.monotonic()
        ends.append(kill_runs.finish(child))
        assert time.monotonic() - began < 10
        said = log.read_text()
        log.unlink()
        assert "Traceback" not in said, said
        if ends[-1]:
            assert ends[-1] == code, said
            assert "the same command continues" in said
            assert not out.exists()
        assert kill_runs.finish(kill_runs.start(command.line(out, "--overwrite"), log)) == 0
        log.unlink()
        assert not out.with_name(out.name + ".partial").exists()
    assert code in ends, "no signal came in time"


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["source", "option", "config", "release", "nothing"])
def test_what_starts_over(change: str, to_megatron: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted run is continued by the same command only; any other says that it starts over, and ends right."""
    source, out = tm.write_huggingface(tmp_path / "hf", GQA, tokenizer=False), tmp_path / "out"
    line = ["llama2", "--model-path", source, "--out", out]

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finishing, "finish", interrupted)
        assert to_megatron(*line).code == 130
    if change == "source":
        tm.write_weights(source, {name: tensor + 1 for name, tensor in GQA.tensors().items()})
    elif change == "option":
        line += ["--dtype", "float32"]
    elif change == "config":  # of the same shapes
        tm.write_json(source / "config.json", GQA.config() | {"rms_norm_eps": 1e-6})
    elif change == "release":
        monkeypatch.setattr(identity, "__version__", "another")
    result = to_megatron(*line).succeeded()
    assert ("starting over" in result.text) == (change != "nothing")
    assert ("continued an interrupted run" in result.text) == (change == "nothing")
    other = to_megatron(*line[:4], tmp_path / "undisturbed", *line[5:]).succeeded()
    assert "continued" not in other.text
    assert tree_of(out) == tree_of(tmp_path / "undisturbed")


REF = TensorRef("x.pt", "a", torch.float32, (4, 4))


def test_journal_survives_a_line_cut_off(tmp_path: Path) -> None:
    journal = journals.Journal(tmp_path, [REF])
    journal.add(0, [Written(REF, 0, 64, 1)])
    journal.note(journal.take())
    path = tmp_path / "chunks.0"
    path.write_text(path.read_text() + "[1, [[0, 0, 6")
    later = journals.Journal(tmp_path, [REF])
    assert sorted(later.load()) == [0]
    later.add(2, [Written(REF, 0, 64, 1)])
    later.note(later.take())
    assert sorted(later.load()) == [0, 2]


# --- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite_interrupted_in_its_clean_up(
    exchange: bool, imported, sources, to_megatron: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """OUT is complete; what was replaced is never taken for a finished output, even when OUT goes away again."""
    out, good = tmp_path / "out", imported("llama2-gqa")
    line = ("llama2", "--model-path", sources("llama2-gqa"), "--out", out)
    shutil.copytree(imported("llama2"), out)
    if not exchange:
        monkeypatch.setattr(publish, "exchange", lambda *_: False)
    with monkeypatch.context() as patch:
        patch.setattr(partial.Partial, "remove", lambda self: None)
        to_megatron(*line, "--overwrite").succeeded()
    expected = tree_of(good)
    assert tree_of(out) == expected
    assert out.with_name("out.partial").exists()
    to_megatron(*line).succeeded()  # the same command again: nothing is left to do but to clear away
    assert tree_of(out) == expected
    assert not out.with_name("out.partial").exists()


def test_a_finished_output_does_not_answer_another_command(
    sources, to_megatron: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its clean-up was left, but sums were not asked for then: to exit 0 without them would be untrue."""
    line = ("llama2", "--model-path", sources("llama2-gqa"), "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(partial.Partial, "remove", lambda self: None)
        to_megatron(*line).succeeded()
    to_megatron(*line, "--checksums").refused("exists and is complete", "--overwrite")
    to_megatron(*line, "--checksums", "--overwrite").succeeded()
    assert (tmp_path / "out" / "checksums.sha256").is_file()


def test_an_output_that_appeared_while_waiting(imported, tmp_path: Path) -> None:
    """Another job held the lock and has finished OUT: nothing is converted a second time."""
    out = tmp_path / "out"
    shutil.copytree(imported("llama2"), out)
    with pytest.raises(ConversionError, match="another run has just finished"):
        beginning.prepare(out, "a plan")
    assert not out.with_name("out.partial").exists()
    beginning.prepare(out, "a plan", overwrite=True).close()


STUCK_MAIN = """
import ctypes, os, signal, sys, threading
sys.path.insert(0, {root!r})
from weights_conversion import cli
from weights_conversion.launch import signals
signals.STUCK_SECONDS = 1.0
def work():
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
sys.exit(cli.run(work))
"""


def test_a_stuck_main_thread_is_ended() -> None:
    """A call that never comes back, as into a filesystem whose server is gone, keeps Python's own handler waiting."""
    done = subprocess.run(
        [sys.executable, "-c", STUCK_MAIN.format(root=str(sources.TESTS.parent))],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 143, done.stderr
    assert "terminated" in done.stderr


SIGNALLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from weights_conversion import cli
def main():
    if {before}:
        os.kill(os.getpid(), signal.{name})
    code = cli.run(lambda: "the report")
    os.kill(os.getpid(), signal.{name})
    return code
cli.script(main)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("before", [True, False])
def test_signals_outside_of_the_work(before: bool, name: str) -> None:
    """Before it they end the process, with the same sentence; after it the exit code tells of the work alone."""
    line = [sys.executable, "-c", SIGNALLED.format(root=str(sources.TESTS.parent), before=before, name=name)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    if before:
        assert done.returncode == (130 if name == "SIGINT" else 143)
        assert "the same command continues" in done.stderr
    else:
        assert (done.returncode, done.stdout, done.stderr) == (0, "the report\n", "")


def test_a_report_that_nobody_can_read() -> None:
    """The work is done, whether its report finds room or not."""
    line = [sys.executable, "-c", SIGNALLED.format(root=str(sources.TESTS.parent), before=False, name="SIGTERM")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_replaced_output_is_not_published(imported, sources, to_megatron: Script, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    line = ("llama2", "--model-path", sources("llama2-gqa"), "--out", out)
    shutil.copytree(imported("llama2"), out)
    with monkeypatch.context() as patch:
        patch.setattr(partial.Partial, "remove", lambda self: None)
        to_megatron(*line, "--overwrite").succeeded()
    shutil.rmtree(out)
    to_megatron(*line).succeeded()
    assert tree_of(out) == tree_of(imported("llama2-gqa"))


def test_old_output_after_a_kill_between_two_renames(imported, sources, to_megatron: Script, tmp_path: Path) -> None:
    """Where folders cannot be exchanged: it stays until the new one is there, and only --overwrite goes on."""
    out, old = tmp_path / "out", imported("llama2")
    replaced = out.with_name("out.partial") / "replaced"
    shutil.copytree(old, replaced)
    line = ("llama2", "--model-path", sources("llama2-gqa"), "--out", out)
    to_megatron(*line).refused(str(replaced), "--overwrite", "mv")
    to_megatron(*line, "--overwrite", "--dry-run").succeeded()
    assert tree_of(replaced) == tree_of(old)
    to_megatron(*line, "--overwrite").succeeded()
    assert tree_of(out) == tree_of(imported("llama2-gqa"))
    assert not out.with_name("out.partial").exists()


def tree_of(folder: Path) -> dict[str, str]:
    return sources.tree(folder)


def test_two_runs_at_once(sources, to_megatron: Script, tmp_path: Path) -> None:
    """The second is refused and touches nothing of the first, whatever it was asked to write."""
    out = tmp_path / "out"
    hold = beginning.prepare(out, "another plan")
    assert not hold.resume
    marker = out.with_name("out.partial") / "checkpoint" / "config.json"
    marker.write_text("x")
    line = ("llama2", "--model-path", sources("llama2-gqa"), "--out", out)
    to_megatron(*line).refused("another process")
    to_megatron(*line, "--overwrite").refused("another process")
    assert marker.exists()
    hold.close()
    to_megatron(*line).succeeded()


def test_strange_places(sources, to_megatron: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ("llama2", "--model-path", sources("llama2-gqa"), "--out")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "thesis.txt").write_text("x")
    for name in (".", "..", "file", "link", "mine", "file/inner"):
        to_megatron(*line, name, "--overwrite").refused()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "mine.partial", "real"]
    assert (tmp_path / "mine.partial" / "thesis.txt").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_place(sources, to_megatron: Script, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir(mode=0o555)
    out = tmp_path / "place" / "out"
    to_megatron("llama2", "--model-path", sources("llama2-gqa"), "--out", out).refused("writable")


def test_mount_points_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(ConversionError, match="mount point"):
        place.check(tmp_path / "out", overwrite=False)


# --- checksums --------------------------------------------------------------------------------------------------------


def test_manifest(tmp_path: Path) -> None:
    """As sha256sum writes it, and checks it."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "big").write_bytes(os.urandom(20 << 20))
    (tmp_path / "small").write_bytes(b"")
    text = file_sums.sums(tmp_path, ["small", "a/big"], {"tracker": b"release"}, 2)[file_sums.NAME]
    assert text.decode().splitlines() == [
        f"{hashlib.sha256((tmp_path / 'a' / 'big').read_bytes()).hexdigest()}  a/big",
        f"{hashlib.sha256(b'').hexdigest()}  small",
        f"{hashlib.sha256(b'release').hexdigest()}  tracker",
    ]
    (tmp_path / "tracker").write_bytes(b"release")
    (tmp_path / file_sums.NAME).write_bytes(text)
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", file_sums.NAME], cwd=tmp_path, check=True)
