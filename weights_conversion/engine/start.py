"""OUT.partial as a run begins: made by rank 0, or left by an earlier run, and found by the other ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from weights_conversion.engine import identity
from weights_conversion.engine.job import Job
from weights_conversion.engine.sharing import to_ranges
from weights_conversion.errors import ConversionError
from weights_conversion.launch import distributed
from weights_conversion.layouts.placement import TensorRef, Written
from weights_conversion.output import assembly, beginning, descriptors, place
from weights_conversion.output.journal import Journal
from weights_conversion.output.partial import Partial


@dataclass
class Output:
    """OUT.partial, laid out: this rank's hold on it, where each tensor begins, and what is finished already.

    Not `durable`: a power cut may still undo the layout, so that nothing says yet by which run it can be continued.
    """

    hold: Partial
    offsets: Mapping[TensorRef, int]
    journal: Journal
    done: dict[int, list[Written]]
    durable: bool = True


def lay_out(job: Job, ranks: distributed.Ranks, run_digest: str, chunks: int, overwrite: bool) -> Output:
    """Rank 0 makes the files; the others find them, and hear from it what is left to be done."""
    refs = [ref for target in job.targets for ref in target.refs]
    if ranks.rank:
        said = json.loads(ranks.hear("prepared"))
        done: dict[int, list[Written]] = {number: [] for start, stop in said["done"] for number in range(start, stop)}
        hold, offsets = assembly.join_layout(job.out, job.targets, run_digest)
        if identity.places(offsets) != said["places"]:
            hold.close()
            raise ConversionError(
                f"{place.partial_folder(job.out)} is not what rank 0 made; the output must be one folder on a "
                "filesystem that all nodes share"
            )
        return Output(hold, offsets, Journal(hold.notes, refs, ranks.rank, hold.journal), done)
    hold = beginning.prepare(job.out, run_digest, overwrite)
    try:
        done: dict[int, list[Written]] = {}
        durable = True
        if hold.resume and (offsets := _found(hold, job)) is not None:
            journal = Journal(hold.notes, refs, 0, hold.journal)
            done = {n: [] for n in range(chunks)} if hold.complete else journal.load()
            job.report.notes.append(f"continued an interrupted run: {len(done)} of {chunks} parts were good")
        else:
            offsets, durable = assembly.lay_out(hold, job.targets), ranks.size > 1
            if durable:  # the other ranks know it by its digest, which is not there before
                assembly.sync_layout(hold, job.targets)
                hold.note_digest(run_digest)
            journal = Journal(hold.notes, refs, 0, hold.journal)
        if ranks.size > 1:
            hold.share()
        ranks.tell("prepared", json.dumps({"done": to_ranges(sorted(done)), "places": identity.places(offsets)}))
    except BaseException:
        hold.close()
        raise
    return Output(hold, offsets, journal, done, durable)


def _found(hold: Partial, job: Job) -> dict[TensorRef, int] | None:
    """The layout that an earlier run made; None where it is damaged, and new folders have taken its place."""
    try:
        return assembly.find_layout(hold, job.targets)
    except (OSError, ConversionError) as error:
        if isinstance(error, OSError) and not descriptors.is_no_file(error):
            raise  # which says nothing of the layout: hours of work may stand there
        if hold.complete:
            raise ConversionError(
                f"{hold.out} was finished by the same command, and is not whole any more ({error}); --overwrite makes "
                "it again"
            ) from error
        beginning.start_over(hold, f"is damaged ({error})")
        hold.open_folders()
        return None
