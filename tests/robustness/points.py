"""One point: a run with one fault, what it may leave, and a second run that has to end as if nothing had been."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.robustness import states
from tests.robustness.access import Access, taken_over
from tests.robustness.cases import Case, Ground
from tests.robustness.faults import DELAY, FAIL, KILL, SHORTEN, TEAR, Fault
from tests.robustness.sources import tree
from tests.robustness.warm import Ended

ERRORS = (
    errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ESTALE, errno.EINTR, errno.EOPNOTSUPP,
    errno.ENOSYS, errno.EINVAL,
)  # fmt: skip
STAYING = (errno.EIO, errno.ENOSPC, errno.ESTALE, errno.EACCES)  # and so do full disks and dead servers
SERVER = (errno.EIO, errno.ESTALE)  # from a moment on, of all that is read from it
_LOOKS = (errno.EIO, errno.EACCES, errno.ESTALE, errno.EINTR)  # what looking at something fails with
_OF = {
    "read": (errno.EIO, errno.ESTALE, errno.EINTR, errno.EINVAL), "stat": _LOOKS, "access": _LOOKS,
    "list": (*_LOOKS, errno.EMFILE), "open": (*ERRORS, errno.EMFILE), "lock": (*ERRORS, errno.ENOLCK),
    "close": (errno.EIO, errno.EINTR, errno.ENOSPC, errno.EDQUOT), "dup": (errno.EMFILE, errno.EINTR),
    "map": (errno.ENOMEM, errno.EACCES, errno.EINVAL),
    "direct": (errno.EIO, errno.ESTALE, errno.EINTR, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOMEM),
}  # fmt: skip
UNNOTED = "setxattr "  # the call by which OUT is noted as finished; one that sets an access list has another name
_TOTALS = ("changing", "any")
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES)  # what an fsync of a folder may always say
_NOTHING_ELSE = (errno.EIO, errno.ENOSPC, errno.ESTALE)  # no call is answered otherwise after these
_UNTOLD = ("it cannot be opened",)  # by safetensors, of which "No such file" is all that it says


def faults(counts: Mapping[str, int]) -> Iterator[Fault]:
    """Every point of a run that makes so many calls of each kind."""
    for kind, count in counts.items():
        if kind in _TOTALS:
            continue
        for number in range(1, count + 1):
            for value in _OF.get(kind, ERRORS):
                yield Fault(kind, number, FAIL, value)
            if kind in ("read", "direct", "write"):
                yield Fault(kind, number, SHORTEN)
                yield Fault(kind, number, SHORTEN, sticky=True)
            if kind == "write":
                yield Fault(kind, number, TEAR)
    for number in range(1, counts["changing"] + 1):
        yield Fault("changing", number, KILL)
        yield Fault("changing", number, DELAY, 20)
        for value in STAYING:
            yield Fault("changing", number, FAIL, value, sticky=True)
    for kind in ("read", "direct", "open", "stat"):
        count = counts.get(kind, 0)
        for number in sorted({1 + count * part // 8 for part in range(8)}) if count else ():
            for value in SERVER:
                yield Fault(kind, number, FAIL, value, sticky=True)


@dataclass(frozen=True)
class Result:
    """How a point ended, what is wrong about it, the digest of what it left, and whether that was run again."""

    how: str
    problem: str | None = None
    state: str = ""
    rerun: bool = False


def wrong(ground: Ground, case: Case, fault: Fault, known: set[str] | None = None) -> Result:
    """`known`: the states from which a rerun ended right; grows. None: each is run again."""
    if case.move is not None:
        from tests.robustness import moving

        return moving.wrong(ground, case, fault, known)
    if case.refused:
        from tests.robustness import refused

        return refused.wrong(ground, case, fault, known)
    old = ground.reset(case)
    ended = ground.warm.run(case.line(ground.place), fault, change=case.change)
    if not ended.hit:
        return Result("not reached")
    state, rerun = "", False
    problem = _after(ground, case, fault, ended, old)
    if problem is None and case.out:
        hit = ended.hit if ended.code == 0 else ""
        state = f"{states.digest(ground.place)} {hit.startswith(UNNOTED)}"
        rerun = known is None or f"{case.name} {state}" not in known
        problem = again(ground, case, hit) if rerun else None
        state = f"{case.name} {state}"
    if problem is None:
        if known is not None and state:
            known.add(state)
        return Result(how(ended), None, state, rerun)
    said = f"{case.name}: {fault} ({ended.hit}): {problem}\n    it said: {ended.text.strip()[-600:]}"
    return Result(how(ended), said, rerun=rerun)


def how(ended: Ended) -> str:
    if ended.code is None:
        return "hung"
    return "killed" if ended.code == -9 else "went on" if ended.code == 0 else "one sentence"


def _after(ground: Ground, case: Case, fault: Fault, ended: Ended, old: dict[str, str] | None) -> str | None:
    """What is wrong after the run with the fault."""
    if ended.code not in (0, case.trouble, -9):
        return f"exit {ended.code}"
    if "Traceback" in ended.text:
        return "a traceback"
    if damage := ground.damage():
        return damage
    if ended.code == case.trouble and (problem := unsaid(ended, ground.root, fault)):
        return problem
    if ended.code == 0 and is_lost(fault, ended.hit):
        return "it went on after a failed sync"
    problem = after_output(ground, case, ended.code, ended.text, old)
    return problem or after_access(ground, case, ended.text, fault.action == FAIL, old)


def after_access(ground: Ground, case: Case, text: str, failed: bool, old: dict[str, str] | None) -> str | None:
    """What is wrong with who may use what stands at OUT, where something stood there before."""
    stands = ground.stands()
    if ground.access is None or stands is None:
        return None
    replaced = tree(stands) != old or old == ground.expected[case.name]
    return taken_over(ground.access, Access.of(stands), text, failed and replaced)


def is_lost(fault: Fault, hit: str) -> bool:
    """Whether a sync has failed, behind which nothing says that what was written is on the disk.

    Python makes an interrupted one once more. A filesystem may know no syncs of folders, or let no one read them.
    """
    name = hit.partition(" ")[0]
    if fault.action != FAIL or name not in ("fsync", "fdatasync", "fsyncdir") or fault.value == errno.EINTR:
        return False
    return not (name == "fsyncdir" and fault.value in _NO_SYNC)


def after_output(ground: Ground, case: Case, code: int, text: str, old: dict[str, str] | None) -> str | None:
    """What is wrong with OUT."""
    if case.out is None:
        return None
    out, partial = ground.place / "out", ground.place / "out.partial"
    there, expected = tree(out) if out.exists() else None, ground.expected[case.name]
    if there == expected:
        if old != expected and code == case.trouble and "nothing that was there is changed" in text:
            return "it says that nothing is changed, and OUT is the new one"
    elif code == 0:
        return "exit 0 without a right OUT"
    elif there is None and old is not None:
        if (case.exchange and code == case.trouble) or tree(partial / "replaced") != old:
            return "what stood at OUT is gone"
    elif there != old:
        return f"OUT is neither whole nor what it was: {sorted(there or ())}"
    return None


def unsaid(ended: Ended, root: Path, fault: Fault) -> str | None:
    """What the sentence lacks: it is one, and names the file that the call failed on, or a folder that it stands in,
    and says why, where that is an error which nothing can answer. Python's access() and safetensors keep it to
    themselves.

    Where all later calls fail too, it may be the file of one of these.
    """
    lines = [line for line in ended.text.splitlines() if line.startswith("error:")]
    if len(lines) != 1:
        return f"{len(lines)} sentences"
    whole = ended.hit.partition(" ")[2].removesuffix(" (deleted)")
    path = Path(whole.removesuffix(".new"))
    names = {whole, str(path), *(str(above) for above in path.parents if above != root and root in above.parents)}
    if path.name == "checkpoint" and path.parent.name.endswith(".partial"):  # which becomes OUT
        names.add(str(path.parent).removesuffix(".partial"))
    # A folder of the output is a name that the user gave, with what is added to it.
    said = [word.rstrip(".'\"`") for word in re.findall(r"/[^\s:;,()]+", lines[0])]
    if fault.sticky and any(word.startswith(str(root)) for word in said):
        return None
    if not any(word in names or path.name in Path(word).parts for word in said):
        return "the sentence does not name the file"
    why = fault.action == FAIL and not fault.sticky and fault.value in _NOTHING_ELSE and fault.kind != "access"
    reasons = (os.strerror(fault.value), *_UNTOLD)
    return "the sentence does not say why" if why and not any(reason in lines[0] for reason in reasons) else None


def again(
    ground: Ground, case: Case, hit: str = "", expected: dict[str, str] | None = None,
    run: Callable[[], Ended] | None = None,
) -> str | None:  # fmt: skip
    """What is wrong after the same command without a fault, which is to give `expected`, or what the case gives.

    `hit`: the call that failed in a run that has ended well. Where it could not note whose OUT is, the same command is
    refused. `run`: how it is run, where not by one process.
    """
    kept = ground.access is not None and (stood := ground.stands()) is not None and Access.of(stood) == ground.access
    ended = run() if run else ground.warm.run(case.line(ground.place), change=case.change)
    unnoted = hit.startswith(UNNOTED) or (hit and (case.unnoted or not ground.has_attributes))
    refused = unnoted and ended.code == 1 and f"{ground.place / 'out'} exists and is" in ended.text
    if ended.code != 0 and not refused:
        return f"the rerun ended with exit {ended.code}: {ended.text.strip()[-400:]}"
    if tree(ground.place / "out") != (expected or ground.expected[case.name]):
        return "the rerun's bytes differ"
    partial = ground.place / "out.partial"
    if partial.exists() and not (refused and case.unnoted and tree(partial).keys() <= {"lock"}):
        return "the rerun left OUT.partial"
    if kept and (now := Access.of(ground.place / "out")) != ground.access:
        return f"after the rerun others may do other things with OUT: {now}, before {ground.access}"
    return ground.damage()
