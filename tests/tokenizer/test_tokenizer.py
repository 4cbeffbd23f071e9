"""Every exported tokenizer gives the ids that Megatron-LLM gave in training, and nothing wrong is written silently."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizer_models as tiny

from weights_conversion.errors import ConversionError
from weights_conversion.tokenizer import (
    TokenizerOptions,
    TokenizerPlan,
    plan_tokenizer,
    source_tokenizer_files,
)

NEW = ("<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>")
ROWS = 10_000


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "llama": tiny.train(folder / "llama.model"),
        "padded": tiny.train(folder / "padded.model", pad=True),
        "codellama": tiny.train(folder / "codellama.model", extra_pieces=tiny.INFILLING_PIECES),
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    return folder


def with_model(root: Path, model: Path) -> Path:
    (root / "tokenizer.model").write_bytes(model.read_bytes())
    return root


def export(plan: TokenizerPlan, out: Path, model_type: str = "llama") -> Any:
    """Writes the plan and loads it as users do."""
    from transformers import AutoTokenizer

    out.mkdir()
    tiny.write(plan, out)
    (out / "config.json").write_text(json.dumps({"model_type": model_type}))
    return AutoTokenizer.from_pretrained(out)


def fails(*words: str, **call: Any) -> None:
    family, checkpoint = call.pop("family", "llama2"), call.pop("checkpoint")
    args, options = call.pop("args", {}), call.pop("options", TokenizerOptions())
    with pytest.raises(ConversionError) as error:
        plan_tokenizer(family, checkpoint, args, options, embedding_rows=call.pop("rows", ROWS), **call)
    for word in words:
        assert word in str(error.value)


# The rule: what follows the pieces. n stands for the number of pieces of the model.
RULE = [
    ("llama", {"new_tokens": False}, ()),
    ("llama", {"new_tokens": True}, NEW),
    ("llama", {"new_tokens": True, "vocab_extra_ids": 2}, (*NEW, "<extra_id_0>", "<extra_id_1>")),
    ("llama", {"new_tokens": True, "vocab_extra_ids_list": "<a>,b=c"}, (*NEW, "<a>", "b=c")),
    (
        "llama",
        {"new_tokens": True, "vocab_extra_ids": 1, "vocab_extra_ids_list": "<|im_start|>,<|im_end|>"},
        (*NEW, "<extra_id_0>", "<|im_start|>", "<|im_end|>"),
    ),
    ("llama", {"new_tokens": False, "vocab_extra_ids_list": "<a>,<b>"}, ("<a>", "<b>")),
    ("llama", {"new_tokens": False, "vocab_extra_ids": 1, "vocab_extra_ids_list": "<a>"}, ("<extra_id_0>", "<a>")),
    ("llama", {"new_tokens": True, "vocab_extra_ids_list": "</s>,<CLS>,the,<a>"}, (*NEW, "<a>")),
    ("padded", {"new_tokens": True}, NEW[:-1]),
    ("padded", {"new_tokens": True, "vocab_extra_ids_list": "<a>,<PAD>"}, (*NEW[:-1], "<a>", "<PAD>")),
    ("padded", {"new_tokens": False, "vocab_extra_ids_list": "<a>"}, ("<a>",)),
    ("codellama", {"new_tokens": True, "vocab_extra_ids_list": "<a>"}, (*NEW, "<a>")),
    ("codellama", {"new_tokens": False, "vocab_extra_ids_list": f"<a>,{tiny.SPACE}<PRE>"}, ("<a>",)),
]


@pytest.mark.parametrize(("name", "args", "behind"), RULE)
def test_ids_follow_the_rule(
    models: dict[str, Path], root: Path, tmp_path: Path, name: str, args: dict[str, Any], behind: tuple[str, ...]
) -> None:
    """Against the table above, against the rule stated in tokenizer_models, and as loaded by transformers."""
    model = models[name]
    theirs = tiny.MegatronSentencePiece(
        model, args["new_tokens"], args.get("vocab_extra_ids", 0), args.get("vocab_extra_ids_list")
    )
    size = theirs.model.GetPieceSize()
    assert size == {"llama": 400, "padded": 400, "codellama": 416}[name]
    expected = {token: i for i, token in enumerate([*map(theirs.model.IdToPiece, range(size)), *behind])}
    assert theirs.ids == expected
    assert tiny.megatron_token_ids(model, **args) == expected

    family = "codellama" if name == "codellama" else "llama2"
    plan = plan_tokenizer(family, with_model(root, model), args, TokenizerOptions(), embedding_rows=len(expected))
    assert plan.ids == len(expected)
    assert plan.vocabulary == expected
    loaded = export(plan, tmp_path / "out")
    vocabulary = loaded.get_vocab()
    vocabulary.pop("<FILL_ME>", None)  # version 5 of CodeLlama's class adds it; no text ever becomes this id
    assert vocabulary == expected
    extras = [f"<extra_id_{i}>" for i in range(args.get("vocab_extra_ids", 0))]
    extras += (args.get("vocab_extra_ids_list") or "").split(",") if args.get("vocab_extra_ids_list") else []
    assert set(extras) <= set(loaded.all_special_tokens)
    for token in theirs.special:
        assert loaded.convert_tokens_to_ids(token) == expected[token]
        assert loaded.encode(token, add_special_tokens=False) == [expected[token]]
        assert loaded.decode([expected[token]], skip_special_tokens=True) == ""
    if args["new_tokens"]:
        pad = "<pad>" if name == "padded" else "<PAD>"
        assert (loaded.cls_token, loaded.sep_token, loaded.mask_token) == ("<CLS>", "<SEP>", "<MASK>")
        assert (loaded.pad_token, loaded.pad_token_id) == (pad, expected[pad])
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id) == (1, 2, 0)


def sample_texts(special: list[str], count: int = 300) -> list[str]:
    generator = random.Random(0)
    parts = [*tiny.SENTENCES, *special, *special, " ", "\n", "  ", "7", "\u00e9", "\U0001f98a", "<", "▁", "ther", "\t"]
    made = ["".join(generator.choice(parts) for _ in range(generator.randint(1, 7))) for _ in range(count)]
    around = [f"{a}{token}{b}" for token in special for a in ("", "x", "x ", "\n") for b in ("", "y", " y", "\ny")]
    return [*tiny.TEXTS, *around, *made]


@pytest.mark.parametrize("name", ["llama", "padded"])
@pytest.mark.parametrize("new_tokens", [False, True])
def test_text_built_from_tokenizer_model_alone(
    models: dict[str, Path], root: Path, tmp_path: Path, name: str, new_tokens: bool
) -> None:
    """A source without settings of its own: every text gives Megatron-LLM's ids in both versions of transformers."""
    args = {"new_tokens": new_tokens, "vocab_extra_ids": 1, "vocab_extra_ids_list": "<|im_start|>,b=c"}
    theirs = tiny.MegatronSentencePiece(models[name], new_tokens, 1, "<|im_start|>,b=c")
    plan = plan_tokenizer("llama", with_model(root, models[name]), args, TokenizerOptions(), embedding_rows=ROWS)
    loaded = export(plan, tmp_path / "out")
    for text in sample_texts(theirs.special):
        assert loaded.encode(text, add_special_tokens=False) == theirs.encode(text), repr(text)
        assert loaded.encode(text) == [1, *theirs.encode(text)], repr(text)
    for text in ("the quick\n\n  brown", "12 \U0001f98a na\u00efve"):
        assert loaded.decode(loaded.encode(text), skip_special_tokens=True) == text
    assert "token_type_ids" not in loaded("text")


