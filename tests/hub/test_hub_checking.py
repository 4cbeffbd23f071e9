"""Downloads and the cache against what the hub states: the real client, each time in a process of its own."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from hub_standin import HubStandIn, Repository, small
from test_hub import OFFLINE, PUBLIC_FILES, ROOT, Client, check_contents, client, standin

from weights_conversion.hub.checking import NOTES
from weights_conversion.hub.errors import masked

__all__ = ["client", "standin"]  # fixtures
SHARD = "model-00002-of-00003.safetensors"


def _changed(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


def _damage(path: Path) -> bytes:
    """Other bytes of the same size, in place, with the times that the file had; returns what was there."""
    blob = path.resolve()
    before, data = blob.stat(), blob.read_bytes()
    with blob.open("r+b") as file:
        file.write(_changed(data))
    os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))
    return data


@pytest.mark.parametrize("name", [SHARD, "config.json", "tokenizer.model", "model.safetensors.index.json"])
def test_other_bytes_of_the_same_size(name: str, standin: HubStandIn, client: Client) -> None:
    data = PUBLIC_FILES[name]
    standin.trouble.other[name] = _changed(data)
    big = name.endswith((".safetensors", ".model"))
    stated = hashlib.sha256(data) if big else hashlib.sha1(b"blob %d\0" % len(data) + data)
    for _ in range(2):  # what is in the cache by now is no better
        sentence = client.sentence()
        assert name in sentence
        assert stated.hexdigest() in sentence
        assert "rm " in sentence
    standin.trouble.other.clear()
    (blob,) = (client.cache / "models--org--model" / "blobs").glob(stated.hexdigest())
    assert f"'rm {blob}'" in sentence
    blob.unlink()
    check_contents(client.run(), PUBLIC_FILES)


@pytest.mark.parametrize("env", [{}, OFFLINE])
@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_a_cache_damaged_since(name: str, env: dict[str, str], standin: HubStandIn, client: Client) -> None:
    folder = Path(client.run()["folder"])
    data = _damage(folder / name)
    assert name in client.sentence(env=env)
    (folder / name).resolve().write_bytes(data)
    check_contents(client.run(env=env), PUBLIC_FILES)


def test_a_cache_that_another_program_filled(standin: HubStandIn, client: Client) -> None:
    """Nothing records that it was checked; also where the notes are another user's, as far as one may change that."""
    folder = Path(client.run()["folder"])
    notes = folder.parents[1] / NOTES
    assert len(list(notes.iterdir())) == len({path.resolve() for path in folder.iterdir()})
    kept = {path: path.read_bytes() for path in notes.iterdir()}
    for note in notes.iterdir():
        note.unlink()
    _damage(folder / SHARD)
    assert SHARD in client.sentence()
    for path, content in kept.items():
        path.write_bytes(content)
    assert SHARD in client.sentence()  # the notes are of the blob as it was
    for path in kept:
        path.write_bytes(b"[" * 5000)
    assert SHARD in client.sentence()


def test_recheck_reads_what_a_note_vouches_for(standin: HubStandIn, client: Client) -> None:
    path = Path(client.run()["folder"]) / SHARD
    _damage(path)
    stat = path.stat()
    note = path.parents[2] / NOTES / path.resolve().name
    fields = f'"inode": {stat.st_ino}, "size": {stat.st_size}, "mtime_ns": {stat.st_mtime_ns}'
    note.write_text(f'{{{fields}, "ctime_ns": {stat.st_ctime_ns}}}')
    client.run()
    assert SHARD in client.sentence(recheck=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files to another user needs root")
def test_notes_of_another_user_are_not_believed(standin: HubStandIn, client: Client) -> None:
    path = Path(client.run()["folder"]) / SHARD
    notes = path.parents[2] / NOTES
    _damage(path)
    stat = path.stat()
    fields = f'"inode": {stat.st_ino}, "size": {stat.st_size}, "mtime_ns": {stat.st_mtime_ns}'
    (notes / path.resolve().name).write_text(f'{{{fields}, "ctime_ns": {stat.st_ctime_ns}}}')
    os.chown(notes, 2001, 2001)
    assert SHARD in client.sentence()


def test_notes_behind_a_link_are_left_alone(standin: HubStandIn, client: Client, tmp_path: Path) -> None:
    notes = Path(client.run()["folder"]).parents[1] / NOTES
    for note in notes.iterdir():
        note.unlink()
    notes.rmdir()
    (tmp_path / "elsewhere").mkdir()
    notes.symlink_to(tmp_path / "elsewhere")
    check_contents(client.run(), PUBLIC_FILES)
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_hub_that_drips(name: str, standin: HubStandIn, client: Client) -> None:
    files = {"model.safetensors": bytes(3000), **small("config.json", "tokenizer.json")}
    standin.repositories["org/slow"] = Repository(files)
    standin.trouble.drips[name] = 0.5
    sentence = client.sentence("org/slow", env={"HF_HUB_DOWNLOAD_TIMEOUT": "1"})
    assert "too slow" in sentence
    assert name in sentence
    standin.trouble.drips.clear()
    check_contents(client.run("org/slow"), files)


def test_passwords_in_addresses() -> None:
    assert masked("of http://alice:secret@host:9/x, and https://b@c/") == "of http://***@host:9/x, and https://***@c/"


def test_another_family_is_refused_before_its_weights(standin: HubStandIn, client: Client) -> None:
    """config.json comes first: nothing of a model that cannot be converted is fetched."""
    config = b'{"model_type": "falcon", "architectures": ["FalconForCausalLM"]}'
    standin.repositories["org/falcon"] = Repository(PUBLIC_FILES | {"config.json": config})
    code = "import sys; from hf_to_megatron import main; sys.exit(main(sys.argv[1:]))"
    env = {"HF_ENDPOINT": client.endpoint, "HF_HOME": str(client.home), "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    line = ["llama2", "--model-path", "org/falcon", "--out", str(client.home / "out")]
    done = subprocess.run([sys.executable, "-c", code, *line], env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "falcon" in done.stderr
    assert not any(name.endswith((".safetensors", ".index.json")) for name in standin.asked())
