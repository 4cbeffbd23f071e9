"""Several real users on one disk: A converts in a folder in which B may write. For tests that run as root."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from conftest import Result, run

MODEL = "llama2-gqa"
A, B, GROUP = 2001, 2002, 3000


def as_user(uid: int, umask: int, work: Callable[[], object]) -> tuple[int, str]:
    """Runs `work` in a child that is user `uid`; (0, its text), or (1, the exception)."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(60)
        code = 1
        try:
            os.setgroups([])
            os.setresgid(GROUP, GROUP, GROUP)
            os.setresuid(uid, uid, uid)
            os.umask(umask)
            try:
                said, code = str(work()), 0
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            with os.fdopen(write, "w") as file:
                file.write(said)
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as file:
        said = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


class Place:
    """A folder that A and B may both write in, A's home beside it, and a model that both may read."""

    def __init__(self, top: Path, source: Path, reference: Path) -> None:
        self.home, self.folder, self.out = top / "home", top / "scratch", top / "scratch" / "out"
        self.source, self.reference = top / "hf", reference
        shutil.copytree(source, self.source)
        for path in self.source.iterdir():
            path.chmod(0o644)
        self.partial = self.out.with_name("out.partial")
        self.home.mkdir(parents=True)
        (self.home / ".bashrc").write_text("mine")
        (self.home / "mine").mkdir()
        (self.home / "mine" / "model.safetensors").write_bytes(b"years of work")
        (self.home / "mine" / "chunks.0").write_bytes(b"years of work")
        for path in (self.home, *self.home.rglob("*")):
            os.chown(path, A, GROUP)
        self.folder.mkdir()
        self.before = contents(self.home)

    def mode(self, mode: int) -> Place:
        os.chown(self.folder, 0 if mode & 0o1000 else A, GROUP)
        self.folder.chmod(mode)
        return self

    def converts(self, *options: str, umask: int = 0o002, before: Callable[[], None] = lambda: None) -> Result:
        """A's conversion, as A sees it; `before` is called in A's process."""

        def work() -> str:
            before()
            found = run("hf_to_megatron", "llama2", "--model-path", self.source, "--out", self.out, *options)
            return f"{found.code}\n{found.text}"

        began = time.monotonic()
        failed, said = as_user(A, umask, work)
        assert not failed, said
        assert time.monotonic() - began < 60, "A waited for B"
        code, text = said.split("\n", 1)
        assert "Traceback" not in text
        assert contents(self.home) == self.before, "a file in A's home has changed"
        return Result(int(code), "", text)

    def is_right(self) -> None:
        assert contents(self.out) == contents(self.reference)
        assert {path.lstat().st_uid for path in (self.out, *self.out.rglob("*"))} == {A}
        assert not self.partial.exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.is_symlink()}