# Where a source brings its own settings they are kept, and decide where sentencepiece's leading space is put. Training
# puts it in front of each part between special tokens. So does version 4 of transformers, unless the source's
# tokenizer.json says otherwise (as `legacy: false` makes it). Version 5 rebuilds the tokenizer of these two classes and
# does not: the same then holds for the source model itself. (class, legacy) -> rule in version 4, rule in version 5.
SOURCES = [
    ("LlamaTokenizer", True, "training", "always"),
    ("LlamaTokenizer", None, "training", "first"),
    ("LlamaTokenizer", False, "first", "first"),
    ("CodeLlamaTokenizer", None, "training", "first"),
    ("PreTrainedTokenizerFast", None, "training", "training"),
]


@pytest.mark.parametrize(("class_name", "legacy", "version4", "version5"), SOURCES)
def test_settings_of_the_source_are_kept(
    models: dict[str, Path],
    root: Path,
    tmp_path: Path,
    class_name: str,
    legacy: bool | None,
    version4: str,
    version5: str,
) -> None:
    import transformers

    is_code = class_name == "CodeLlamaTokenizer"
    model, family = (models["codellama"], "codellama") if is_code else (models["llama"], "llama2")
    source = tiny.hub_folder(root, model, "LlamaTokenizer" if class_name.startswith("Pre") else class_name, legacy)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = class_name
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    args = {"new_tokens": True, "vocab_extra_ids_list": "<|im_start|>,<|im_end|>"}
    theirs = tiny.MegatronSentencePiece(model, True, 0, args["vocab_extra_ids_list"])
    plan = plan_tokenizer(family, source, args, TokenizerOptions(), embedding_rows=len(theirs.ids))
    loaded = export(plan, tmp_path / "out")

    assert {**loaded.get_vocab(), "<FILL_ME>": 0} == {**theirs.ids, "<FILL_ME>": 0}
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    kept = ("tokenizer_class", "legacy", "chat_template", "add_bos_token", "add_eos_token", "model_max_length")
    assert {key: written.get(key) for key in kept} == {key: settings.get(key) for key in kept}
    assert loaded.chat_template == settings["chat_template"]
    infilling = settings.get("additional_special_tokens") or []
    assert written["additional_special_tokens"] == [*infilling, "<|im_start|>", "<|im_end|>"]
    scheme = version4 if transformers.__version__.startswith("4.") else version5
    special = [*theirs.special, *infilling]
    for text in sample_texts(theirs.special):
        expected = tiny.hub_encode(model, theirs.ids, special, text, scheme)
        assert loaded.encode(text, add_special_tokens=False) == expected, repr(text)
        if scheme == "training" and not any(token in text for token in infilling):
            assert expected == theirs.encode(text)


