"""What both command lines share: option spellings, common options, logging, exit codes. Imports no torch."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from weights_conversion import arguments, saying
from weights_conversion.errors import ConversionError
from weights_conversion.fileio import failed
from weights_conversion.text import one_line


def option(parser: Any, *names: str, **settings: Any) -> None:
    """Adds an option under its documented spelling, and silently under the other of dashes and underscores."""
    extra = []
    for name in names:
        body = name[2:]
        for other in ("--" + body.replace("-", "_"), "--" + body.replace("_", "-")):
            if other not in names and other not in extra:
                extra.append(other)
    action = parser.add_argument(*names, *extra, **settings)
    action.option_strings_shown = list(names)


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows each option in its documented spelling only."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = getattr(action, "option_strings_shown", None)
        if shown is None:
            return super()._format_action_invocation(action)
        if action.nargs == 0:
            return ", ".join(shown)
        default = action.dest.upper()
        return f"{', '.join(shown)} {self._format_args(action, default)}"

    def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any) -> str:
        shown = []
        for action in actions:
            if hasattr(action, "option_strings_shown"):
                kept, action.option_strings = action.option_strings, action.option_strings_shown
                shown.append((action, kept))
        try:
            return super()._format_usage(usage, actions, groups, prefix)
        finally:
            for action, kept in shown:
                action.option_strings = kept


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def iteration(text: str) -> int | str:
    """A number that names iter_0000000 or a later one, or "release"."""
    if text != "release" and not (text.isascii() and text.isdecimal() and len(text) <= 12):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor release")
    return text if text == "release" else int(text)


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def cores() -> int:
    """Cores that this process may use (a batch job's share, not the machine's), at most 4."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(available, 4))


def window(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


# Flags that state a value which a Megatron checkpoint has lost, by ModelConfig field.
FIELDS: dict[str, Callable[[str], Any]] = {
    "rope_theta": positive_float,
    "rope_scaling_factor": positive_float,
    "layernorm_epsilon": positive_float,
    "max_position_embeddings": positive,
}


def add_fields(parser: argparse.ArgumentParser) -> None:
    values = parser.add_argument_group(
        "values that a Megatron checkpoint may have lost", "they outrank its manifest and its args"
    )
    for name, kind in FIELDS.items():
        option(values, f"--{name}", type=kind, metavar="X", help=f"{name} of the model")
    option(
        values, "--sliding_window_size", type=window, metavar="N", help="window of mistral's attention; 0: no window"
    )


def stated_fields(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Any]:
    """The ModelConfig fields that the user has stated."""
    fields = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    if args.sliding_window_size is not None:
        if args.model != "mistral":
            parser.error(f"--sliding_window_size is mistral's, {args.model} has none")
        fields["sliding_window"] = args.sliding_window_size or None
    return fields


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(began=time.monotonic())
    work = parser.add_argument_group("the work")
    option(
        work, "--dtype", type=arguments.dtype, choices=("keep", "bfloat16", "float16", "float32"), default="keep",
        help="type of the written weights, or bf16, fp16, fp32 (default: as they are)",
    )  # fmt: skip
    option(work, "--dry-run", action="store_true", help="print the plan (files, bytes, memory, disk) and stop")
    option(work, "--overwrite", action="store_true", help="replace an existing output")
    option(work, "--workers", type=positive, default=cores(), help="threads (default: cores, at most 4)")
    option(
        work, "--verify", action="store_true",
        help="afterwards, prove the output: weights bit by bit, configs, and a forward pass, against the source; what "
        "fails is named OUT.unverified",
    )  # fmt: skip
    option(work, "--json", type=arguments.path, metavar="FILE", help="write the report, or what was wrong, as JSON")
    option(work, "--checksums", action="store_true", help="write checksums.sha256 into the output")
    option(
        work, "--allow-inconsistent", action="store_true",
        help="where ranks hold different values of one parameter, take rank 0's instead of refusing",
    )  # fmt: skip
    prediction = parser.add_argument_group("prediction of the time, with --dry-run")
    option(
        prediction, "--ranks", type=positive, metavar="R",
        help="with --dry-run: predict the time on R ranks of torchrun or srun (default: some numbers of ranks)",
    )  # fmt: skip
    option(
        prediction, "--rank-rate", type=positive_float, metavar="GB/s",
        help="for the prediction: what one rank converts, as the report of a one-process run says (default: 1)",
    )  # fmt: skip
    option(
        prediction, "--filesystem-bandwidth", type=positive_float, metavar="GB/s",
        help="for the prediction: how fast the filesystem is written while as much is read from it",
    )  # fmt: skip


RUN_OPTIONS = (
    "dtype", "dry_run", "overwrite", "workers", "allow_inconsistent", "checksums", "verify", "ranks", "rank_rate",
    "filesystem_bandwidth", "began",
)  # fmt: skip


def check_common(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with exit code 2 where what `add_common` has added does not fit together."""
    if args.json is not None and not args.json.absolute().parent.is_dir():
        parser.error(f"--json {args.json}: its folder does not exist")
    given = [name for name in ("ranks", "rank_rate", "filesystem_bandwidth") if getattr(args, name) is not None]
    if given and not args.dry_run:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        parser.error(f"{options} predicts a time with --dry-run; start a job of many ranks with torchrun or srun")


def run_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of engine.run.RunOptions, from what `add_common` has added."""
    return {name: getattr(args, name) for name in RUN_OPTIONS if getattr(args, name) is not None}


STOPPED = {
    130: "interrupted: the same command continues where this one stopped",
    143: "terminated: the same command continues where this one stopped",
}


class Terminated(BaseException):
    """SIGTERM, as a scheduler sends it before it kills."""


STUCK_SECONDS = 12.0  # after a signal, in which a read or write may still come back


_begun = False  # whether `_Signals` has been entered in this process


def script(main: Callable[[], int]) -> NoReturn:
    """Runs `main` as the whole life of a process, which signals end with a sentence; exits with the code it returns.

    Before the work begins (torch takes a moment to be imported) a signal ends the process at once, in it `_Signals`
    says when, and after it none does: what has been converted stands, and the exit code says so.
    """
    global _begun
    _begun = False
    saying.open_standard_streams()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _outside)
    code = main()
    saying.flush()
    os._exit(code)  # not by way of the interpreter's end, which waits for threads that a filesystem may hold for ever


def _outside(signum: int, frame: FrameType | None) -> None:
    if not _begun:
        code = 130 if signum == signal.SIGINT else 143
        saying.say(STOPPED[code])
        saying.flush()
        os._exit(code)


class _Signals:
    """Within its block, SIGINT and SIGTERM (where they are not ignored) end the run from wherever it is, once.

    What they raise is dropped by Python where it hits a destructor or a callback; then it is raised again. A thread in
    a read or write that never ends, as of a filesystem whose server is gone, would keep the process for ever: after
    STUCK_SECONDS `stuck` is called with the exit code.
    """

    def __init__(self, stuck: Callable[[int], None]) -> None:
        self._asked = self._noticed = 0  # the signal, as the main thread and as the watching one have seen it
        self._left = threading.Event()
        self._stuck = stuck
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        global _begun
        if threading.current_thread() is not threading.main_thread():
            return
        _begun = True
        self._hook, sys.unraisablehook = sys.unraisablehook, self._dropped
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            if number == signal.SIGALRM or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._stop)
        self._news, end = os.pipe()
        os.set_blocking(end, False)
        self._wakeup = signal.set_wakeup_fd(end, warn_on_full_buffer=False), end
        threading.Thread(target=self._watch, daemon=True, name="signals").start()

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._before:
            before, end = self._wakeup
            signal.set_wakeup_fd(before, warn_on_full_buffer=False)
            os.close(end)  # which the watching thread reads as the end
            signal.setitimer(signal.ITIMER_REAL, 0)
            sys.unraisablehook = self._hook
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        if (signum == signal.SIGALRM) == bool(self._asked):
            self._asked = self._asked or signum
            raise KeyboardInterrupt if self._asked == signal.SIGINT else Terminated

    def _watch(self) -> None:
        # The C library's handler writes here even while the main thread is in a call that does not come back, and
        # Python's own handler has to wait for it.
        with os.fdopen(self._news, "rb", buffering=0) as news:  # to the end, for Python complains of a closed one
            deadline = float("inf")
            while time.monotonic() < deadline and not self._left.is_set():
                if select.select([news], [], [], 0.5)[0]:
                    seen = [number for number in news.read(64) if number in (signal.SIGINT, signal.SIGTERM)]
                    if seen and not self._noticed:
                        self._noticed, deadline = seen[0], time.monotonic() + STUCK_SECONDS
            if not self._left.is_set():
                self._stuck(130 if self._noticed == signal.SIGINT else 143)
            self._left.wait()

    def _dropped(self, unraisable: Any) -> None:
        if self._asked and isinstance(unraisable.exc_value, (KeyboardInterrupt, Terminated)):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
        else:
            self._hook(unraisable)


