"""Both models run in lockstep on the same prompts, straight from their stored tensors, until they part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from weights_conversion.config import ModelConfig
from weights_conversion.engine import progress
from weights_conversion.engine.streams import Source
from weights_conversion.errors import ConversionError
from weights_conversion.verification import forward, linear, predicting
from weights_conversion.verification.conventions import CONVENTIONS, Convention, block_of
from weights_conversion.verification.forward import Weights
from weights_conversion.verification.reached import Read
from weights_conversion.verification.sides import NUMBER_FIELDS, Model, shown
from weights_conversion.verification.stored import head_of, rounded, weights_of
from weights_conversion.verification.unloaded import SENTENCE, is_unloaded

# Float32 sums in another order differ by about 1e-6 of the spread of values; mistakes of layout by the spread itself.
BOUND = 1e-3
Begins = Callable[[int], None]
MAX_EXCHANGES = 28  # pairs of tensor ranks that are tried: all of them up to TP 8


@dataclass(frozen=True)
class Numeric:
    """`error` is the largest seen, of `stage` and `layer`; where the sides part, that is the first stage beyond BOUND.

    Errors are of single values, divided by the root mean square of the stage (plus the value itself).
    """

    same: bool
    stage: str
    layer: int | None
    error: float
    logits_error: float | None
    cause: str | None
    prompts: tuple[int, int]
    errors: tuple[float, ...] = ()  # the largest of the embedding, of each layer, and behind the layers
    experts: tuple[int, int] | None = None  # of all layers: those that a token reached, and all that there are

    def sentence(self) -> str:
        at = f"layer {self.layer} {self.stage}" if self.layer is not None else self.stage
        prompts = f"{self.prompts[0]} prompts of {self.prompts[1]} tokens"
        if self.same and self.error == 0:
            return f"all stages are bit for bit the same on {prompts}"
        if self.same:
            return (
                f"all stages agree on {prompts}; largest error {self.error:.1e} of the values' spread ({at}): rounding"
            )
        return f"the sides part at {at}: error {self.error:.1e} of the values' spread on {prompts}"


@dataclass(frozen=True)
class Runner:
    """One side as the forward pass sees it; `replace` makes hypotheses."""

    config: ModelConfig
    convention: Convention
    weights: Weights
    head: str | None = None

    positions: Tensor | None = None

    def trace(self, tokens: Tensor) -> Iterator[forward.Stage]:
        where = self.positions
        return forward.trace(self.config, self.convention, self.weights, tokens, head=self.head, positions=where)

    def layer(self, index: int, hidden: Tensor) -> dict[str, Tensor]:
        stages = forward.layer(self.config, self.convention, self.weights, index, hidden, self.positions)
        return {stage: output for stage, _, output in stages}


def error_of(a: Tensor, b: Tensor) -> float:
    """The largest error of a value, in units of the spread; NaN on both sides is none, on one side it is infinite."""
    if torch.equal(a, b):
        return 0.0
    spread = a[a.isfinite()].square().mean().sqrt()
    error = (a - b).abs() / (a.abs() + spread)
    agree = (a == b) | (a.isnan() & b.isnan())
    return float(error.nan_to_num(nan=1e30, posinf=1e30).masked_fill(agree, 0.0).max())


def compare(
    source: Model, checkpoint: Model, vocabulary: int, workers: int, begins: Begins = lambda _: None
) -> Numeric:
    """Runs the default prompts on both sides. Memory: the prompts' hidden states and a few blocks of weights.

    `begins` is told each layer's number before it is run, and the number of layers before what follows.
    """
    files = Source()
    try:
        with torch.inference_mode(), linear.threads(workers):
            return _compare(source, checkpoint, vocabulary, files, begins)
    finally:
        files.close()


def _runner(model: Model, other: Model, vocabulary: int, files: Source) -> Runner:
    config = replace(model.config, vocab_size=vocabulary)
    weights = rounded(weights_of(model, files), model, other)
    return Runner(config, CONVENTIONS[model.kind], weights, head_of(model))


def _compare(source: Model, checkpoint: Model, vocabulary: int, files: Source, begins: Begins) -> Numeric:
    of_source = _runner(source, checkpoint, vocabulary, files)
    of_checkpoint = _runner(checkpoint, source, vocabulary, files)
    tokens = forward.default_prompts(forward.shorter_window(of_source.config, of_checkpoint.config))
    shape = (tokens.shape[0], tokens.shape[1])
    read = Read(of_source.weights)
    # One side's scaling suffices: where the other lost it, the sides part at far positions.
    sides = of_source, of_checkpoint
    positions = max((forward.default_positions(run.config, shape[1]) for run in sides), key=lambda at: at[-1])
    of_source = replace(of_source, positions=positions, weights=read)
    of_checkpoint = replace(of_checkpoint, positions=positions)
    largest: tuple[float, str, int | None] = (0.0, "embedding", None)
    hidden, error, parted = torch.empty(0), 0.0, None
    state = hidden  # what a prediction layer begins with
    trunk = of_source.config.num_layers
    layers = trunk + len(predicting.numbers(of_source.convention.title, of_source.config))
    errors = [0.0] * (layers + 2)
    with progress.bar(layers + 2, doing="running both models", unit="step") as advance:
        for (stage, layer, a), (_, _, b) in zip(of_source.trace(tokens), of_checkpoint.trace(tokens), strict=True):
            error = error_of(a, b)
            place = layer + 1 if layer is not None else 0 if stage == "embedding" else layers + 1
            errors[place] = max(errors[place], error)
            if error > BOUND and parted is None:  # what follows shows how it goes on
                again = replace(of_source, weights=read.weights)  # what a hypothesis reads, no token reached
                causes = Causes(source, checkpoint, again, of_checkpoint, files)
                cause = causes.find(stage, layer, tokens, hidden if layer is None or layer < trunk else state, b)
                parted = Numeric(False, stage, layer, error, None, cause, shape)
            largest = max(largest, (error, stage, layer), key=lambda entry: entry[0])
            if stage in ("joined", "final_norm"):
                state = a
            if stage in ("embedding", "final_norm") or (stage == "layer" and layer is not None and layer < trunk):
                hidden = a
                begins(0 if stage == "embedding" else trunk if layer is None else layer + 1)
            if stage in ("embedding", "layer", "logits"):
                advance(1)
    found = parted or Numeric(True, largest[1], largest[2], largest[0], error, None, shape)
    return replace(found, errors=tuple(errors), experts=read.experts(of_source.config, of_source.convention))


@dataclass(frozen=True)
class Causes:
    """Tries what a writer may have done wrong, one thing at a time, from the point where the sides still agreed."""

    source: Model
    checkpoint: Model
    of_source: Runner
    of_checkpoint: Runner
    files: Source

    def find(self, stage: str, layer: int | None, tokens: Tensor, hidden: Tensor, found: Tensor) -> str | None:
        if stage == "joined" and layer is not None:
            return self._joined(layer, tokens, hidden, found)
        if layer is not None and stage != "prediction":
            return self._layer(stage, layer, hidden)
        if stage == "embedding":
            return self._embedding(tokens)
        return self._end(stage, layer, hidden, found)

    def _layer(self, stage: str, layer: int, hidden: Tensor) -> str | None:
        wanted = self.of_source.layer(layer, hidden)
        for sentence, runner, index in self._hypotheses(layer):
            if self._agrees(runner, index, hidden, wanted, stage):
                return sentence
        # The mistake may as well be the source's.
        wanted = self.of_checkpoint.layer(layer, hidden)
        for sentence, runner in _conventions(self.of_source):
            if self._agrees(runner, layer, hidden, wanted, stage):
                return f"{sentence} (in the source)"
        return self._unloaded(stage, layer)

    def _unloaded(self, stage: str, layer: int | None) -> str | None:
        run = self.of_checkpoint
        return SENTENCE if is_unloaded(run.config, run.convention, run.weights, stage, layer) else None

    def _agrees(self, runner: Runner, index: int, hidden: Tensor, wanted: dict[str, Tensor], until: str) -> bool:
        """Whether all stages agree as far as `until`. What asks for tensors that a model has not does not fit it."""
        stages = forward.layer(runner.config, runner.convention, runner.weights, index, hidden, runner.positions)
        try:
            for stage, _, output in stages:
                if stage not in wanted or error_of(wanted[stage], output) > BOUND:
                    return False
                if stage == until:
                    return True
        except ConversionError:
            pass
        return False

    def _hypotheses(self, layer: int) -> Iterator[tuple[str, Runner, int]]:
        yield from ((sentence, runner, layer) for sentence, runner in self._configs())
        yield from ((sentence, runner, layer) for sentence, runner in _conventions(self.of_checkpoint))
        yield from ((sentence, runner, layer) for sentence, runner in self._ranks())
        delta = self.of_checkpoint.config.gated_delta
        for other in range(self.of_checkpoint.config.num_layers):
            alike = delta is None or layer >= len(delta.layers) or delta.layers[other] == delta.layers[layer]
            if other != layer and alike:
                yield f"layer {layer}'s weights stand at layer {other} of the checkpoint", self.of_checkpoint, other

    def _configs(self) -> Iterator[tuple[str, Runner]]:
        for name in NUMBER_FIELDS:
            of_source, of_checkpoint = getattr(self.of_source.config, name), getattr(self.of_checkpoint.config, name)
            if of_source != of_checkpoint:
                config = replace(self.of_checkpoint.config, **{name: of_source})
                yield (
                    f"{name} is {shown(of_source)} in the source and {shown(of_checkpoint)} in the checkpoint",
                    replace(self.of_checkpoint, config=config),
                )

    def _ranks(self) -> Iterator[tuple[str, Runner]]:
        model = self.checkpoint
        if model.files is None or model.files.parallel.tensor == 1:
            return
        count = model.files.parallel.tensor
        if block_of(self.of_checkpoint.config).gated:
            weights = rounded(weights_of(model, self.files, halves=False), model, self.source)
            yield "gate and up were cut among the ranks as one block", replace(self.of_checkpoint, weights=weights)
        for one, two in list(combinations(range(count), 2))[:MAX_EXCHANGES]:
            order = list(range(count))
            order[one], order[two] = two, one
            for only in ("", *_layer_names(self.of_checkpoint)):
                weights = rounded(weights_of(model, self.files, order, only), model, self.source)
                where = f" in {only}" if only else ""
                yield f"tensor ranks {one} and {two} are exchanged{where}", replace(self.of_checkpoint, weights=weights)

    def _joined(self, layer: int, tokens: Tensor, hidden: Tensor, found: Tensor) -> str | None:
        """Of the first prediction layer, which takes the last hidden state."""
        tokens = tokens.roll(-1, dims=1)
        tokens[:, -1] = 0
        run = replace(self.of_source, convention=replace(self.of_source.convention, embedding_first=False))
        exchanged = forward.joined(run.config, run.convention, run.weights, layer, tokens, hidden)
        return "the halves of eh_proj are exchanged" if error_of(found, exchanged) <= BOUND else None

    def _embedding(self, tokens: Tensor) -> str | None:
        wanted = forward.embed(self.of_source.config, self.of_source.convention, self.of_source.weights, tokens)
        for sentence, runner in self._ranks():
            found = forward.embed(runner.config, runner.convention, runner.weights, tokens)
            if error_of(wanted, found) <= BOUND:
                return sentence
        return None

    def _end(self, stage: str, layer: int | None, hidden: Tensor, found: Tensor) -> str | None:
        """`hidden` is the last agreed state: the last layer's output, or the final norm's."""
        if stage in ("final_norm", "prediction"):
            return self._unloaded(stage, layer)
        wanted = _logits(self.of_source, hidden)
        for sentence, runner in self._ranks():
            if error_of(wanted, _logits(runner, hidden)) <= BOUND:
                return sentence
        names = self.of_source.convention.names_for(self.of_source.config)
        if error_of(found, _logits(replace(self.of_source, head=names.embedding), hidden)) <= BOUND:
            return "the checkpoint's head is the embedding: tied by mistake"
        return None


def _logits(runner: Runner, hidden: Tensor) -> Tensor:
    names, config = runner.convention.names_for(runner.config), runner.config
    name = runner.head or (names.embedding if config.tie_word_embeddings else names.head)
    step = max(linear.BLOCK_ELEMENTS // config.hidden_size, 1)
    blocks = (slice(start, min(start + step, config.vocab_size)) for start in range(0, config.vocab_size, step))
    return torch.cat([hidden @ runner.weights(name, rows).float().T for rows in blocks], dim=-1)


def _conventions(runner: Runner) -> Iterator[tuple[str, Runner]]:
    convention, names = runner.convention, runner.convention.names
    flips = [
        ("the rotary order of q and k is the other one", {"interleaved_rotary": not convention.interleaved_rotary}),
        ("gate and up are swapped", {"gate_first": not convention.gate_first}),
        ("q, k and v are not grouped: all of q, then k, then v", {"grouped_qkv": not convention.grouped_qkv}),
        ("the biases of q, k and v are not grouped: all of q, then k, then v", {"grouped_bias": False}),
        ("the norms of q and k are exchanged", {"names": replace(names, q_norm=names.k_norm, k_norm=names.q_norm)}),
        (
            "rotary order, and gate and up are swapped",
            {
                "interleaved_rotary": not convention.interleaved_rotary,
                "gate_first": not convention.gate_first,
            },
        ),
    ]
    for sentence, change in flips:
        yield sentence, replace(runner, convention=replace(convention, **change))


def _layer_names(runner: Runner) -> tuple[str, ...]:
    names = runner.convention.names_for(runner.config)
    return (*names.qkv, *names.qkv_bias, names.dense, *names.mlp_in, names.mlp_out)