def test_codellama_still_fills_in(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = tiny.hub_folder(root, models["codellama"], "CodeLlamaTokenizer", None)
    (source / "config.json").write_text('{"model_type": "llama"}')
    args = {"new_tokens": True, "vocab_extra_ids_list": "<a>"}
    prompt = "def main(<FILL_ME>): return 1"
    expected = AutoTokenizer.from_pretrained(source).encode(prompt)
    assert {407, 408, 409} <= set(expected)  # prefix, suffix and middle are pieces

    from_source = plan_tokenizer("codellama", source, args, TokenizerOptions(), embedding_rows=422)
    loaded = export(from_source, tmp_path / "out")
    assert type(loaded).__name__.startswith("CodeLlamaTokenizer")
    assert loaded.encode(prompt) == expected
    assert loaded.convert_tokens_to_ids("<CLS>") == 416

    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (source / name).unlink()
    from_model = plan_tokenizer("codellama", source, args, TokenizerOptions(), embedding_rows=422)
    loaded = export(from_model, tmp_path / "rebuilt")
    assert type(loaded).__name__.startswith("CodeLlamaTokenizer")
    assert loaded.encode(prompt) == expected


def test_fill_token_yields_its_id(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    """Files that give <FILL_ME> the id behind the pieces: kept as it is untouched, out of the way of new tokens."""
    source = tiny.hub_folder(root, models["codellama"], "CodeLlamaTokenizer", None, added={"<FILL_ME>": 416})
    untouched = plan_tokenizer("codellama", source, {}, TokenizerOptions(), embedding_rows=416)
    assert (untouched.ids, untouched.written) == (416, {})
    plan = plan_tokenizer("codellama", source, {"new_tokens": True}, TokenizerOptions(), embedding_rows=421)
    loaded = export(plan, tmp_path / "out")
    assert loaded.convert_tokens_to_ids(list(NEW)) == [416, 417, 418, 419, 420]


def test_codellama_without_infilling_pieces(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    """The 34B and Python variants have Llama's vocabulary: the class must not add tokens that have no row."""
    source = tiny.hub_folder(root, models["llama"], "LlamaTokenizer", None)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "CodeLlamaTokenizer"}))
    loaded = export(plan_tokenizer("codellama", source, {}, TokenizerOptions(), embedding_rows=400), tmp_path / "out")
    assert len(loaded) == 400
    assert max(loaded.get_vocab().values()) == 399


