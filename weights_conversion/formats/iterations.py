"""The iterations in the root of a Megatron checkpoint: their folders, the tracker, and which one is meant."""

from __future__ import annotations

import re
from pathlib import Path

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.formats.dist_index import METADATA

TRACKER = "latest_checkpointed_iteration.txt"
MODEL_FILES = ("model_optim_rng.pt", "model_rng.pt")  # the latter beside a distributed optimizer's optim.pt
_FOLDER = re.compile(r"release|iter_([0-9]{7,12})")
_SHOWN = 8


def number_of(name: str) -> int | str | None:
    """The iteration that a folder's name says, or None."""
    match = _FOLDER.fullmatch(name)
    return None if match is None else name if match[1] is None else int(match[1])


def is_rank_folder(folder: Path) -> bool:
    """Whether it is one rank's: mp_rank_00 and the like, with its model file."""
    return folder.name.startswith("mp_rank_") and any(fileio.is_file(folder / name) for name in MODEL_FILES)


def holds_iteration(folder: Path) -> bool:
    """Whether ranks' folders or an index of torch.distributed.checkpoint lie in `folder` itself.

    Raises OSError where it may not be read.
    """
    try:
        with fileio.named("looking into", folder):
            return fileio.is_file(folder / METADATA) or any(
                path.suffix == ".distcp" or (path.name.startswith("mp_rank_") and fileio.is_folder(path))
                for path in folder.iterdir()
            )
    except fileio.ABSENT:
        return False


def iterations(root: Path) -> list[str]:
    """The names of the iterations' folders in `root`, in order; folders that hold nothing do not count."""
    try:
        with fileio.named("looking into", root):
            names = sorted(path.name for path in root.iterdir() if number_of(path.name) is not None)
    except fileio.ABSENT:
        return []
    return [name for name in names if _may_hold(root / name)]


def _may_hold(folder: Path) -> bool:
    """`holds_iteration`, and what may not be read: without it, another iteration would be the only one."""
    try:
        return holds_iteration(folder)
    except OSError:
        return True


def verl_step(root: Path, load_iters: int | str | None) -> Path | None:
    """verl's folder of the weights at the step that is meant: global_step_N/actor/dist_ckpt; None where it has none."""
    number = load_iters if load_iters is not None else _tracked(root / TRACKER)
    folder = root / f"global_step_{number}" / "actor" / "dist_ckpt"
    return folder if holds_iteration(folder) else None


def _verl_steps(root: Path) -> list[str]:
    """The names of the steps that verl_step can give."""
    return sorted(path.parent.parent.name for path in root.glob("global_step_*/actor/dist_ckpt"))


def nemo_rl_step(root: Path, load_iters: int | str | None) -> Path | None:
    """NeMo-RL's folder of weights, step_N/policy/weights, at the step that is meant; None where there is none.

    Its iteration is 0 in every step, so the step is what --load_iters names.
    """
    step = root if load_iters is None else root / f"step_{load_iters}"
    folder = step / "policy" / "weights"
    return folder if iterations(folder) else None


def nemo_weights(root: Path) -> Path | None:
    """NeMo 2's folder of weights, beside its context/; None where `root` holds none."""
    folder = root / "weights"
    return folder if fileio.is_folder(root / "context") and holds_iteration(folder) else None


def named(names: list[str]) -> str:
    """Names for a sentence, shortened."""
    if len(names) <= _SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[: _SHOWN - 1])} ... {names[-1]} ({len(names)} in all)"


def find_iteration(root: Path, load_iters: int | str | None) -> tuple[Path, int | str]:
    """The folder of iteration `load_iters`, or of the one that the tracker names, or of the only one that is there.

    A folder that is an iteration's itself, whatever its name, is returned as it is.
    """
    if not fileio.is_folder(root):
        raise ConversionError(f"{root} is not a folder, where one with a Megatron checkpoint's {TRACKER} was expected")
    iteration, said = load_iters, "--load_iters"
    if iteration is None and fileio.is_there(root / TRACKER):
        iteration, said = _tracked(root / TRACKER), TRACKER
    if iteration is None:  # only now is the root listed, which may be closed to others, with its iterations open
        present = iterations(root)
        if not present and holds_iteration(root):
            return root, root.name
        if len(present) == 1:
            return root / present[0], number_of(present[0]) or 0
        raise ConversionError(
            f"{root} holds no {TRACKER}, so nothing says which iteration is meant (it has: "
            f"{named(present) or 'none'}); --load_iters names one"
        )
    folder = root / (iteration if isinstance(iteration, str) else f"iter_{iteration:07d}")
    if not fileio.is_folder(folder):
        there = iterations(root) or _verl_steps(root)
        raise ConversionError(
            f"{said} names {folder.name}, which {root} does not hold (it has: {named(there) or 'none'}); "
            + ("--load_iters names another iteration" if there else "copy it there, or name another folder")
        )
    return folder, iteration


def _tracked(tracker: Path) -> int | str:
    """What the tracker says: release, or a number; imports by Megatron-Bridge leave 0."""
    try:
        with fileio.open_file(tracker, noted=False) as file:  # training may move it on
            text = file.read(100).decode("utf-8").strip()
    except (OSError, ValueError) as error:
        why = f" ({error.strerror})" if isinstance(error, OSError) else ""
        raise ConversionError(
            f"{tracker} cannot be read{why}, so nothing says which iteration is meant; --load_iters names one"
        ) from error
    if text != "release" and not re.fullmatch(r"[0-9]{1,12}", text):
        present = iterations(tracker.parent)
        # It may be a link to anything that its user can read, of which nothing is printed.
        says = f"says {text!r}" if re.fullmatch(r"[\w.+-]{0,24}", text) else "holds other text"
        raise ConversionError(
            f"{tracker} {says}, where 'release' or a number was expected"
            + (f"; --load_iters names one of: {named(present)}" if present else "")
        )
    return text if text == "release" else int(text)
