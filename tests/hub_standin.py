"""A stand-in for the Hugging Face hub: a real HTTP server on loopback that the real client talks to.

It imitates what huggingface_hub asks for when it downloads: the listing of a repository at a revision, its tree, and
HEAD and GET of single files, with the headers and error codes of the hub, the redirect of big files to another host
name, ranges, and the failures that a test orders. Every request is recorded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

BIG = (".safetensors", ".bin", ".pth", ".model", ".gguf")  # what the hub keeps in LFS


@dataclass
class Repository:
    """One commit of one repository. `revisions` are the branches and tags that point to it."""

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main",)
    gated: bool = False
    private: bool = False
    readers: tuple[str, ...] = ()  # the tokens with access, where gated or private
    commit: str = ""

    def __post_init__(self) -> None:
        digest = hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()
        self.commit = self.commit or digest


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    file: str | None  # the repository's file that was asked for, also where its bytes come from the other host
    range: str | None
    token: str | None
    cdn: bool


@dataclass
class Trouble:
    """What goes wrong. The lists are used up one by one by the GETs of that file."""

    drops: dict[str, list[int]] = field(default_factory=dict)  # bytes after which the connection is closed
    resets: dict[str, list[int]] = field(default_factory=dict)  # the same, as by a router that forgot the connection
    stalls: dict[str, list[int]] = field(default_factory=dict)  # bytes after which nothing more comes
    other: dict[str, bytes] = field(default_factory=dict)  # bytes that are sent in place of the stated ones
    drips: dict[str, float] = field(default_factory=dict)  # seconds between one byte and the next
    status: dict[str, int] = field(default_factory=dict)  # an HTTP status instead of "listing" or of a file
    silent_listing: bool = False  # the listing never comes
    not_a_hub: bool = False  # a captive portal: every answer is the same page of HTML


class HubStandIn:
    """`with HubStandIn({"org/name": Repository(...)}) as hub`; hub.endpoint is for HF_ENDPOINT."""

    def __init__(self, repositories: Mapping[str, Repository], tokens: Sequence[str] = ()):
        self.repositories = dict(repositories)
        self.tokens = tuple(tokens)
        self.trouble = Trouble()
        self.requests: list[Request] = []
        self.released = threading.Event()  # lets stalled answers end when the server stops
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> HubStandIn:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def fetched(self) -> set[str]:
        """The files whose bytes were asked for."""
        return {request.file for request in self.requests if request.method == "GET" and request.file}

    def asked(self) -> set[str]:
        """The files that were asked for in any way."""
        return {request.file for request in self.requests if request.file}


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):  # the client may hang up at any moment
            super().handle()

    def answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if match := re.fullmatch(r"/cdn/([0-9a-f]{40})/([^/]+/[^/]+)/(.+)", path):
            name = match[3]
            self.note(path, name, token, cdn=True)
            self.send_file(self.hub.repositories[match[2]], name)
            return
        resolve = re.fullmatch(r"/([^/]+/[^/]+|[^/]+)/resolve/([^/]+)/(.+)", url.path)
        self.note(path, unquote(resolve[3]) if resolve else None, token, cdn=False)
        if self.hub.trouble.not_a_hub:
            self.send(200, {"Content-Type": "text/html"}, b"<html>Please log in to the network</html>")
        elif resolve:
            self.resolve(unquote(resolve[1]), unquote(resolve[2]), unquote(resolve[3]), token)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+|[^/]+)(?:/(revision|tree)/([^/]+))?", url.path):
            what, revision = match[2] or "revision", unquote(match[3] or "main")
            self.listing(unquote(match[1]), revision, what, parse_qs(url.query), token)
        else:
            self.fail(404, "", "Not Found")

    def note(self, path: str, name: str | None, token: str | None, cdn: bool) -> None:
        self.hub.requests.append(Request(self.command, path, name, self.headers.get("Range"), token, cdn))

    # Who may read what

    def find(self, name: str, revision: str, token: str | None, *, files: bool) -> Repository | None:
        """The repository, or None after an error has been answered."""
        repository = self.hub.repositories.get(name)
        if token is not None and token not in self.hub.tokens:
            self.fail(401, "", "Invalid credentials in Authorization header")
        elif repository is None or (repository.private and token not in repository.readers):
            # Without a token the hub does not even tell whether there is such a repository.
            if token is None:
                self.fail(401, "RepoNotFound", "Invalid username or password.")
            else:
                self.fail(404, "RepoNotFound", "Repository not found")
        elif revision not in (*repository.revisions, repository.commit):
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif files and repository.gated and token not in repository.readers:
            # The listing of a gated repository is public, its files are not.
            status = 401 if token is None else 403
            self.fail(
                status, "GatedRepo", f"Access to model {name} is restricted. You must be authenticated to access it."
            )
        else:
            return repository
        return None

    # Answers

    def listing(self, name: str, revision: str, what: str, query: Mapping[str, list[str]], token: str | None) -> None:
        if self.hub.trouble.silent_listing:
            self.hub.released.wait()
            return
        if status := self.hub.trouble.status.get("listing"):
            self.fail(status, "", "Something is wrong on our side")
            return
        repository = self.find(name, revision, token, files=False)
        if repository is None:
            return
        if what == "tree":
            body: Any = [
                {"type": "file", "path": path, "size": len(data), "oid": _blob_id(data), **_lfs(path, data)}
                for path, data in repository.files.items()
            ]
        else:
            blobs = "blobs" in query
            body = {
                "_id": "0",
                "id": name,
                "modelId": name,
                "sha": repository.commit,
                "private": repository.private,
                "gated": "manual" if repository.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [
                    {"rfilename": path}
                    | ({"size": len(data), "blobId": _blob_id(data), **_lfs(path, data)} if blobs else {})
                    for path, data in repository.files.items()
                ],
            }
        self.send(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def resolve(self, name: str, revision: str, path: str, token: str | None) -> None:
        if status := self.hub.trouble.status.get(path):
            self.fail(status, "", "Something is wrong on our side")
            return
        repository = self.find(name, revision, token, files=True)
        if repository is None:
            return
        data = repository.files.get(path)
        if data is None:
            self.fail(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": repository.commit})
        elif path.endswith(BIG):
            # The other host name makes this a foreign host, to which the token must not go.
            target = f"http://localhost:{self.hub.port}/cdn/{repository.commit}/{name}/{path}"
            headers = {
                "Location": target,
                "X-Repo-Commit": repository.commit,
                "X-Linked-Size": str(len(data)),
                "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
            }
            self.send(302, headers, b"")
        else:
            self.send_file(repository, path)

    def send_file(self, repository: Repository, path: str) -> None:
        data = repository.files[path]
        big = path.endswith(BIG)
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest() if big else _blob_id(data)}"',
            "X-Repo-Commit": repository.commit,
            "Accept-Ranges": "bytes",
        }
        start, status = 0, 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, status = int(match[1]), 206
            if start >= len(data):
                self.fail(416, "", "Range not satisfiable")
                return
            stop = min(int(match[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{stop}/{len(data)}"
            data = data[: stop + 1]
        body = self.hub.trouble.other.get(path, data)[start:]
        if self.command == "GET" and (pause := self.hub.trouble.drips.get(path)):
            self.send(status, headers, body, stop_after=0)
            for byte in body:
                if self.hub.released.wait(pause):
                    break
                self.wfile.write(bytes([byte]))
            self.close_connection = True
        elif self.command == "GET" and (drops := self.hub.trouble.drops.get(path)):
            self.send(status, headers, body, stop_after=drops.pop(0))
            self.close_connection = True
        elif self.command == "GET" and (resets := self.hub.trouble.resets.get(path)):
            self.send(status, headers, body, stop_after=resets.pop(0))
            time.sleep(0.3)  # a reset discards what the other side has not read yet
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # the server's own way would say goodbye first
            self.close_connection = True
        elif self.command == "GET" and (stalls := self.hub.trouble.stalls.get(path)):
            self.send(status, headers, body, stop_after=stalls.pop(0))
            self.hub.released.wait()
            self.close_connection = True
        else:
            self.send(status, headers, body)

    def fail(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        every = {"X-Error-Message": message, "Content-Type": "application/json", **(headers or {})}
        if code:
            every["X-Error-Code"] = code
        self.send(status, every, json.dumps({"error": message}).encode())

    def send(self, status: int, headers: Mapping[str, str], body: bytes, stop_after: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if stop_after is None else body[:stop_after])
            self.wfile.flush()


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _lfs(path: str, data: bytes) -> dict[str, Any]:
    if not path.endswith(BIG):
        return {}
    digest = hashlib.sha256(data).hexdigest()
    return {"lfs": {"oid": digest, "sha256": digest, "size": len(data), "pointerSize": 134}}


# Repositories as they are on the hub, in names; the bytes are made up


def shards(stem: str, count: int, suffix: str) -> dict[str, bytes]:
    """A sharded set of weight files with its index; each file's bytes are its own name, some kB of it."""
    names = [f"{stem}-{i:05}-of-{count:05}{suffix}" for i in range(1, count + 1)]
    index = {"metadata": {"total_size": 1}, "weight_map": {f"layer.{i}.weight": name for i, name in enumerate(names)}}
    return {f"{stem}{suffix}.index.json": json.dumps(index).encode()} | {name: name.encode() * 100 for name in names}


