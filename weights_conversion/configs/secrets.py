"""Tokens and passwords that a training run has left in a config: they are not carried on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Keys that transformers, its trainer and the hub's client keep credentials under. (bos_token and its like are words.)
_KEYS = frozenset(
    (
        *("hub_token", "use_auth_token", "auth_token", "access_token", "api_token", "token", "hf_token"),
        *("huggingface_token", "hf_access_token", "push_to_hub_token", "hf_api_key", "api_key", "apikey"),
        *("wandb_api_key", "password", "passwd", "secret", "client_secret", "secret_key", "private_key"),
        *("credentials", "authorization", "aws_access_key_id", "aws_secret_access_key"),
    )
)
_VALUES = re.compile(
    r"hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|://[^/\s@]+:[^/\s@]+@"
)
_DEPTH = 64


def without_secrets(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The content without entries that hold a credential, and the dotted names of those, at any depth."""
    dropped: list[str] = []
    return _clean(content, "", dropped, _DEPTH), dropped


def _clean(content: Any, where: str, dropped: list[str], depth: int) -> Any:
    if depth and isinstance(content, Mapping):
        kept = {}
        for key, value in content.items():
            if _is_secret(key, value):
                dropped.append(f"{where}{key}")
            else:
                kept[key] = _clean(value, f"{where}{key}.", dropped, depth - 1)
        return kept
    if depth and isinstance(content, list) and any(isinstance(value, (Mapping, list)) for value in content):
        return [_clean(value, where, dropped, depth - 1) for value in content]
    return content


def _is_secret(key: str, value: Any) -> bool:
    if not isinstance(value, str) or not value:
        return False
    return key.lower() in _KEYS or _VALUES.search(value) is not None


def note(dropped: list[str], where: str) -> str:
    """A sentence for the report."""
    return f"config     {', '.join(dropped[:10])} in {where} may be a secret and is not carried on"