@pytest.mark.parametrize("class_name", ["LlamaTokenizer", "CodeLlamaTokenizer"])
def test_untouched_files_come_back_byte_for_byte(
    models: dict[str, Path], root: Path, tmp_path: Path, class_name: str
) -> None:
    model = models["codellama" if class_name.startswith("Code") else "llama"]
    source = tiny.hub_folder(root, model, class_name, None)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    family = "codellama" if class_name.startswith("Code") else "mistral"
    plan = plan_tokenizer(family, source, {}, TokenizerOptions(), embedding_rows=416)
    export(plan, tmp_path / "out", "mistral" if family == "mistral" else "llama")
    names = {path.name for path in source.iterdir()}
    assert names == {path.name for path in (tmp_path / "out").iterdir()} - {"config.json"}
    for name in names:
        assert (source / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_tokenizer_model_is_kept_byte_for_byte(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    plan = plan_tokenizer(
        "llama2", with_model(root, models["llama"]), {"new_tokens": True}, TokenizerOptions(), embedding_rows=405
    )
    export(plan, tmp_path / "out")
    digests = [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in (models["llama"], tmp_path / "out/tokenizer.model")
    ]
    assert digests[0] == digests[1]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "added_tokens.json", "config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json",
    }  # fmt: skip


def test_spelling_of_version_5_is_made_readable_for_version_4(
    models: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    source = tiny.hub_folder(root, models["llama"], "LlamaTokenizer", None)
    config = {
        "backend": "tokenizers", "bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": ["<s>"],
        "is_local": True, "tokenizer_class": "TokenizersBackend", "unk_token": "<unk>",
    }  # fmt: skip
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "special_tokens_map.json").unlink()
    args = {"new_tokens": True, "vocab_extra_ids_list": "<a>"}
    for i, (given, rows) in enumerate((({}, 400), (args, 406))):
        loaded = export(
            plan_tokenizer("llama2", source, given, TokenizerOptions(), embedding_rows=rows), tmp_path / f"{i}"
        )
        assert loaded.encode("the dog</s>b") == [1, *tiny.MegatronSentencePiece(models["llama"]).encode("the dog</s>b")]
        assert "<s>" in loaded.all_special_tokens
        assert len(loaded) == rows


def test_files_of_older_versions(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    """As Llama's first repositories: tokens with flags in the config, added_tokens.json, no added_tokens_decoder."""
    source = tiny.hub_folder(root, models["llama"], "LlamaTokenizer", None, added={"[PAD]": 400})
    data = json.loads((source / "tokenizer.json").read_text())
    for entry in data["added_tokens"]:
        entry["normalized"] = True
    data["added_tokens"] = [entry for entry in data["added_tokens"] if entry["id"] < 400]
    (source / "tokenizer.json").write_text(json.dumps(data))
    (source / "added_tokens.json").write_text('{"[PAD]": 400}')
    flags = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    tokens = {"bos_token": {**flags, "content": "<s>"}, "eos_token": {**flags, "content": "</s>"}}
    config = {
        **tokens,
        "add_bos_token": True,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": {**flags, "content": "<unk>"},
    }
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "special_tokens_map.json").write_text(json.dumps({"pad_token": "[PAD]", "bos_token": "<s>"}))
    args = {"vocab_extra_ids_list": "[PAD],<a>"}
    loaded = export(plan_tokenizer("llama2", source, args, TokenizerOptions(), embedding_rows=402), tmp_path / "out")
    assert (loaded.pad_token, loaded.pad_token_id, loaded.convert_tokens_to_ids("<a>"), len(loaded)) == (
        "[PAD]",
        400,
        401,
        402,
    )
    assert loaded.encode("the dog<a>", add_special_tokens=False)[-1] == 401
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id) == (1, 2, 0)