def small(*names: str) -> dict[str, bytes]:
    return {name: json.dumps({"name": name}).encode() for name in names}


def _llama(
    safetensors: int, bins: int, *more: str, vocabulary: tuple[str, ...] = ("tokenizer.json", "tokenizer.model")
):
    common = small(".gitattributes", "README.md", "config.json", "generation_config.json", "special_tokens_map.json")
    return {
        **common,
        **small("tokenizer_config.json", *vocabulary, *more),
        **shards("model", safetensors, ".safetensors"),
        **(shards("pytorch_model", bins, ".bin") if bins else {}),
    }


def _falcon(safetensors: int, bins: int):
    return {
        **small(".gitattributes", "README.md", "config.json", "generation_config.json", "special_tokens_map.json"),
        **small(
            "tokenizer_config.json", "tokenizer.json", "handler.py", "configuration_falcon.py", "modeling_falcon.py"
        ),
        **small("coreml/text-generation/Model.mlpackage/Manifest.json"),
        **shards("model", safetensors, ".safetensors"),
        **(shards("pytorch_model", bins, ".bin") if bins else {}),
    }


def default_repository_files() -> dict[str, dict[str, bytes]]:
    """Every default repository, with the kinds of files that surround the needed ones there."""
    licences = ("LICENSE.txt", "USE_POLICY.md")
    mistral = _llama(2, 2, "consolidated.safetensors", "params.json")
    return {
        "tiiuae/falcon-7b": _falcon(2, 2),
        "tiiuae/falcon-40b": _falcon(9, 9),
        "tiiuae/falcon-180B": _falcon(81, 0),
        "mistralai/Mistral-7B-v0.1": mistral,
        "huggyllama/llama-7b": _llama(2, 2, "LICENSE"),
        "huggyllama/llama-13b": _llama(3, 3, "LICENSE"),
        "huggyllama/llama-30b": _llama(7, 7, "LICENSE"),
        "huggyllama/llama-65b": _llama(14, 14, "LICENSE"),
        "meta-llama/Llama-2-7b-hf": _llama(2, 2, *licences),
        "meta-llama/Llama-2-13b-hf": _llama(3, 3, *licences),
        "meta-llama/Llama-2-70b-hf": _llama(15, 15, *licences),
        "codellama/CodeLlama-7b-hf": _llama(2, 3, "flax_model.msgpack", "tf_model.h5", "onnx/model.onnx"),
        "codellama/CodeLlama-13b-hf": _llama(3, 3, "original/consolidated.00.pth", "model.gguf"),
        "codellama/CodeLlama-34b-hf": _llama(7, 7, "added_tokens.json"),
        "codellama/CodeLlama-70b-hf": _llama(29, 29, "tokenizer.model.v3"),
    }
