"""The ranks of a torchrun or srun job: joining, signs of life, and one end for all."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from weights_conversion import saying
from weights_conversion.errors import ConversionError
from weights_conversion.launch.endings import CONTINUES, Ended, Failure, Limits, SaidElsewhere, sentence
from weights_conversion.launch.environment import Launch
from weights_conversion.launch.ranks import Ranks
from weights_conversion.launch.rendezvous import connect

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

logger = logging.getLogger(__name__)

_DEAD = "no sign of life, it was killed or its node is down"


class Group(Ranks):
    """The ranks of a torchrun or srun job."""

    def __init__(self, launch: Launch, limits: Limits) -> None:
        super().__init__()
        self.rank, self.size = launch.rank, launch.size
        self._launch, self._limits = launch, limits
        self._names: list[str] = []  # of the hosts, by rank
        self._absent: list[int] = []  # ranks that have not joined
        self._host = socket.gethostname()
        self._changed = threading.Condition()
        self._out: dict[str, str] = {}
        self._wanted: Sequence[str] = ()
        self._heard: list[str] | None = None
        self._failure: Failure | None = None
        self._failed_at = 0.0
        self._noticed = self._settled = self._nudged = self._sending = False
        self._closed = threading.Event()
        self._written = self._shown = 0
        self._contact = time.monotonic()
        self._seen: dict[int, tuple[str, float]] = {}  # last sign of life of a rank, and when it came
        self._store: TCPStore | None = None

    # --- what a conversion uses

    def agree(self, view: Mapping[str, str]) -> None:
        if self.rank:
            self._post({f"view/{self.rank}": json.dumps(view)})
            self.hear("agreed")
            return
        views = [json.loads(text) for text in self._hear([f"view/{rank}" for rank in range(1, self.size)])]
        problems: dict[str, list[str]] = {}
        for rank, other in enumerate(views, start=1):
            differing = [what for what in view if other.get(what) != view[what]]
            if differing:
                problems.setdefault(", ".join(differing), []).append(f"{rank} ({self._names[rank]})")
        if problems:
            raise ConversionError(*(
                f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)} and rank 0 ({self._host}) see different sources: "
                f"{what}; give every node the same files (sizes, times, contents; best on one shared filesystem), "
                "release and options"
                for what, ranks in problems.items()
            ))  # fmt: skip
        self.tell("agreed")

    def tell(self, key: str, value: str = "") -> None:
        if self.rank == 0:
            self._post({key: value})

    def hear(self, key: str) -> str:
        return self._hear([key])[0]

    def gather(self, key: str) -> None:
        if self.rank:
            self._post({f"{key}/{self.rank}": ""})
        else:
            self._hear([f"{key}/{rank}" for rank in range(1, self.size)])

    def check(self) -> None:
        if self._failure is not None:
            raise Ended

    def count(self, nbytes: int) -> None:
        with self._changed:
            self._written += nbytes

    def stuck(self) -> bool:
        text = f"was interrupted, but waits for a read or write that does not end; {CONTINUES}"
        self._fail(Failure(self.rank, self._from(self.rank, text)), tell=True)
        return not self._settled  # rank 0 alone at the end: there is nobody to be told

    def settle(self) -> None:
        self._settled = True

    # --- life and end of a rank

    def call(self, work: Callable[[], str]) -> str:
        """work(), with every error that ends it told to all; what it raises is for this rank to say."""
        try:
            self._join()
            text = work()
        except BaseException as error:
            raise self._outcome(error) from error
        if self.rank:
            raise SaidElsewhere(0)
        return text

    def leave(self) -> None:
        """Gives the other ranks a moment to hear how it ended."""
        self._noticed = True
        if self._failure is not None:
            _ignore_termination()
        if self._store is not None:
            if self.rank:
                self._post({f"left/{self.rank}": ""})
                self._wait(lambda: not (self._out or self._sending) or self._store is None, 2.0)
            else:
                self._post({"said": ""})
                dead = [*self._absent, *self._silent(2.5 * self._limits.beat)]
                others = [rank for rank in range(1, self.size) if rank not in dead]
                self._settled = True
                self._try([f"left/{rank}" for rank in others], self._limits.farewell)
        self._closed.set()

    def _outcome(self, error: BaseException) -> BaseException:
        """What this rank raises in the end, after it has told the others or been told."""
        interrupted = not isinstance(error, Exception)
        if interrupted and self._failure is None:
            self._find_cause()
        self._noticed = True
        elsewhere = self._failure is not None and (self._nudged or self._failure.rank != self.rank)
        own = not isinstance(error, Ended) and not (interrupted and elsewhere)
        if own and self._failure is None:
            self._fail(Failure(self.rank, sentence(error), told=True), tell=True)
        failure = self._failure
        if interrupted or self.rank == 0:
            _ignore_termination()  # the launcher ends all when one has ended; the reason must still get out
        if own and self.rank == 0:
            return error
        code = 1 if not interrupted or self._nudged else 130 if isinstance(error, KeyboardInterrupt) else 143
        assert failure is not None
        if self.rank == 0:
            silent = [rank for rank in self._silent(4 * self._limits.beat) if rank != failure.rank]
            more = [self._from(rank, _DEAD) for rank in silent[:1]]  # what may lie behind an interruption on its node
            return ConversionError(failure.text, *more)
        said = failure.told and self._try(["said"], self._limits.farewell) is not None
        if own and not interrupted and not isinstance(error, (ConversionError, OSError)):
            return error  # a defect: its traceback belongs to the log of this rank
        if said:
            return SaidElsewhere(code)
        return ConversionError(self._from(self.rank, failure.text))

    def _from(self, rank: int, text: str) -> str:
        if text.startswith("rank "):
            return text
        host = self._names[rank] if rank < len(self._names) else self._host if rank == self.rank else "an unknown host"
        return f"rank {rank} of {self.size} on {host}: {text}"

    def _find_cause(self) -> None:
        """A launcher terminates all ranks when one has died: waits a few beats for the one that is silent."""
        beat = self._limits.beat
        if self._store is None:
            return
        self._wait(lambda: self._failure is not None or bool(self._silent(2.5 * beat)), (6 if self.rank else 4) * beat)
        silent = self._silent(2.5 * beat)
        if self._failure is None and silent:
            self._fail(self._dead(silent[0]), tell=self.rank == 0)

    def _silent(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [rank for rank, (_, when) in self._seen.items() if now - when > seconds]

    def _dead(self, rank: int) -> Failure:
        return Failure(rank, self._from(rank, f"{_DEAD}; {CONTINUES}"), told=rank != 0)

    def _fail(self, failure: Failure, tell: bool = False) -> None:
        """The first failure counts. Stops the work of this rank, and of the others if they are to be told."""
        with self._changed:
            if self._failure is None:
                self._failure, self._failed_at = failure, time.monotonic()
                if tell:
                    self._out["failed"] = json.dumps([failure.rank, self._from(failure.rank, failure.text)])
            self._changed.notify_all()
        self.stop.set()

    # --- waiting, in the thread that works

    def _post(self, values: Mapping[str, str]) -> None:
        with self._changed:
            self._out.update(values)
            self._changed.notify_all()

    def _wait(self, until: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        with self._changed:
            while not until():
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, self._limits.beat))
        return True

    def _try(self, keys: Sequence[str], seconds: float, or_failure: bool = False) -> list[str] | None:
        """The values of `keys` as soon as all are there; None after `seconds`."""
        if not keys:
            return []
        with self._changed:
            self._wanted, self._heard = list(keys), None
            self._changed.notify_all()
        self._wait(
            lambda: self._heard is not None or self._store is None or (or_failure and self._failure is not None),
            seconds,
        )
        with self._changed:
            heard, self._wanted, self._heard = self._heard, (), None
        return heard

    def _hear(self, keys: Sequence[str]) -> list[str]:
        while True:
            self.check()
            heard = self._try(keys, 3600.0, or_failure=True)
            if heard is not None:
                return heard

    # --- joining

    def _join(self) -> None:
        limits = self._limits
        if self.rank:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            root = logging.getLogger()
            root.setLevel(logging.ERROR)
            for handler in root.handlers:
                handler.setFormatter(logging.Formatter(f"rank {self.rank} on {self._host}: %(levelname)s: %(message)s"))
        deadline = time.monotonic() + limits.join
        store = connect(self._launch, limits, deadline)
        self._set(store, f"host/{self.rank}", self._host)
        self._set(store, f"alive/{self.rank}", "0 0")
        wanted = [self._key(f"host/{rank}") for rank in range(self.size)] if self.rank == 0 else [self._key("joined")]
        pause = 0.02
        while not store.check(wanted):
            if self.rank and store.check([self._key("failed")]):
                break
            if time.monotonic() > deadline + (2 if self.rank else 0):
                self._not_joined(store)
            time.sleep(pause)
            pause = min(pause * 1.5, 0.5)
        self._contact = time.monotonic()
        self._store = store
        if self.rank == 0:
            self._names = [store.get(key).decode() for key in wanted]
            self._set(store, "joined", json.dumps(self._names))
        elif store.check(wanted):
            self._names = json.loads(store.get(wanted[0]))
        else:
            self._fail(Failure(*json.loads(store.get(self._key("failed")))))
        self.hosts = len(set(self._names))
        threading.Thread(target=self._talk, daemon=True, name="ranks").start()
        threading.Thread(target=self._guard, daemon=True, name="ranks-guard").start()
        self.check()

    def _not_joined(self, store: TCPStore) -> None:
        absent = [rank for rank in range(self.size) if not store.check([self._key(f"host/{rank}")])]
        if self.rank:
            absent = absent[:1] if 0 in absent else []
        names = ", ".join(map(str, absent[:20])) + (" ..." if len(absent) > 20 else "")
        text = (
            f"rank{'s' * (len(absent) > 1)} {names} of {self.size} did not start within {self._limits.join:.0f} s; see "
            "their logs, start all ranks at one time, or unset WORLD_SIZE and SLURM_STEP_ID where one process is meant"
        ) if absent else "rank 0 did not begin in time"  # fmt: skip
        if self.rank == 0:
            self._absent = absent
            store.compare_set(self._key("failed"), "", json.dumps([0, text]))
            self._store = store
            threading.Thread(target=self._talk, daemon=True, name="ranks").start()
        self._fail(Failure(0, text, told=self.rank == 0))
        raise ConversionError(text)

    # --- the store, which one thread alone uses after joining

    def _key(self, key: str) -> str:
        return f"weights_conversion/{self._launch.name}/{key}"

    def _set(self, store: TCPStore, key: str, value: str) -> None:
        store.set(self._key(key), value)

    def _talk(self) -> None:
        store, limits = self._store, self._limits
        assert store is not None
        due, beats, pause, before = 0.0, 0, limits.beat, ()
        while not self._closed.is_set():
            with self._changed:
                if not self._out and tuple(self._wanted) == before:
                    self._changed.wait(min(pause, max(due - time.monotonic(), 0.0)))
                out, self._out, self._sending = self._out, {}, True
                wanted = tuple(self._wanted)
                written = self._written
            slow = limits.beat / 2 if wanted else limits.beat
            pause = 0.02 if wanted and wanted != before else min(pause * 1.5, slow)
            before = wanted
            try:
                failed = out.pop("failed", None)
                if failed is not None:
                    store.compare_set(self._key("failed"), "", failed)
                for key, value in out.items():
                    self._set(store, key, value)
                if time.monotonic() >= due:
                    beats, due = beats + 1, time.monotonic() + limits.beat
                    self._set(store, f"alive/{self.rank}", f"{beats} {written}")
                    self._look(store, written)
                keys = [self._key(key) for key in wanted]
                heard = [value.decode() for value in store.multi_get(keys)] if keys and store.check(keys) else None
            except Exception as error:
                logger.debug("the store is gone: %s", error)
                with self._changed:
                    self._store = None
                text = f"the connection is lost, it was killed or its node is down; {CONTINUES}"
                self._fail(Failure(0, self._from(0, text), told=False))
                return
            with self._changed:
                self._contact, self._sending = time.monotonic(), False
                if heard is not None and tuple(self._wanted) == wanted:
                    self._heard = heard
                self._changed.notify_all()

    def _look(self, store: TCPStore, written: int) -> None:
        """Whether another rank has failed, who is alive, and how far they are."""
        failed = self._key("failed")
        if not self._names:
            return  # the job has not begun, and ends
        if self._failure is None and not self._settled and store.check([failed]):
            rank, text = json.loads(store.get(failed))
            self._fail(Failure(rank, text))
        watched = range(1, self.size) if self.rank == 0 else (0,)
        values = [value.decode() for value in store.multi_get([self._key(f"alive/{rank}") for rank in watched])]
        now = time.monotonic()
        for rank, value in zip(watched, values, strict=True):
            if rank not in self._seen or self._seen[rank][0] != value:
                self._seen[rank] = (value, now)
        if self._settled:
            return
        if self.rank == 0:
            total = written + sum(int(value.split()[1]) for value in values)
            if total > self._shown:
                advance, self._shown = total - self._shown, total
                self._advance(advance)
        silent = self._silent(self._limits.silence)
        if silent and self._failure is None:
            self._fail(self._dead(silent[0]), tell=self.rank == 0)

    def _guard(self) -> None:
        """Ends a rank whose connection hangs, or whose work does not come back to hear of a failure."""
        limits = self._limits
        while not self._closed.wait(limits.beat):
            now = time.monotonic()
            if self._failure is None and now - self._contact > limits.silence:
                text = f"rank 0 ({self._names[0]}) has not answered for {limits.silence:.0f} s; {CONTINUES}"
                self._fail(Failure(0, self._from(self.rank, text), told=False))
            if self._failure is None or self._noticed or self._settled:
                continue
            if now - self._failed_at > limits.exit:
                if self.rank == 0 or not self._failure.told:
                    saying.say(f"error: {self._failure.text}")
                    saying.flush()
                os._exit(1)
            if now - self._failed_at > limits.nudge and not self._nudged and callable(signal.getsignal(signal.SIGTERM)):
                self._nudged = True
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def _ignore_termination() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
