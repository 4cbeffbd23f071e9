"""Which tokenizer is exported: the one of training, wherever the checkpoint says that it is, as it stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizer_models as tiny

from weights_conversion.errors import ConversionError
from weights_conversion.tokenizer import TokenizerOptions, TokenizerPlan, plan_tokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.train(tmp_path_factory.mktemp("models") / "llama.model")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "mt" / "iter_0000007").mkdir(parents=True)
    return tmp_path / "mt"


def plan(root: Path, args: dict[str, Any] | None = None, rows: int = 512, **call: Any) -> TokenizerPlan:
    """Of a Megatron-Core checkpoint, unless told otherwise."""
    options = TokenizerOptions(**call.pop("options", {}))
    call = {"core": True, "iteration": root / "iter_0000007", **call}
    return plan_tokenizer(call.pop("family", "llama2"), root, args or {}, options, embedding_rows=rows, **call)


def refused(*words: str, **call: Any) -> None:
    with pytest.raises(ConversionError) as error:
        plan(**call)
    for word in words:
        assert word in str(error.value)


# --- tokenizer.json alone ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("core", [True, False])
def test_json_alone_stays_byte_for_byte(root: Path, tmp_path: Path, core: bool) -> None:
    """Llama 3's kind: bos and eos among the added tokens, not next to each other, merges beside it."""
    source = tiny.train_llama3(tmp_path / "hf", spare=3)
    size = max(tiny.ids_of(source).values()) + 1
    found = plan(root, rows=size, core=core, iteration=None, options={"vocab_file": source})
    (tmp_path / "out").mkdir()
    tiny.write(found, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        path.name: path.read_bytes() for path in source.iterdir()
    }
    assert found.vocabulary == tiny.ids_of(source)
    assert found.token_ids["bos"] == ("<|begin_of_text|>", tiny.ids_of(source)["<|begin_of_text|>"])
    assert not found.warnings


def test_json_alone_with_tokens_of_training(root: Path, tmp_path: Path) -> None:
    source = tiny.train_llama3(tmp_path / "hf")
    size = len(tiny.ids_of(source))
    options = {"vocab_file": source, "vocab_extra_ids_list": "<a>,<b>"}
    assert plan(root, rows=size + 2, options=options).vocabulary["<b>"] == size + 1
    refused("<b> =", "--vocab_extra_ids_list", root=root, rows=size + 1, options=options)


def test_json_alone_of_another_model(root: Path, tmp_path: Path) -> None:
    source = tiny.train_llama3(tmp_path / "hf")
    refused("no row", "--vocab_file", root=root, rows=200, options={"vocab_file": source})


def test_tokens_behind_the_rows_are_reported(root: Path, tmp_path: Path, model: Path) -> None:
    """A fine-tune's own tokens that the model has no rows for: kept; those that training needs are refused."""
    (root / "tokenizer.model").write_bytes(model.read_bytes())
    (root / "added_tokens.json").write_text(json.dumps({"<one>": 400, "<two>": 401}))
    found = plan(root, rows=400)
    assert ["2 tokens" in line and "<two> = 401" in line for line in found.warnings] == [True]
    assert found.vocabulary["<two>"] == 401
    refused("<CLS> = 400", root=root, rows=400, core=False, args={"new_tokens": True, "vocab_file": str(model)},
            options={"vocab_file": model})  # fmt: skip

    source = tiny.train_llama3(tmp_path / "hf")
    size = len(tiny.ids_of(source))
    assert ["1 token " in line for line in plan(root, rows=size - 1, options={"vocab_file": source}).warnings] == [True]


# --- where it is looked for -------------------------------------------------------------------------------------------


def test_what_megatron_core_names(root: Path, tmp_path: Path, model: Path) -> None:
    """A file of any name, a folder, a name of the hub, the iteration's own folder: before everything that is usual."""

    def never(*_: Any) -> Path:
        pytest.fail("the hub was asked")

    named = {"tokenizer_type": "Llama2Tokenizer", "tokenizer_model": str(model)}
    assert plan(root, named, fetch=never).copied["tokenizer.model"] == model
    hub = tiny.hub_folder(tmp_path / "hub", model, "LlamaTokenizer", None)
    kind = {"tokenizer_type": "HuggingFaceTokenizer"}
    assert plan(root, kind | {"tokenizer_model": str(hub)}, fetch=never).copied["tokenizer.json"].parent == hub
    asked = []

    def fetch(repository: str, _: Any) -> Path:
        asked.append(repository)
        return hub

    found = plan(root, kind | {"tokenizer_model": "owner/name"}, fetch=fetch)
    assert asked == ["owner/name"]
    assert "owner/name, which training's args name" in found.report[0]
    own = root / "iter_0000007" / "tokenizer"
    own.mkdir()
    for path in hub.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    assert plan(root, kind | {"tokenizer_model": "owner/name"}, fetch=never).copied["tokenizer.model"].parent == own


def test_a_default_serves_only_where_nothing_is_stated(root: Path, tmp_path: Path, model: Path) -> None:
    hub = tiny.hub_folder(tmp_path / "hub", model, "LlamaTokenizer", None)
    found = plan(root, rows=400, fetch=lambda *_: hub)
    assert "since the checkpoint names none" in found.report[0]
    for gone in ("/gone/tokenizer.model", "gone.model"):
        refused(gone, "--vocab_file", root=root, args={"tokenizer_model": gone}, fetch=lambda *_: hub)
    refused("no network", root=root, args={"tokenizer_model": "owner/name"}, fetch=_offline)


