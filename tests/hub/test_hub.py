"""weights_conversion.hub: the real huggingface_hub client, each time in a process of its own, against a stand-in."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from hub_standin import HubStandIn, Repository, default_repository_files, shards, small

from weights_conversion.architectures import FAMILIES
from weights_conversion.errors import ConversionError
from weights_conversion.hub import repositories as hub_module
from weights_conversion.hub import space as hub_space

ROOT = Path(__file__).parents[2]
NEEDED = {
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
}
PUBLIC = "org/model"
SHARDS = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
PUBLIC_FILES = {
    **small("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"),
    **shards("model", 3, ".safetensors"),
    **shards("pytorch_model", 2, ".bin"),
    "tokenizer.model": b"pieces",
}
CLIENT = """
import json, logging, os, resource, sys
from pathlib import Path
logging.basicConfig(level=logging.INFO)
request = json.loads(sys.argv[1])
if request.pop("file_size_limit", None):
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
from weights_conversion.hub.repositories import snapshot
from weights_conversion.errors import ConversionError
if request.get("cache_dir"):
    request["cache_dir"] = Path(request["cache_dir"])
try:
    found = snapshot(request.pop("repository"), **request)
except ConversionError as error:
    print(json.dumps({"problems": error.problems}))
else:
    print(json.dumps({"folder": str(found.folder), "revision": found.revision, "files": found.files,
                      "repository": found.repository, "torch": "torch" in sys.modules}))
"""


@dataclass
class Client:
    """A user's machine: a home of its own, and the environment that the user has set."""

    home: Path
    endpoint: str

    def start(
        self, repository: str = PUBLIC, env: dict[str, str] | None = None, **request: Any
    ) -> subprocess.Popen[str]:
        inherited = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) and not key.lower().endswith("_proxy")
        }
        settings = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.home),
            "HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-c", CLIENT, json.dumps({"repository": repository, **request})]
        environment = {**inherited, **settings, **(env or {})}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, repository: str = PUBLIC, env: dict[str, str] | None = None, **request: Any) -> dict[str, Any]:
        with self.start(repository, env, **request) as process:
            output, problems = process.communicate(timeout=240)
        assert process.returncode == 0, problems
        return json.loads(output.splitlines()[-1]) | {"stderr": problems}

    def sentence(self, *arguments: Any, **request: Any) -> str:
        """The one sentence of the error that this request must end in."""
        result = self.run(*arguments, **request)
        assert "problems" in result, result
        (sentence,) = result["problems"]
        assert "\n" not in sentence
        assert sentence.endswith(".")
        repository = arguments[0] if arguments else PUBLIC
        assert repository in sentence
        return sentence

    @property
    def cache(self) -> Path:
        return self.home / "hub"

    def everything(self) -> dict[Path, int]:
        return {
            path: path.stat().st_size for path in self.home.rglob("*") if path.is_file() and ".locks" not in path.parts
        }


OFFLINE = {"HF_HUB_OFFLINE": "1"}
TOKEN, STRANGER = "hf_member", "hf_stranger"


@pytest.fixture
def standin() -> Iterator[HubStandIn]:
    with HubStandIn(
        {
            PUBLIC: Repository(PUBLIC_FILES, revisions=("main", "v1.0", "refs/pr/1")),
            "org/gated": Repository(PUBLIC_FILES, gated=True, readers=(TOKEN,)),
            "org/private": Repository(PUBLIC_FILES, private=True, readers=(TOKEN,)),
        },
        tokens=(TOKEN, STRANGER),
    ) as server:
        yield server


@pytest.fixture
def client(standin: HubStandIn, tmp_path: Path) -> Client:
    return Client(tmp_path / "home", standin.endpoint)


def check_contents(result: dict[str, Any], files: dict[str, bytes]) -> None:
    for name in result["files"]:
        assert (Path(result["folder"]) / name).read_bytes() == files[name], name


# Names


def test_every_family_has_default_repositories() -> None:
    named = {name for family in FAMILIES.values() for name in family.repositories.values()}
    assert set(default_repository_files()) <= named
    assert FAMILIES["falcon"].repositories["180"] == "tiiuae/falcon-180B"
    assert FAMILIES["codellama"].repositories["70"] == "codellama/CodeLlama-70b-hf"
    assert FAMILIES["llama"].repositories["30"] == "huggyllama/llama-30b"
    assert FAMILIES["qwen2"].repositories["0.5"] == "Qwen/Qwen2.5-0.5B"
    assert {FAMILIES[name].default_size for name in ("codellama", "falcon", "llama", "llama2", "mistral")} == {"7"}