def run(work: Callable[[], str]) -> int:
    """Runs `work`, on all ranks of a torchrun or srun job together, and says how it ended; returns the exit code."""
    from weights_conversion.launch import distributed

    saying.open_standard_streams()
    saying.log_to_stderr()
    return distributed.run(_outcome, work)


def _give_up(code: int) -> None:
    """Ends a process that was interrupted and cannot come to its end; in a job of ranks, after all have been told."""
    from weights_conversion.launch import distributed

    if not distributed.current().stuck():
        saying.say(STOPPED[code])
        saying.flush()
        os._exit(code)


def _outcome(work: Callable[[], str]) -> int:
    """Prints the report that `work` returns, and turns what can go wrong into sentences and an exit code."""
    from weights_conversion.launch.distributed import SaidElsewhere

    try:
        with _Signals(_give_up):
            report = work()
    except SaidElsewhere as ended:
        return ended.code
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in (__package__, ""):
            raise
        saying.say(
            f"error: {sys.executable} has no {error.name}; activate the environment that has it, or install it with "
            f"'{sys.executable} -m pip install {error.name}'"
        )
        return 1
    except ConversionError as error:
        if error.report:
            saying.report(error.report)
        saying.say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        saying.say(STOPPED[130])
        return 130
    except Terminated:
        saying.say(STOPPED[143])
        return 143
    except MemoryError:
        saying.say("error: there is not enough memory; fewer --workers need less")
        return 1
    except OSError as error:
        saying.say(
            f"error: {one_line(failed(error))}; nothing that was there is changed, and once the cause is mended "
            "the same command continues where this one stopped"
        )
        return 1
    except RecursionError:
        saying.say("error: something in the source is nested too deeply to be a model's")
        return 1
    saying.report(report)
    return 0
