"""What a repository lists at one commit, and the refusal of what cannot be used before anything is fetched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from weights_conversion.errors import ConversionError
from weights_conversion.hub.choice import MAX_SMALL_BYTES, SMALL_FILES, choices, few
from weights_conversion.hub.fetching import TIMEOUTS, download, patiently

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve(repository: str, revision: str, cache: Path, weights: bool) -> tuple[ModelInfo, Path]:
    """The listing of one commit, and the path of its first small file in the cache.

    That file is asked for by `revision`, not by commit, because then the client notes in its cache which commit the
    revision was, which is what finds the snapshot again offline.
    """
    from huggingface_hub import constants, model_info

    timeout = constants.HF_HUB_ETAG_TIMEOUT

    def list_files() -> ModelInfo:
        return model_info(repository, revision=revision, files_metadata=True, timeout=timeout)

    for _ in range(3):  # a branch may move between the two requests
        info = patiently(list_files, float(TIMEOUTS * timeout), "the listing")
        if not COMMIT.fullmatch(str(info.sha)):
            raise ValueError(f"the answer for {repository} has no commit hash")
        _check_listing(sizes_of(info), repository, revision, weights)
        first = next(name for name in SMALL_FILES if name in sizes_of(info))
        path = download(repository, first, revision, cache)
        if path.parent.name == info.sha:
            return info, path
    raise ConversionError(
        f"Revision {revision} of repository {repository} moved while it was being read: run the same command again, or "
        "give --revision a commit hash."
    )


def sizes_of(info: ModelInfo) -> dict[str, int | None]:
    return {file.rfilename: file.size for file in info.siblings or ()}


def _check_listing(sizes: dict[str, int | None], repository: str, revision: str, weights: bool) -> None:
    """Refuse, before anything is fetched, a repository that cannot be used."""
    at = f"Repository {repository} has, at revision {revision},"
    if weights and not choices(sizes):
        others = sorted({Path(name).suffix for name in sizes} & {".gguf", ".pth", ".h5", ".msgpack", ".onnx", ".pt"})
        others += [name for name in sorted(sizes) if re.fullmatch(r"(consolidated|adapter_model).*\.safetensors", name)]
        raise ConversionError(
            f"{at} no weight file that can be read (model*.safetensors or pytorch_model*.bin)"
            f"{f', only {few(others)}' if others else ''}: name another repository with --model-path."
        )
    if weights and "adapter_config.json" in sizes:
        raise ConversionError(
            f"{at} an adapter (adapter_config.json) beside its weights: merge it (merge_and_unload) and give "
            "the merged folder as --model-path."
        )
    if weights and "config.json" not in sizes:
        raise ConversionError(f"{at} no config.json, which its weights need: name another with --model-path.")
    if not any(name in sizes for name in SMALL_FILES):
        raise ConversionError(f"{at} neither tokenizer files nor a config.json: name another with --model-path.")
    for name, stated in sizes.items():
        if (name in SMALL_FILES or name.endswith(".index.json")) and (stated or 0) > MAX_SMALL_BYTES:
            raise ConversionError(
                f"{at} a {name} of {stated} bytes, which it cannot need: name another with --model-path."
            )