@pytest.mark.parametrize(
    "name", ["../etc", "a/b/c", "/abs", "", "org/na me", "org/..", "org/x--y", "http://x/y", "a\nb"]
)
def test_hostile_repository_names(name: str) -> None:
    with pytest.raises(ConversionError, match="--model-path"):
        hub_module.snapshot(name)


@pytest.mark.parametrize(
    "revision", ["", "../../x", "/etc/passwd", "a b", "a\nb", "x..y", "a\\b", "-x", "refs/", "a:b"]
)
def test_hostile_revisions(revision: str) -> None:
    with pytest.raises(ConversionError, match="--revision"):
        hub_module.snapshot("org/model", revision=revision)


# What is fetched


@pytest.mark.parametrize("repository", sorted(default_repository_files()))
def test_default_repositories(repository: str, tmp_path: Path) -> None:
    files = default_repository_files()[repository]
    expected = {
        name
        for name in files
        if name in NEEDED or re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name)
    }
    with HubStandIn({repository: Repository(files)}) as server:
        client = Client(tmp_path, server.endpoint)
        result = client.run(repository)
        assert server.asked() == server.fetched() == expected
        assert sum(request.method == "GET" and request.file is not None for request in server.requests) == len(expected)
        assert set(result["files"]) == expected
        assert result["revision"] == server.repositories[repository].commit == Path(result["folder"]).name
        assert result["repository"] == repository
        assert not result["torch"]
        check_contents(result, files)
    # The server is gone.
    assert client.run(repository, env=OFFLINE)["files"] == result["files"]


@pytest.mark.parametrize("repository", ["tiiuae/falcon-40b", "codellama/CodeLlama-34b-hf"])
def test_tokenizer_alone(repository: str, tmp_path: Path) -> None:
    files = default_repository_files()[repository]
    with HubStandIn({repository: Repository(files)}) as server:
        client = Client(tmp_path, server.endpoint)
        result = client.run(repository, weights=False)
        assert server.asked() == set(result["files"]) == set(files) & NEEDED
    assert client.run(repository, weights=False, env=OFFLINE)["files"] == result["files"]
    assert "without its weight files" in client.sentence(repository, env=OFFLINE)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"model.safetensors": b"s", "pytorch_model.bin": b"b"}, {"model.safetensors"}),
        ({"model.safetensors": b"s", **shards("model", 2, ".safetensors")}, {"model.safetensors"}),
        ({"pytorch_model.bin": b"b", "consolidated.safetensors": b"c", "model.gguf": b"g"}, {"pytorch_model.bin"}),
        (shards("pytorch_model", 2, ".bin") | {"consolidated.00.pth": b"p"}, set(shards("pytorch_model", 2, ".bin"))),
        (
            {name: data for name, data in shards("model", 2, ".safetensors").items() if "index" not in name},
            {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"},
        ),
    ],
)
def test_choice_of_weights(files: dict[str, bytes], expected: set[str], standin: HubStandIn, client: Client) -> None:
    standin.repositories["org/choice"] = Repository(files | small("config.json", "tokenizer.json"))
    result = client.run("org/choice")
    assert standin.asked() == set(result["files"]) == expected | {"config.json", "tokenizer.json"}
    assert client.run("org/choice", env=OFFLINE)["files"] == result["files"]


def test_a_repository_without_tokenizer_serves_offline_too(standin: HubStandIn, client: Client) -> None:
    standin.repositories["org/bare"] = Repository({"model.safetensors": b"s", **small("config.json")})
    assert client.run("org/bare")["files"] == client.run("org/bare", env=OFFLINE)["files"]


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/1", None, "commit"])
def test_revisions(revision: str | None, standin: HubStandIn, client: Client) -> None:
    commit = standin.repositories[PUBLIC].commit
    revision = commit if revision == "commit" else revision
    assert client.run(revision=revision)["revision"] == commit
    assert client.run(revision=revision, env=OFFLINE)["revision"] == commit


def test_a_moved_branch_fetches_only_what_changed(standin: HubStandIn, client: Client) -> None:
    first = client.run()
    standin.requests.clear()
    standin.repositories[PUBLIC] = Repository(PUBLIC_FILES | {"config.json": b"{}"})
    second = client.run()
    assert first["revision"] != second["revision"]
    assert standin.fetched() == {"config.json"}
    assert Path(first["folder"], "config.json").read_bytes() == PUBLIC_FILES["config.json"]
    assert client.run(env=OFFLINE)["revision"] == second["revision"]


