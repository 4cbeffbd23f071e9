"""A command as a process: logging, signals, and every way to end as a sentence and an exit code. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from weights_conversion.errors import ConversionError
from weights_conversion.errors.text import one_line
from weights_conversion.files.fileio import failed
from weights_conversion.launch import saying, signals


def script(main: Callable[[], int]) -> NoReturn:
    """Runs `main` as the whole life of a process, which signals end with a sentence; exits with the code it returns."""
    saying.open_standard_streams()
    signals.begin()
    code = main()
    saying.flush()
    os._exit(code)  # not by way of the interpreter's end, which waits for threads that a filesystem may hold for ever


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
        signals.stopped(code)
        saying.flush()
        os._exit(code)


def _outcome(work: Callable[[], str]) -> int:
    """Prints the report that `work` returns, and turns what can go wrong into sentences and an exit code."""
    from weights_conversion.launch.distributed import SaidElsewhere

    try:
        with signals.Signals(_give_up):
            report = work()
    except SaidElsewhere as ended:
        return ended.code
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in (__name__.partition(".")[0], ""):
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
        return signals.stopped(130)
    except signals.Terminated:
        return signals.stopped(143)
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
