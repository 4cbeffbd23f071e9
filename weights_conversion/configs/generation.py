"""generation_config.json: kept as it is, so it must be one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio

NAME = "generation_config.json"
# What transformers' GenerationConfig has, newer keys of the same kinds included.
_SETTINGS = re.compile(
    r"(max|min)_(new_tokens|length|time|.*tokens)|.*(bos|eos|pad)_token_id|(forced|decoder)_.*|(encoder_)?.*_penalty|"
    r"(temperature|(top|min|typical)_[a-z]+|do_sample|num_.*|use_cache|early_stopping|guidance_scale|seed|"
    r"(begin_)?suppress_tokens|bad_words_ids|no_repeat_ngram_size|.*cache.*|.*assistant.*|prompt_lookup_.*|"
    r"return_.*|output_.*|renormalize_logits|(epsilon|eta)_cutoff|sequence_bias|stop_strings|token_healing|"
    r"_from_model_config|transformers_version|generation_.*|chat_format|.*compile.*|watermarking_config|is_assistant)"
)


def read(folder: Path) -> dict[str, Any] | None:
    """A folder's generation_config.json; None where there is none.

    Raises ConversionError for a file of that name, or behind a link of that name, that is something else.
    """
    path = folder / NAME
    if not fileio.is_file(path):
        return None
    content = fileio.read_json(path)
    if content and not any(_SETTINGS.fullmatch(key) for key in content):
        raise ConversionError(
            f"{path} is not a {NAME}: it has none of the settings of generation; put the right file there, or remove it"
        )
    return content