def test_cache_dir(standin: HubStandIn, client: Client, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere"
    result = client.run(cache_dir=str(place))
    assert place in Path(result["folder"]).parents
    assert not client.cache.exists()
    assert client.run(cache_dir=str(place), env=OFFLINE)["files"] == result["files"]


def test_a_complete_cache_is_not_fetched_again(standin: HubStandIn, client: Client) -> None:
    before = client.run()
    contents = client.everything()
    standin.requests.clear()
    assert client.run()["files"] == before["files"]
    assert standin.fetched() == set()
    assert client.everything() == contents


# Access


def test_gated(standin: HubStandIn, client: Client) -> None:
    page = f"{client.endpoint}/org/gated"
    sentence = client.sentence("org/gated")
    assert "gated" in sentence
    assert page in sentence
    assert "hf auth login" in sentence
    assert "HF_TOKEN" in sentence
    sentence = client.sentence("org/gated", env={"HF_TOKEN": STRANGER})
    assert "gated" in sentence
    assert page in sentence
    assert "no access" in sentence
    assert standin.fetched() == set()
    check_contents(client.run("org/gated", env={"HF_TOKEN": TOKEN}), PUBLIC_FILES)


def test_private_with_the_token_of_a_login(standin: HubStandIn, client: Client) -> None:
    assert "hf auth login" in client.sentence("org/private")
    client.home.mkdir(exist_ok=True)
    (client.home / "token").write_text(TOKEN)
    check_contents(client.run("org/private"), PUBLIC_FILES)
    assert {request.token for request in standin.requests if request.cdn} == {None}


def test_bad_token(standin: HubStandIn, client: Client) -> None:
    sentence = client.sentence(env={"HF_TOKEN": "hf_expired"})
    assert "token" in sentence
    assert "hf auth login" in sentence
    assert "HF_TOKEN" in sentence
    assert "hf_expired" not in sentence
    assert standin.fetched() == set()


@pytest.mark.parametrize("token", [None, STRANGER])
def test_no_such_repository(token: str | None, client: Client) -> None:
    sentence = client.sentence("org/missing", env={"HF_TOKEN": token} if token else None)
    assert "no repository org/missing" in sentence
    assert "--model-path" in sentence


def test_no_such_revision(standin: HubStandIn, client: Client) -> None:
    sentence = client.sentence(revision="v9")
    assert "'v9'" in sentence
    assert "--revision" in sentence
    client.run()
    assert "'v9'" in client.sentence(revision="v9")


@pytest.mark.parametrize(("status", "word"), [(403, "permissions"), (429, "wait"), (500, "500"), (503, "503")])
def test_refusals(status: int, word: str, standin: HubStandIn, client: Client) -> None:
    standin.trouble.status["listing"] = status
    assert word in client.sentence()
    standin.trouble.status.clear()
    client.run()
    standin.trouble.status["listing"] = status
    result = client.run()  # a complete cache serves
    assert "complete copy in the cache" in result["stderr"]
    assert word in result["stderr"]


def test_a_file_that_fails(standin: HubStandIn, client: Client) -> None:
    standin.trouble.status["model-00002-of-00003.safetensors"] = 403
    assert "403" in client.sentence()
    standin.trouble.status.clear()
    standin.requests.clear()
    check_contents(client.run(), PUBLIC_FILES)
    assert "model-00001-of-00003.safetensors" not in standin.fetched()


def test_a_page_that_is_not_a_hub(standin: HubStandIn, client: Client) -> None:
    standin.trouble.not_a_hub = True
    assert "HF_ENDPOINT" in client.sentence()


# What a repository may hold


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no weight file"),
        ({"consolidated.safetensors": b"c", "model.gguf": b"g"}, r"\.gguf, consolidated\.safetensors"),
        ({"consolidated.00.pth": b"c"}, r"\.pth"),
        ({"tf_model.h5": b"h", "sub/model.safetensors": b"s"}, r"\.h5"),
        ({"model-00001-of-00002.safetensors": b"1", "model-00001-of-00003.safetensors": b"1"}, "no weight file"),
        ({"model-00001-of-00002.safetensors": b"1"}, "model-00002-of-00002.safetensors"),
        (
            {name: data for name, data in shards("model", 3, ".safetensors").items() if "00002-of" not in name},
            "model-00002-of-00003.safetensors",
        ),
    ],
)
def test_lacking_weights(files: dict[str, bytes], words: str, standin: HubStandIn, client: Client) -> None:
    standin.repositories["org/odd"] = Repository(files | small("config.json", "tokenizer.json"))
    assert re.search(words, client.sentence("org/odd"))
    assert not any(name.endswith((".safetensors", ".pth", ".gguf")) for name in standin.asked())