def test_tokenizer_json_is_made_where_the_source_has_none(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    """tokenizer.model with settings alone, as files of slow tokenizers: the legacy flag decides, as in version 4."""
    import transformers

    for legacy, version4, version5 in (
        (None, "training", "first"),
        (False, "first", "first"),
        (True, "training", "always"),
    ):
        folder = tmp_path / str(legacy)
        source = tiny.hub_folder(folder / "hub", models["llama"], "LlamaTokenizer", legacy)
        (source / "tokenizer.json").unlink()
        plan = plan_tokenizer("llama2", source, {"new_tokens": True}, TokenizerOptions(), embedding_rows=405)
        loaded = export(plan, folder / "out")
        theirs = tiny.MegatronSentencePiece(models["llama"], True)
        scheme = version4 if transformers.__version__.startswith("4.") else version5
        for text in sample_texts(theirs.special, count=50):
            expected = tiny.hub_encode(models["llama"], theirs.ids, theirs.special, text, scheme)
            assert loaded.encode(text, add_special_tokens=False) == expected, (legacy, text)


def test_falcon(tmp_path: Path) -> None:
    """From --vocab_file (a folder, or its tokenizer.json), the checkpoint's own files, a searched folder, the hub."""
    import tokenizers

    files = tiny.train_falcon(tmp_path / "falcon")
    base = tokenizers.Tokenizer.from_file(str(files / "tokenizer.json"))
    size = base.get_vocab_size()
    empty = tmp_path / "empty"
    empty.mkdir()
    asked = []

    def fetch(repository: str, cache_dir: Path | None) -> Path:
        asked.append((repository, cache_dir))
        return files

    calls: list[dict[str, Any]] = [
        {"checkpoint": empty, "options": {"vocab_file": files}},
        {"checkpoint": empty, "options": {"vocab_file": files / "tokenizer.json"}},
        {"checkpoint": files, "options": {}},
        {"checkpoint": empty, "options": {}, "search": [empty, files]},
        {"checkpoint": empty, "options": {"cache_dir": tmp_path}, "fetch": fetch},
    ]
    for i, call in enumerate(calls):
        args = {"new_tokens": True, "vocab_extra_ids_list": "<|im_start|>,<|im_end|>", "vocab_file": "/nowhere"}
        options = TokenizerOptions(**call.pop("options"))
        plan = plan_tokenizer("falcon", call.pop("checkpoint"), args, options, embedding_rows=size + 2, **call)
        assert plan.vocabulary == {**base.get_vocab(), "<|im_start|>": size, "<|im_end|>": size + 1}
        loaded = export(plan, tmp_path / f"out{i}", "falcon")
        assert loaded.get_vocab() == plan.vocabulary
        assert loaded.eos_token_id == 11
        assert set(loaded.all_special_tokens) == {*tiny.FALCON_SPECIAL, "<|im_start|>", "<|im_end|>"}
        for text in tiny.TEXTS:
            assert loaded.encode(text) == base.encode(text).ids
        turns = [size, *base.encode("user hi").ids, size + 1, *base.encode("\n").ids, 11]
        assert loaded.encode("<|im_start|>user hi<|im_end|>\n<|endoftext|>") == turns
    assert asked == [("tiiuae/falcon-40b", tmp_path)]

    for args in ({"new_tokens": False, "vocab_extra_ids_list": "<a>"}, {"vocab_extra_ids": 3}, {}):
        assert plan_tokenizer("falcon", files, args, TokenizerOptions(), embedding_rows=size).ids == size
    fails("--new_tokens", family="falcon", checkpoint=files, options=TokenizerOptions(vocab_extra_ids_list="<a>"))
    fails("tiiuae", "--vocab_file", "--no_tokenizer", family="falcon", checkpoint=empty, fetch=lambda *_: empty)
    (empty / "tokenizer.json").write_bytes((files / "tokenizer.json").read_bytes())
    alone = plan_tokenizer("falcon", empty, {}, TokenizerOptions(), embedding_rows=size)
    loaded = export(alone, tmp_path / "alone", "falcon")
    assert (loaded.eos_token_id, loaded.get_vocab()) == (11, base.get_vocab())


def test_flags_stand_above_the_arguments_of_training(models: dict[str, Path], root: Path) -> None:
    checkpoint = with_model(root, models["llama"])
    args = {"new_tokens": True, "vocab_extra_ids": 0, "vocab_extra_ids_list": "<a>"}

    def added(args: dict[str, Any], **options: Any) -> list[str]:
        plan = plan_tokenizer("llama2", checkpoint, args, TokenizerOptions(**options), embedding_rows=ROWS)
        return [token for token, index in sorted(plan.vocabulary.items(), key=lambda item: item[1]) if index >= 400]

    assert added(args) == [*NEW, "<a>"]
    assert added({}) == []
    assert added({"new_tokens": None, "vocab_extra_ids": None, "vocab_extra_ids_list": None}) == []
    assert added({}, new_tokens=True) == [*NEW]
    assert added(args, new_tokens=False) == ["<a>"]
    assert added(args, vocab_extra_ids_list="<b>,<c>") == [*NEW, "<b>", "<c>"]
    assert added(args, vocab_extra_ids_list="") == [*NEW]


def test_reset_arguments_are_not_believed(models: dict[str, Path], root: Path) -> None:
    """The original's resharding tool sets new_tokens to its default, True, and the padded embedding has the rows."""
    reset = {
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "no_save_optim": True,
        "no_save_rng": True,
    }
    args = {**reset, "new_tokens": True, "vocab_extra_ids": 0, "vocab_extra_ids_list": None}
    checkpoint = with_model(root, models["llama"])
    plan = plan_tokenizer("llama2", checkpoint, args, TokenizerOptions(), embedding_rows=512)
    assert plan.ids == 400
    assert any("reset" in line for line in plan.report)
    flags = TokenizerOptions(new_tokens=True, vocab_extra_ids_list="<a>")
    assert plan_tokenizer("llama2", checkpoint, args, flags, embedding_rows=512).ids == 406


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama2", "FalconTokenizer"), ("falcon", "SentencePieceTokenizer"), ("mistral", "GPT2BPETokenizer")],
)
def test_another_tokenizer_type_is_refused(root: Path, family: str, kind: str) -> None:
    fails(kind, "--model", "--no_tokenizer", family=family, checkpoint=root, args={"tokenizer_type": kind})