def _offline(*_: Any) -> Path:
    raise ConversionError("no network")


@pytest.mark.parametrize(
    ("rows", "known", "args", "fits"),
    [
        (400, True, {}, True),
        (512, True, {}, False),
        (512, False, {}, True),
        (399, False, {}, False),
        (4000, False, {}, False),
        (512, False, {"make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": 2}, True),
        (768, False, {"make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": 2}, False),
    ],
)
def test_a_default_must_fit_the_rows(
    root: Path, tmp_path: Path, model: Path, rows: int, known: bool, args: dict[str, Any], fits: bool
) -> None:
    hub = tiny.hub_folder(tmp_path / "hub", model, "LlamaTokenizer", None)
    call: dict[str, Any] = {"root": root, "args": args, "rows": rows, "rows_known": known, "fetch": lambda *_: hub}
    if fits:
        assert plan(**call).ids == 400
    else:
        refused("--vocab_file", **call)


def test_places_that_contradict_each_other(root: Path, tmp_path: Path, model: Path) -> None:
    """Two that agree are no matter, whatever their files; two that do not are an error."""
    hub = tiny.hub_folder(tmp_path / "hub", model, "LlamaTokenizer", None)
    lone = tmp_path / "lone" / "tokenizer.json"
    lone.parent.mkdir()
    lone.write_bytes((hub / "tokenizer.json").read_bytes())
    for path in hub.iterdir():
        (root / path.name).write_bytes(path.read_bytes())
    assert plan(root, {"tokenizer_model": str(lone.parent)}).ids == 400
    other = tiny.train_llama3(tmp_path / "hf")
    args = {"tokenizer_model": str(other)}
    refused("different", str(other), "--vocab_file", root=root, args=args)
    assert plan(root, args, options={"vocab_file": other}).copied["tokenizer.json"].parent == other


def test_what_is_gone_is_told(root: Path, tmp_path: Path, model: Path) -> None:
    hub = tiny.hub_folder(tmp_path / "import", model, "LlamaTokenizer", None)
    found = plan(root, {"tokenizer_model": "/gone/t.model"}, search=[hub])
    assert any("/gone/t.model is not to be had" in line for line in found.warnings)


# --- what training added ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "args", "behind"),
    [
        ("Llama2Tokenizer", {"vocab_extra_ids": 3}, 0),
        ("HuggingFaceTokenizer", {}, 0),
        ("SentencePieceTokenizer", {"vocab_extra_ids": 3}, 8),
        ("Llama2Tokenizer", {"new_tokens": True, "vocab_extra_ids_list": "<a>"}, 6),  # it came from Megatron-LLM
    ],
)
def test_what_megatron_core_adds(root: Path, model: Path, kind: str, args: dict[str, Any], behind: int) -> None:
    assert plan(root, {"tokenizer_type": kind, "tokenizer_model": str(model), **args}).ids == 400 + behind


ARGS = {"new_tokens": True, "vocab_extra_ids": 0, "vocab_extra_ids_list": "<a>,<b>"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocab_extra_ids_list": "<b>,<a>"}, ("<b>,<a> is used", "args' <a>,<b>", "<b> = 405 (by the args 406)")),
        ({"vocab_extra_ids_list": ""}, ("--vocab_extra_ids_list", "<a> = no token (by the args 405)")),
        ({"new_tokens": False}, ("--no_new_tokens", "new_tokens True", "<a> = 400 (by the args 405)")),
    ],
)  # fmt: skip
def test_flags_that_contradict_training_are_told(
    root: Path, model: Path, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    (root / "tokenizer.model").write_bytes(model.read_bytes())
    (said,) = plan(root, ARGS, core=False, options=options).warnings
    for word in words:
        assert word in said
    assert not plan(root, ARGS, core=False, options={"new_tokens": True, "vocab_extra_ids_list": "<a>,<b>"}).warnings


# --- files that are not what their names say --------------------------------------------------------------------------


def test_tiktoken_beside_tokenizer_json(root: Path, tmp_path: Path) -> None:
    """Llama 3's tokenizer.model is copied as it is, and its ids are tokenizer.json's; alone it gives none."""
    source = tiny.train_llama3(tmp_path / "hf")
    (source / "tokenizer.model").write_text("IQ== 0\nIg== 1\nIw== 2\n")
    size = len(tiny.ids_of(source))
    found = plan(root, rows=size, core=False, options={"vocab_file": source})
    assert {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"} <= set(found.copied)
    assert found.ids == size
    (source / "tokenizer.json").unlink()
    refused("tiktoken", "tokenizer.json", root=root, options={"vocab_file": source})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", '{"token": "secret"}'),
        ("merges.txt", "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n"),
        ("merges.txt", "machine example.org\nlogin me\npassword secret\n"),
    ],
)
def test_a_secret_is_no_companion_file(root: Path, tmp_path: Path, name: str, content: str) -> None:
    source = tiny.train_llama3(tmp_path / "hf")
    (source / name).write_text(content)
    refused(name, root=root, options={"vocab_file": source})


def test_a_type_that_cannot_be_rebuilt(root: Path, tmp_path: Path) -> None:
    """The same tokenizer in Hugging Face's files serves, where the user names it."""
    source = tiny.train_llama3(tmp_path / "hf")
    args = {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "/gone/vocab.json"}
    refused("GPT2BPETokenizer", "--vocab_file", root=root, args=args)
    assert plan(root, args, options={"vocab_file": source}).vocabulary == tiny.ids_of(source)