def test_no_config(standin: HubStandIn, client: Client) -> None:
    standin.repositories["org/odd"] = Repository({"model.safetensors": b"s", **small("tokenizer.json")})
    assert "config.json" in client.sentence("org/odd")
    standin.repositories["org/odd"] = Repository({"model.safetensors": b"s"})
    assert "tokenizer" in client.sentence("org/odd", weights=False)
    assert standin.asked() == set()


@pytest.mark.parametrize(
    "name",
    [
        "../../../../../evil.safetensors",
        "/tmp/evil.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "C:\\x.safetensors",
        "modeling.py",
        "pytorch_model.bin",
        "x\n.safetensors",
        "\x00.safetensors",
        "..safetensors",
        ".safetensors",
        "model.safetensors\n",
        "",
    ],
)
def test_index_that_leaves_its_folder(name: str, standin: HubStandIn, client: Client) -> None:
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors", "b": name}}
    files = {"model.safetensors.index.json": json.dumps(index).encode(), "model-00001-of-00001.safetensors": b"s"}
    standin.repositories["org/evil"] = Repository(
        files | small("config.json", "tokenizer.json") | {name or "x": b"evil"}
    )
    assert "model.safetensors.index.json" in client.sentence("org/evil")
    assert name not in standin.asked()
    assert not any(request.file and "evil" in request.file for request in standin.requests)
    assert "model.safetensors.index.json" in client.sentence("org/evil", env=OFFLINE)


