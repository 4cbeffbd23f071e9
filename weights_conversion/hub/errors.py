"""What went wrong at the hub, from the client's errors, and what the user can do about it."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
REFUSALS = {
    401: ("does not accept the token sent for", "{login}"),
    403: ("forbids", "change the permissions of your token, or request access at {page}"),
    429: ("takes no more requests for", "wait some minutes and run the same command again, or {login}"),
}


@dataclass(frozen=True)
class Failure:
    """`kind` is "final", or else the cache may serve: "offline" (as was asked for), "unreachable", "refused"."""

    kind: str
    found: str
    remedy: str


def explain(error: Exception, repository: str, revision: str, cache: Path) -> Failure:
    """The first of the error's causes that is known, else the last as a broken connection or a fetch that failed."""
    from huggingface_hub import constants

    causes = _causes(error)
    for cause in causes:
        failure = _on_this_machine(cause, repository, cache) or _by_the_hub(cause, repository, revision)
        if failure is not None:
            return failure
    last, hub = causes[-1], constants.ENDPOINT
    reason = _one_line(f"{type(last).__name__}: {last}")
    # A ValueError is an answer that is no JSON, or an address that is none.
    if _is_lost(error, causes) and not isinstance(last, ValueError):
        found = f"The connection to {hub} failed or was too slow for repository {repository} ({reason})"
        remedy = (
            "run the same command again, it continues with what is in the cache; where there is no network, run "
            f"'hf download {repository}' on a machine that has one and point HF_HOME here at (a copy of) its cache"
        )
        return Failure("unreachable", found, remedy)
    found = f"The repository {repository} could not be fetched from {hub} ({reason})"
    return Failure("unreachable", found, "check HF_ENDPOINT and the network, and run the same command again")


def _on_this_machine(cause: BaseException, repository: str, cache: Path) -> Failure | None:
    """A network that was switched off, a full disk, a cache that cannot be written."""
    from huggingface_hub import errors

    number, name = getattr(cause, "errno", None), f"repository {repository}"
    elsewhere = "name another place with --cache-dir or HF_HOME"
    if isinstance(cause, errors.OfflineModeIsEnabled):
        remedy = f"unset it, or first run the same command (or 'hf download {repository}') where there is a network"
        return Failure("offline", f"HF_HUB_OFFLINE is set for {name}", remedy)
    if number in FULL or "No space left" in str(cause):  # hf_xet gives no number
        found = f"The disk of the cache {cache} is full, so {name} could not be fetched"
        return Failure("final", found, f"free some space, or {elsewhere}, and run the same command again")
    if number in UNWRITABLE and getattr(cause, "filename", None):
        found = f"The cache {cache} cannot be written for {name} ({_one_line(cause)})"
        return Failure("refused", found, f"mend that, or {elsewhere}")
    return None


def _by_the_hub(cause: BaseException, repository: str, revision: str) -> Failure | None:
    """An answer of the hub that is no file: gated, not there, or a status."""
    from huggingface_hub import constants, errors, get_token

    hub, page, name = constants.ENDPOINT, f"{constants.ENDPOINT}/{repository}", f"repository {repository}"
    login = "run 'hf auth login' or set HF_TOKEN" + (f" with a token from {hub}/settings/tokens" if get_token() else "")
    if isinstance(cause, errors.GatedRepoError):
        account = "your token's account has no access to it" if get_token() else "no token was sent"
        remedy = f"request access at {page}, {login}, and run the same command again once access is granted"
        return Failure("refused", f"The {name} is gated and {account}", remedy)
    if isinstance(cause, errors.RepositoryNotFoundError):
        found = f"The hub {hub} has no {name} that you may read"
        return Failure("refused", found, f"check --model-path, or {login} if it is private")
    if isinstance(cause, errors.RevisionNotFoundError):
        remedy = f"choose one at {page}/tree/main with --revision"
        return Failure("final", f"The {name} has no revision '{revision}'", remedy)
    if isinstance(cause, errors.HfHubHTTPError) and getattr(cause, "response", None) is not None:
        status = cause.response.status_code
        said = _one_line(cause.server_message or cause.response.headers.get("X-Error-Message") or "no reason given")
        verb, remedy = REFUSALS.get(status, ("fails to serve", "run the same command again later"))
        found = f"The hub {hub} {verb} {name} (status {status}, {said})"
        return Failure("refused", found, remedy.format(login=login, page=page))
    return None


def _is_lost(error: Exception, causes: list[BaseException]) -> bool:
    """Whether the connection was: by what the client's HTTP library, another since 1.0, derives all its errors from."""
    from huggingface_hub import errors

    http = tuple(base for base in errors.HfHubHTTPError.__mro__ if base.__module__.startswith(("requests", "httpx")))
    return broke_in_mid_file(error) or any(
        isinstance(cause, (*http, ConnectionError, TimeoutError)) for cause in causes
    )


def _causes(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return chain


def _one_line(text: object, limit: int = 200) -> str:
    printable = "".join(character if character.isprintable() else " " for character in str(text))
    line = " ".join(printable.split()).rstrip(".")
    return line if len(line) <= limit else f"{line[:limit]}..."


def masked(text: str) -> str:
    """Text without the user name and password that an address in it may hold, as HF_ENDPOINT's may."""
    return re.sub(r"(?<=://)[^/\s]+@", "***@", text)


def broke_in_mid_file(error: Exception) -> bool:
    """The breaks after which some versions of the client do not go on by themselves, in requests' and httpx' names."""
    names = ("ChunkedEncodingError", "ReadError", "RemoteProtocolError")
    return type(error).__name__ in names or "Consistency check failed" in str(error)
