"""What a folder's mode and its access lists let others do: nothing more than before, and no work in vain."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from access_lists import ITS_GROUP, MASK, NOBODY, OTHER, OWNER, USER, access_list
from neighbours import GROUP, A, B, Place, as_user, contents

from weights_conversion.output import finishing

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be several users")


def open_to(user: int) -> bytes:
    """rwx for the owner and for `user`, whatever the umask."""
    entries = ((OWNER, 7, NOBODY), (USER, 7, user), (ITS_GROUP, 5, NOBODY), (MASK, 7, NOBODY), (OTHER, 0, NOBODY))
    return access_list(*entries)


def give_default(folder: Path, user: int) -> None:
    try:
        os.setxattr(folder, "system.posix_acl_default", open_to(user))
    except (OSError, AttributeError) as error:
        pytest.skip(f"no access lists here: {error}")


def opened(paths: list[Path]) -> list[str]:
    """Which of these B can open, for reading, writing or to look into."""
    found = []
    for path in paths:
        for flags in (os.O_RDONLY, os.O_WRONLY):
            try:
                os.close(os.open(path, flags))
                found.append(f"{path.name} {flags}")
            except OSError:
                pass
    return found


def everything(folder: Path) -> list[Path]:
    return [folder, *folder.rglob("*")]


def lists(path: Path) -> dict[str, bytes]:
    return {name: os.getxattr(path, name) for name in os.listxattr(path) if "posix_acl" in name}


# --- default lists: the parent, an earlier OUT or B's own OUT.partial gives B all that is made there ------------------


def stops() -> None:
    """Before the small files are written, as a kill would."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    finishing.finish = stop


def test_nobody_enters_before_it_is_there(place: Place) -> None:
    place.mode(0o2775)
    give_default(place.folder, B)
    assert place.converts(umask=0o077, before=stops).code == 130
    assert len(everything(place.partial)) > 4
    assert as_user(B, 0, lambda: opened(everything(place.partial))) == (0, "[]")
    place.converts(umask=0o077).succeeded()
    place.is_right()


def test_it_ends_as_what_is_made_there(place: Place) -> None:
    """The parent's list counts as it does for mkdir and open, neither more nor less."""
    place.mode(0o2775)
    give_default(place.folder, B)
    plain = place.folder / "plain"

    def makes() -> None:
        plain.mkdir()
        (plain / "file").write_text("")

    assert as_user(A, 0o077, makes)[0] == 0
    place.converts(umask=0o077).succeeded()
    for mine, theirs in ((place.out, plain), (place.out / "conversion_manifest.json", plain / "file")):
        assert (mine.stat().st_mode, lists(mine)) == (theirs.stat().st_mode, lists(theirs))


@pytest.mark.parametrize("whole", [False, True], ids=["empty", "overwrite"])
def test_a_private_out_stays_private(whole: bool, place: Place) -> None:
    place.mode(0o2775)
    if whole:
        place.converts().succeeded()
    else:
        place.out.mkdir()
        os.chown(place.out, A, GROUP)
    place.out.chmod(0o700)
    before = lists(place.out)
    give_default(place.folder, B)
    place.converts(*(["--overwrite"] if whole else []), umask=0o022).succeeded()
    place.is_right()
    assert place.out.stat().st_mode & 0o777 == 0o700
    assert lists(place.out) == before
    assert as_user(B, 0, lambda: opened(everything(place.out))) == (0, "[]")
    assert all(path.stat().st_mode & 0o077 == 0 for path in everything(place.out))


def test_a_copy_is_as_private_as_its_original(place: Place) -> None:
    place.mode(0o2775)
    give_default(place.folder, B)
    settings = place.source / "tokenizer_config.json"
    settings.write_text('{"bos_token": "<s>"}')
    settings.chmod(0o600)
    os.chown(settings, A, GROUP)
    place.converts().succeeded()
    copy = place.out / settings.name
    assert copy.stat().st_mode & 0o777 == 0o600
    assert as_user(B, 0, lambda: opened([copy])) == (0, "[]")


def test_a_partial_of_his_with_a_list(place: Place) -> None:
    place.mode(0o1777)
    place.partial.mkdir()
    give_default(place.partial, B)
    os.chown(place.partial, B, B)
    place.partial.chmod(0o777)
    place.converts(umask=0o077).refused("belongs to another user")
    assert list(place.partial.iterdir()) == []


def test_a_partial_of_ones_own_with_a_list(place: Place) -> None:
    """A's own, made by another tool: B could open it until now, and what is made in it is A's alone."""
    place.mode(0o2775)
    place.partial.mkdir()
    os.chown(place.partial, A, GROUP)
    give_default(place.partial, B)
    os.setxattr(place.partial, "system.posix_acl_access", open_to(B))
    assert place.converts(umask=0o077, before=stops).code == 130
    assert as_user(B, 0, lambda: opened(everything(place.partial))) == (0, "[]")
    place.converts(umask=0o077).succeeded()
    assert as_user(B, 0, lambda: opened(everything(place.out))) == (0, "[]")


# --- folders that may not be written ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o500, 0o555, 0o2550])
def test_a_folder_that_cannot_move_is_refused_first(mode: int, place: Place) -> None:
    place.mode(0o2775)
    place.converts().succeeded()
    before = contents(place.out)
    place.out.chmod(mode)
    place.converts("--overwrite", "--dry-run").refused("chmod u+w")
    place.converts("--overwrite").refused("chmod u+w")
    assert contents(place.out) == before
    assert not place.partial.exists()
    assert place.out.stat().st_mode & 0o7777 == mode


def test_read_only_folders_within_are_replaced(place: Place) -> None:
    place.mode(0o2775)
    place.converts().succeeded()
    (place.out / "release" / "mp_rank_00").chmod(0o500)
    (place.out / "release").chmod(0o500)
    place.converts("--overwrite").succeeded()
    place.is_right()


def test_an_empty_read_only_folder_is_filled(place: Place) -> None:
    place.mode(0o2775)
    place.out.mkdir()
    os.chown(place.out, A, GROUP)
    place.out.chmod(0o500)
    place.converts().succeeded()
    place.is_right()
    assert place.out.stat().st_mode & 0o777 == 0o500