@pytest.mark.parametrize(
    "index",
    [b"", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": {"a": 1}}', b'{"weight_map": [[]]}', b"[" * 100000],
)
def test_index_that_is_none(index: bytes, standin: HubStandIn, client: Client) -> None:
    standin.repositories["org/odd"] = Repository({"model.safetensors.index.json": index, **small("config.json")})
    assert "not an index" in client.sentence("org/odd")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_small_files_that_are_not_small(name: str, standin: HubStandIn, client: Client) -> None:
    files = small("config.json", "tokenizer.json") | {"model.safetensors": b"s", name: bytes((64 << 20) + 1)}
    standin.repositories["org/odd"] = Repository(files)
    assert name in client.sentence("org/odd")
    assert standin.asked() == set()


# The network


BIG_FILE = {"model.safetensors": bytes(range(256)) * (26 << 12), **small("config.json", "tokenizer.json")}
WRITTEN = 10 << 20  # the client writes what it receives in pieces of 10 MiB


@pytest.mark.parametrize("trouble", ["drops", "resets", "stalls"])
def test_broken_in_mid_file_then_resumed_by_itself(trouble: str, standin: HubStandIn, client: Client) -> None:
    standin.repositories["org/big"] = Repository(BIG_FILE)
    getattr(standin.trouble, trouble)["model.safetensors"] = [WRITTEN + 1000, WRITTEN + 77]
    check_contents(client.run("org/big", env={"HF_HUB_DOWNLOAD_TIMEOUT": "2"}), BIG_FILE)
    ranges = [request.range for request in standin.requests if request.cdn and request.method == "GET"]
    if trouble == "resets" and not huggingface_hub.__version__.startswith("0."):
        assert len(ranges) == 3  # newer clients resume after a polite end or a silence, not after a reset
    else:
        assert ranges == [None, f"bytes={WRITTEN}-", f"bytes={2 * WRITTEN}-"]


@pytest.mark.skipif(not huggingface_hub.__version__.startswith("0."), reason="newer clients keep only complete files")
def test_part_of_a_file_is_resumed_by_the_next_run(standin: HubStandIn, client: Client) -> None:
    standin.repositories["org/big"] = Repository(BIG_FILE)
    standin.trouble.stalls["model.safetensors"] = [WRITTEN + 1000]
    process = client.start("org/big", env={"HF_HUB_DOWNLOAD_TIMEOUT": "600"})
    while not [path for path in client.cache.rglob("*.incomplete") if path.stat().st_size >= WRITTEN]:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    standin.requests.clear()
    check_contents(client.run("org/big"), BIG_FILE)
    assert [request.range for request in standin.requests if request.cdn and request.method == "GET"] == [
        f"bytes={WRITTEN}-"
    ]


def test_dropped_for_good_then_run_again(standin: HubStandIn, client: Client) -> None:
    name = "model-00002-of-00003.safetensors"
    standin.trouble.resets[name] = [10] * 100
    sentence = client.sentence(env={"HF_HUB_DOWNLOAD_TIMEOUT": "2"})
    assert "connection" in sentence
    assert "same command again" in sentence
    assert name in sentence
    # Offline it is known what is missing.
    assert name in client.sentence(env=OFFLINE)
    standin.trouble.resets.clear()
    standin.requests.clear()
    check_contents(client.run(), PUBLIC_FILES)
    assert standin.fetched() == {name, "model-00003-of-00003.safetensors"}


def test_a_hub_that_never_answers(standin: HubStandIn, client: Client) -> None:
    standin.trouble.silent_listing = True
    sentence = client.sentence(env={"HF_HUB_ETAG_TIMEOUT": "1"})
    assert "connection" in sentence
    assert client.endpoint in sentence


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_ended_in_mid_file_then_run_again(end: signal.Signals, standin: HubStandIn, client: Client) -> None:
    name = "model-00003-of-00003.safetensors"
    standin.trouble.stalls[name] = [100]
    process = client.start(env={"HF_HUB_DOWNLOAD_TIMEOUT": "600"})
    while name not in standin.fetched():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(end)
    assert process.wait(timeout=60) != 0
    assert name in client.sentence(env=OFFLINE)
    standin.requests.clear()
    check_contents(client.run(), PUBLIC_FILES)
    assert standin.fetched() == {name}


def test_no_server_at_all(standin: HubStandIn, client: Client) -> None:
    before = client.run()
    standin.stop()
    after = client.run()
    assert after["files"] == before["files"]
    assert "complete copy in the cache" in after["stderr"]
    sentence = client.sentence("org/gated")
    assert "connection" in sentence
    assert "hf download org/gated" in sentence
    assert "HF_HOME" in sentence
    assert client.endpoint in sentence


# Offline


def test_offline_with_an_empty_cache(client: Client) -> None:
    sentence = client.sentence(env=OFFLINE)
    assert "HF_HUB_OFFLINE" in sentence
    assert f"hf download {PUBLIC}" in sentence
    assert str(client.cache) in sentence


@pytest.mark.parametrize("name", ["config.json", "model-00003-of-00003.safetensors"])
def test_offline_with_a_file_missing(name: str, standin: HubStandIn, client: Client) -> None:
    path = Path(client.run()["folder"]) / name
    path.resolve().unlink()  # the blob: the link to it dangles
    assert name in client.sentence(env=OFFLINE)
    path.unlink()
    assert name in client.sentence(env=OFFLINE)


def test_offline_prefers_the_complete_format(standin: HubStandIn, client: Client) -> None:
    """As where another program has fetched the .bin files, and the safetensors have come later and in part."""
    folder = Path(client.run()["folder"])
    for name, data in PUBLIC_FILES.items():
        if name.startswith("pytorch_model"):
            (folder / name).write_bytes(data)
    assert set(client.run(env=OFFLINE)["files"]) > SHARDS
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert set(shards("pytorch_model", 2, ".bin")) < set(client.run(env=OFFLINE)["files"])


# The disk


def test_a_cached_file_of_the_wrong_size(standin: HubStandIn, client: Client) -> None:
    path = Path(client.run()["folder"]) / "model-00001-of-00003.safetensors"
    with path.open("r+b") as file:
        file.truncate(100)
    sentence = client.sentence()
    assert "--force-download" in sentence
    assert path.name in sentence
    assert path.stat().st_size == 100


def test_full_disk(standin: HubStandIn, client: Client) -> None:
    """By a limit on the size of files: every system has that."""
    check_contents(client.run(weights=False), PUBLIC_FILES)
    contents = client.everything()
    sentence = client.sentence(file_size_limit=True)
    assert "full" in sentence
    assert "--cache-dir" in sentence
    assert str(client.cache) in sentence
    assert contents.items() <= client.everything().items()
    check_contents(client.run(), PUBLIC_FILES)


def test_too_little_space(standin: HubStandIn, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """What will not fit is refused before the first shard."""
    folder = Path(client.run(weights=False)["folder"])
    monkeypatch.setattr(hub_space.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2000})())
    info = type("Info", (), {"siblings": _siblings(), "sha": "0" * 40})()
    with pytest.raises(ConversionError, match="GB free"):
        hub_space.check_space(info, sorted(SHARDS), folder, PUBLIC)  # type: ignore[arg-type]


def _siblings() -> list[Any]:
    return [
        type("File", (), {"rfilename": name, "size": len(PUBLIC_FILES[name]), "blob_id": name, "lfs": None})()
        for name in sorted(SHARDS)
    ]


def test_cache_that_cannot_be_written(client: Client, tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("no folder")
    assert "cannot be written" in client.sentence(cache_dir=str(place))
    assert place.read_text() == "no folder"
