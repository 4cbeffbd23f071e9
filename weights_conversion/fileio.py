"""What every layer reads of single files: JSON objects, and SHA-256 sums."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

from weights_conversion.errors import ConversionError

MAX_JSON_BYTES = 100_000_000  # safetensors' limit for its headers; no config or index comes near it
_HASH_BYTES = 4 << 20


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or an error that names the file."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"it has more than {MAX_JSON_BYTES} bytes")
        content = json.loads(text.decode("utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{path} does not exist") from error
    except (ValueError, OSError, RecursionError) as error:
        raise ConversionError(f"{path} is not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, where a JSON object was expected")
    return content


def sha256(path: Path, stop: threading.Event | None = None) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal; of no use once `stop` is set, which ends it early."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_HASH_BYTES))
    with path.open("rb", buffering=0) as file:
        while (count := file.readinto(buffer)) and not (stop and stop.is_set()):
            digest.update(buffer[:count])
    return digest.hexdigest()