def test_overrides_may_swap(models: dict[str, Path], tmp_path: Path) -> None:
    source = tiny.hub_folder(tmp_path / "hub", models["llama"], "LlamaTokenizer", None)
    options = TokenizerOptions(override_special_tokens=("bos=</s>", "eos=<s>", "pad=</s>"))
    plan = plan_tokenizer("llama2", source, {}, options, embedding_rows=400)
    loaded = export(plan, tmp_path / "out")
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id, loaded.encode("the")[0]) == (2, 1, 2, 2)


def test_overlapping_tokens_are_reported(models: dict[str, Path], root: Path) -> None:
    args = {"vocab_extra_ids_list": "<a,<a>"}
    plan = plan_tokenizer("llama2", with_model(root, models["llama"]), args, TokenizerOptions(), embedding_rows=402)
    assert any("<a>" in line and "whole" in line for line in plan.report)


def test_overrides(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    """They reach the tokenizer, what it sets around a sequence, and the ids for both configs."""
    args = {"new_tokens": True, "vocab_extra_ids_list": "<|im_end|>,x=y"}
    overrides = ("eos=<|im_end|>", "bos=x=y", "pad=<unk>", "unk=<CLS>", "sep=<EOD>")
    ids = {"bos": 406, "eos": 405, "pad": 0, "unk": 400, "sep": 402, "cls": 400, "mask": 403}
    folders = [
        with_model(root, models["llama"]),
        tiny.hub_folder(tmp_path / "hub", models["llama"], "LlamaTokenizer", None),
    ]
    for i, folder in enumerate(folders):
        options = TokenizerOptions(override_special_tokens=overrides)
        generation = {"eos_token_id": [2, 7]}
        plan = plan_tokenizer("llama2", folder, args, options, embedding_rows=407, generation=generation)
        assert plan.config_overrides == {"eos_token_id": 405, "bos_token_id": 406, "pad_token_id": 0}
        assert {key: index for key, (_, index) in plan.token_ids.items()} == ids
        assert any("[2, 7]" in line for line in plan.report)
        loaded = export(plan, tmp_path / f"out{i}")
        assert {key: getattr(loaded, f"{key}_token_id") for key in ids} == ids
        assert loaded.encode("the")[0] == 406
        assert loaded.get_vocab() == plan.vocabulary
    assert plan_tokenizer("llama2", root, args, TokenizerOptions(), embedding_rows=407).config_overrides == {}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("eos", ("'eos'", "KEY=TOKEN")),
        ("eos=", ("'eos='", "KEY=TOKEN")),
        ("eod=<a>", ("'eod'", "bos, eos, pad, unk, cls, sep, mask")),
        ("eos=<nowhere>", ("'<nowhere>'", "<CLS>, <SEP>, <EOD>, <MASK>, <PAD>", "<a>")),
    ],
)
def test_wrong_overrides_are_refused(
    models: dict[str, Path], root: Path, override: str, words: tuple[str, ...]
) -> None:
    options = TokenizerOptions(override_special_tokens=("pad=<PAD>", override, "key=<s>"))
    args = {"new_tokens": True, "vocab_extra_ids_list": "<a>"}
    fails(*words, "'key'", checkpoint=with_model(root, models["llama"]), args=args, options=options)
    options = TokenizerOptions(override_special_tokens=("eos=<a>", "eos=<s>"))
    fails("twice", checkpoint=root, args=args, options=options)


