"""The ranks of a torchrun or srun job: what a conversion asks of them, and one end for all."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from weights_conversion.errors import ConversionError
from weights_conversion.launch import outcome, rendezvous
from weights_conversion.launch.endings import CONTINUES, End, Ended, Failure, Limits, SaidElsewhere, sentence
from weights_conversion.launch.environment import Launch
from weights_conversion.launch.line import Line, Store
from weights_conversion.launch.outcome import Cause
from weights_conversion.launch.ranks import Ranks
from weights_conversion.launch.watchdog import Signs, Watchdog

_DEAD = "no sign of life, it was killed or its node is down"
_NO_LIMIT = 3600.0  # seconds of one wait, which is repeated as long as all ranks live


class Group(Ranks):
    """The ranks of a torchrun or srun job, as one of them sees it.

    The thread that works calls everything here but `_beat` and `_lost`, which `line` calls in the thread of the store.
    """

    def __init__(self, launch: Launch, limits: Limits) -> None:
        super().__init__()
        self.rank, self.size = launch.rank, launch.size
        self._launch, self._limits = launch, limits
        self._hosts: list[str] = []  # by rank; none before all have joined
        self._absent: list[int] = []
        self._signs = Signs()
        self._end = End(self.stop)
        self._line = Line(limits.beat, self._beat, self._lost)
        self._watchdog = Watchdog(self.rank, limits, self._end)
        self._written = self._shown = self._beats = 0  # bytes, of this rank and of all; signs of life
        self._counting = threading.Lock()

    # --- what a conversion uses

    def agree(self, view: Mapping[str, str]) -> None:
        if self.rank:
            self._line.post({f"view/{self.rank}": json.dumps(view)})
            self.hear("agreed")
            return
        problems: dict[str, list[str]] = {}
        for rank, text in enumerate(self._hear([f"view/{rank}" for rank in range(1, self.size)]), start=1):
            other = json.loads(text)
            differing = [what for what in view if other.get(what) != view[what]]
            if differing:
                problems.setdefault(", ".join(differing), []).append(f"{rank} ({self._hosts[rank]})")
        if problems:
            raise ConversionError(*(
                f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)} and rank 0 ({self._hosts[0]}) see different sources: "
                f"{what}; give every node the same files (sizes, times, contents; best on one shared filesystem), "
                "release and options"
                for what, ranks in problems.items()
            ))  # fmt: skip
        self.tell("agreed")

    def tell(self, key: str, value: str = "") -> None:
        if self.rank == 0:
            self._line.post({key: value})

    def hear(self, key: str) -> str:
        return self._hear([key])[0]

    def gather(self, key: str) -> None:
        if self.rank:
            self._line.post({f"{key}/{self.rank}": ""})
        else:
            self._hear([f"{key}/{rank}" for rank in range(1, self.size)])

    def check(self) -> None:
        if self._end.failure is not None:
            raise Ended

    def count(self, nbytes: int) -> None:
        with self._counting:
            self._written += nbytes

    def stuck(self) -> bool:
        text = f"was interrupted, but waits for a read or write that does not end; {CONTINUES}"
        self._fail(Failure(self.rank, self._from(self.rank, text)), tell=True)
        return not self._end.settled  # rank 0 alone at the end: there is nobody to be told

    def settle(self) -> None:
        self._end.settled = True

    def _hear(self, keys: Sequence[str]) -> list[str]:
        while True:
            self.check()
            heard = self._line.ask(keys, _NO_LIMIT, unless=lambda: self._end.failure is not None)
            if heard is not None:
                return heard

    # --- life of a rank

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

    def _join(self) -> None:
        if self.rank:
            _speak_as(f"rank {self.rank} on {socket.gethostname()}")
        deadline = time.monotonic() + self._limits.join
        store = rendezvous.connect(self._launch, self._limits, deadline)
        hosts = rendezvous.meet(store, self._launch, deadline)
        if hosts is None:
            if not (self.rank and store.has("failed")):
                self._refuse_to_begin(store)
            self._end.fail(Failure(*json.loads(store.get("failed")[0])))
        self._hosts = hosts or []
        self.hosts = len(set(self._hosts))
        self._line.open(store)
        self._watchdog.start(lambda: self._line.contact, self._unanswered)
        self.check()

    def _refuse_to_begin(self, store: Store) -> None:
        missing = rendezvous.absent(store, self.size)
        if self.rank:
            missing = missing[:1] if 0 in missing else []
        text = rendezvous.not_joined(missing, self.size, self._limits)
        if self.rank == 0:
            self._absent = missing
            store.set_first("failed", json.dumps([0, text]))
            self._line.open(store)
        self._end.fail(Failure(0, text, told=self.rank == 0))
        raise ConversionError(text)

    def leave(self) -> None:
        """Gives the other ranks a moment to hear how it ended."""
        self._end.noticed = True
        if self._end.failure is not None:
            _ignore_termination()
        if self._line.is_open and self.rank:
            self._line.post({f"left/{self.rank}": ""})
            self._line.wait(lambda: self._line.all_said, 2.0)
        elif self._line.is_open:
            self._line.post({"said": ""})
            dead = [*self._absent, *self._signs.silent(self._limits.missed)]
            others = [rank for rank in range(1, self.size) if rank not in dead]
            self._end.settled = True
            self._line.ask([f"left/{rank}" for rank in others], self._limits.farewell)
        self._line.close()
        self._watchdog.close()

    # --- its end

    def _outcome(self, error: BaseException) -> BaseException:
        """What this rank raises in the end, after it has told the others or been told: see outcome.TABLE."""
        interrupted = not isinstance(error, Exception)
        if interrupted and self._end.failure is None:
            self._find_cause()
        self._end.noticed = True
        cause = outcome.cause(error, self._end, self.rank)
        if cause in (Cause.PROBLEM, Cause.DEFECT, Cause.SIGNAL):
            self._fail(Failure(self.rank, sentence(error), told=True), tell=True)
        failure = self._end.failure
        if interrupted or self.rank == 0:
            _ignore_termination()  # the launcher ends all when one has ended; the reason must still get out
        assert failure is not None
        row, sentences = outcome.TABLE[cause], [self._from(self.rank, failure.text)]
        if self.rank == 0:
            says = row.first
            silent = [rank for rank in self._signs.silent(self._limits.late) if rank != failure.rank]
            # What may lie behind an interruption on its node.
            sentences = [failure.text, *(self._from(rank, _DEAD) for rank in silent[:1])]
        else:
            spoken = failure.told and self._line.ask(["said"], self._limits.farewell) is not None
            says = row.spoken_for if spoken else row.alone
        return outcome.raised(says, error, sentences)

    def _find_cause(self) -> None:
        """A launcher terminates all ranks when one has died: waits a few beats for the one that is silent."""
        if not self._line.is_open:
            return
        missed = self._limits.missed
        self._line.wait(
            lambda: self._end.failure is not None or bool(self._signs.silent(missed)), self._limits.search(self.rank)
        )
        silent = self._signs.silent(missed)
        if self._end.failure is None and silent:
            self._fail(self._dead(silent[0]), tell=self.rank == 0)

    def _from(self, rank: int, text: str) -> str:
        if text.startswith("rank "):
            return text
        host = socket.gethostname() if rank == self.rank else "an unknown host"
        host = self._hosts[rank] if rank < len(self._hosts) else host
        return f"rank {rank} of {self.size} on {host}: {text}"

    def _dead(self, rank: int) -> Failure:
        return Failure(rank, self._from(rank, f"{_DEAD}; {CONTINUES}"), told=rank != 0)

    def _fail(self, failure: Failure, tell: bool = False) -> None:
        """The first failure counts. Stops the work of this rank, and of the others if they are to be told."""
        if self._end.fail(failure) and tell:
            self._line.post_first("failed", json.dumps([failure.rank, self._from(failure.rank, failure.text)]))
        self._line.wake()

    def _lost(self) -> None:
        text = f"the connection is lost, it was killed or its node is down; {CONTINUES}"
        self._fail(Failure(0, self._from(0, text), told=False))

    def _unanswered(self) -> None:
        text = f"rank 0 ({self._hosts[0]}) has not answered for {self._limits.silence:.0f} s; {CONTINUES}"
        self._fail(Failure(0, self._from(self.rank, text), told=False))

    # --- in the thread of the store

    def _beat(self, store: Store) -> None:
        """A sign of life. Then, whether another rank has failed, who is alive, and how far they are."""
        self._beats, written = self._beats + 1, self._written
        store.set(f"alive/{self.rank}", f"{self._beats} {written}")
        if not self._hosts:
            return  # the job has not begun, and ends
        if self._end.failure is None and not self._end.settled and store.has("failed"):
            rank, text = json.loads(store.get("failed")[0])
            self._fail(Failure(rank, text))
        watched = range(1, self.size) if self.rank == 0 else (0,)
        signs = store.get(*(f"alive/{rank}" for rank in watched))
        for rank, sign in zip(watched, signs, strict=True):
            self._signs.note(rank, sign)
        if self._end.settled:
            return
        if self.rank == 0:
            self._show(written + sum(int(sign.split()[1]) for sign in signs))
        silent = self._signs.silent(self._limits.silence)
        if silent and self._end.failure is None:
            self._fail(self._dead(silent[0]), tell=self.rank == 0)

    def _show(self, total: int) -> None:
        if total > self._shown:
            advance, self._shown = total - self._shown, total
            self._advance(advance)


def _speak_as(name: str) -> None:
    """Errors of another rank than 0 say whose they are; what it would tell of its progress is rank 0's to tell."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    root = logging.getLogger()
    root.setLevel(logging.ERROR)
    for handler in root.handlers:
        handler.setFormatter(logging.Formatter(f"{name}: %(levelname)s: %(message)s"))


def _ignore_termination() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