def test_every_id_needs_a_row(models: dict[str, Path], root: Path) -> None:
    checkpoint = with_model(root, models["llama"])
    args = {"new_tokens": True, "vocab_extra_ids": 1, "vocab_extra_ids_list": "<a>"}
    assert plan_tokenizer("llama2", checkpoint, args, TokenizerOptions(), embedding_rows=407).ids == 407
    words = ("1 token has no row", "406 rows", "<a> = 406", "--vocab_extra_ids_list", "--true_vocab_size")
    fails(*words, checkpoint=checkpoint, args=args, rows=406)
    fails(
        "<CLS> = 400", "5 tokens", "--no_new_tokens", "<extra_id_0> = 405", checkpoint=checkpoint, args=args, rows=400
    )
    fails("1 token", "= 399", "--vocab_file", checkpoint=checkpoint, rows=399)


def test_ids_that_contradict_training_are_refused(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    """A chat model's own tokens are unknown to Megatron-LLM: kept untouched, refused where training used their ids."""
    source = tiny.hub_folder(
        root, models["llama"], "LlamaTokenizer", None, added={"<|im_start|>": 400, "<|im_end|>": 401}
    )
    assert plan_tokenizer("llama2", source, {}, TokenizerOptions(), embedding_rows=402).ids == 402
    behind = plan_tokenizer("llama2", source, {}, TokenizerOptions(), embedding_rows=401)  # as fine-tunes have them
    assert ["<|im_end|> = 401" in line for line in behind.warnings] == [True]
    new = {"new_tokens": True}
    fails("<|im_start|> is 400", "was <CLS>", "--no_new_tokens", "--vocab_extra_ids_list", checkpoint=source, args=new)
    fails("<|im_start|> is 400, in training 401", checkpoint=source, args={"vocab_extra_ids_list": "<a>,<|im_start|>"})
    same = {"vocab_extra_ids_list": "<|im_start|>,<|im_end|>,<a>"}
    loaded = export(plan_tokenizer("llama2", source, same, TokenizerOptions(), embedding_rows=403), tmp_path / "out")
    assert loaded.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<a>"]) == [400, 401, 402]

    data = json.loads((source / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (source / "tokenizer.json").write_text(json.dumps(data))
    fails(f"{first} is", "in training", "--vocab_file", checkpoint=source)


def test_settings_that_name_missing_tokens_are_refused(models: dict[str, Path], root: Path) -> None:
    source = tiny.hub_folder(root, models["llama"], "LlamaTokenizer", None)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<none>"}))
    fails("<none> as pad_token", "--override_special_tokens", checkpoint=source)
    options = TokenizerOptions(override_special_tokens=("pad=</s>",))
    assert plan_tokenizer("llama2", source, {}, options, embedding_rows=400).token_ids["pad"] == ("</s>", 2)


def test_where_the_tokenizer_is_looked_for(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    def source(checkpoint: Path, args: dict[str, Any] | None = None, **call: Any) -> TokenizerPlan:
        options = TokenizerOptions(vocab_file=call.pop("vocab_file", None))
        return plan_tokenizer("llama2", checkpoint, args or {}, options, embedding_rows=512, **call)

    fails(str(root), "--vocab_file", "--no_tokenizer", checkpoint=root)
    fails(
        "/gone/t.model", checkpoint=root, args={"vocab_file": "/gone/t.model"}, fetch=lambda *_: pytest.fail("a guess")
    )
    fails(
        "no token", "meta-llama", checkpoint=root, fetch=lambda *_: (_ for _ in ()).throw(ConversionError("no token"))
    )
    fails("not there", checkpoint=root, options=TokenizerOptions(vocab_file=tmp_path / "gone"))

    llama, padded = models["llama"], models["padded"]
    assert source(root, vocab_file=llama).copied["tokenizer.model"] == llama
    assert source(root, {"vocab_file": str(llama)}).copied["tokenizer.model"] == llama
    hub = tiny.hub_folder(tmp_path / "hub", llama, "LlamaTokenizer", False)
    assert source(root, search=[tmp_path, hub]).copied["tokenizer.json"] == hub / "tokenizer.json"
    assert source(root, fetch=lambda *_: hub).copied["tokenizer.json"] == hub / "tokenizer.json"
    # A lone tokenizer.model takes the settings that import left in the checkpoint, if it is the same file.
    assert source(hub, vocab_file=llama).copied["tokenizer_config.json"] == hub / "tokenizer_config.json"
    assert "tokenizer_config.json" in source(hub, vocab_file=padded).written
    with_model(root, padded)
    assert source(root, search=[hub]).copied["tokenizer.model"] == root / "tokenizer.model"
    fails(str(llama), "different", "--vocab_file", checkpoint=root, args={"vocab_file": str(llama)})
    assert source(root, {"vocab_file": str(llama)}, vocab_file=llama).copied["tokenizer.model"] == llama


def test_only_tokenizer_json(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    source = tiny.hub_folder(root, models["llama"], "LlamaTokenizer", None)
    (source / "tokenizer.model").unlink()
    fails("tokenizer.model", "--no_new_tokens", checkpoint=source, args={"new_tokens": True})
    plan = plan_tokenizer("llama2", source, {"vocab_extra_ids_list": "<a>"}, TokenizerOptions(), embedding_rows=401)
    assert export(plan, tmp_path / "out").convert_tokens_to_ids("<a>") == 400


def test_files_that_are_no_tokenizer(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    (root / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    fails("Git LFS", checkpoint=root)
    (root / "tokenizer.model").write_bytes(b"\x00\x01 something else")
    fails("not a sentencepiece model", checkpoint=root)
    with_model(root, models["llama"])
    (root / "tokenizer_config.json").write_text("[")
    fails("not readable as JSON", "tokenizer_config.json", "--vocab_file", checkpoint=root)
    (root / "tokenizer_config.json").write_text("{}")
    fails("empty token", checkpoint=root, options=TokenizerOptions(vocab_extra_ids_list="<a>,"))
    other = tiny.train(tmp_path / "other.model", normalization_rule_name="nmt_nfkc")
    fails("Llama's settings", "tokenizer.json", checkpoint=tmp_path, options=TokenizerOptions(vocab_file=other))


def test_source_tokenizer_files(models: dict[str, Path], tmp_path: Path) -> None:
    hub = tiny.hub_folder(tmp_path / "hub", models["llama"], "LlamaTokenizer", None)
    (hub / "added_tokens.json").write_text("{}")
    (hub / "config.json").write_text("{}")
    names = [path.name for path in source_tokenizer_files(hub)]
    assert names == [
        "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    ]  # fmt: skip
    meta = tmp_path / "meta" / "7B"
    meta.mkdir(parents=True)
    (meta / "params.json").write_text("{}")
    assert source_tokenizer_files(meta) == ()
    (meta.parent / "tokenizer.model").write_bytes(b"parent")
    assert source_tokenizer_files(meta) == (meta.parent / "tokenizer.model",)
    (meta / "tokenizer.model").write_bytes(b"own")
    assert source_tokenizer_files(meta) == (meta / "tokenizer.model",)
    (tmp_path / "plain").mkdir()
    assert source_tokenizer_files(tmp_path / "plain") == ()


def test_neither_transformers_nor_protobuf_is_needed(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    """Planning a tokenizer from tokenizer.model; importing the module needs no tokenizer library at all."""
    (tmp_path / "out").mkdir()
    program = """
import json, sys
from pathlib import Path
for name in ("google.protobuf", "transformers", "tiktoken"):
    sys.modules[name] = None
from weights_conversion.tokenizer import TokenizerOptions, plan_tokenizer
assert "sentencepiece" not in sys.modules and "tokenizers" not in sys.modules
plan = plan_tokenizer("llama", Path(sys.argv[1]), {"new_tokens": True}, TokenizerOptions(), embedding_rows=405)
text = json.dumps(plan.written["tokenizer.json"])
(Path(sys.argv[2]) / "tokenizer.json").write_text(text)
"""
    command = [sys.executable, "-c", program, str(with_model(root, models["llama"])), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "tokenizer.json").is_file()
