"""Learns a topology from a frozen model and texts: the steps of each method, in order."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgeon.compiler.forecast.learning import Counts, descending_stages, forecast, learning_stages, seconds_of_prompt
from surgeon.compiler.learn.budget.budget import Learned, learn_pattern
from surgeon.compiler.learn.measure.checkpoint import check_decoder, frozen, model_shape
from surgeon.compiler.learn.measure.checkpoint_store import CheckpointStore
from surgeon.compiler.learn.measure.runs import Runs
from surgeon.compiler.learn.patterns.pattern import Grid, Pattern
from surgeon.compiler.learn.patterns.reach import blocks_of, measured_blocks
from surgeon.compiler.learn.patterns.to_topology import pattern_topology, scaled
from surgeon.compiler.learn.patterns.windows import uniform_windows
from surgeon.compiler.learn.routing.retrieve import retrieve
from surgeon.compiler.learn.routing.routed import NEAR_TOKENS
from surgeon.compiler.learn.routing.ways import routed
from surgeon.compiler.learn.texts.questions import with_questions
from surgeon.compiler.learn.texts.text import Sequences, TokenText, divide
from surgeon.compiler.learn.ultrametric.descent import Settings, Trained, train_digits
from surgeon.compiler.learn.ultrametric.lower import lowered
from surgeon.compiler.system.stages import Forecast, expect
from surgeon.compiler.system.terminal import Progress
from surgeon.compiler.topology.topology import Topology, mean_density
from surgeon.runtime.errors import ModelError, TopologyError, short_repr
from surgeon.runtime.evaluate.processes import processes_of
from surgeon.runtime.package.manifest import ModelShape
from surgeon.runtime.transformers.fingerprint import fingerprint, weights_id

ANSWERS = "answers"
TEXT = "text"
CONVERTED = "convert"
LEARNED = "learned"


@dataclass(frozen=True)
class Request:
    """A request for a topology. Density is visible pairs over causal pairs of blocks; lengths and blocks are in tokens.

    `measured_length` is the length of the sequences that are learned on; windows are scaled from it to `length`. With
    `cuts`, heads may also get clusters, which are tied to their length and cannot be scaled. `settings` are for the
    method "ultrametric", whose heads have clusters as well.

    `purpose` is "answers" or "text". For answers, as under dense recall, what counts is the effect of a prompt's
    pattern on the tokens that follow it, while the prompt's end and these tokens see everything; for text, its effect
    on every token, each of which follows the pattern. Only the method "budget" learns for answers, and does so by
    default. With `questions`, the texts for answers also hide facts and end with questions about them.

    `route` is "convert", "learned" or None. To convert is to let every head choose as many blocks by content as its
    window has beyond the nearest ones, if the validation text is then followed better. If it is learned, the quarter of
    the heads that retrieve first get windows that are long enough for it, which the other heads' windows pay for. All
    rows follow such a pattern, so it is learned for text.
    `windows` is a topology whose windows are taken, scaled to the length, instead of being learned; its blocks have the
    request's size. Without a route, they stay for what they were learned for. `near` is the number of tokens that stay
    the window of a head with a route; if it is None, those of `NEAR_TOKENS` that follow validation text best.
    """

    density: float
    length: int
    block_size: int = 64
    method: str = "budget"
    seed: int = 0
    sink: int = 1
    measured_length: int | None = None
    cuts: bool = False
    settings: Settings = field(default_factory=Settings)
    purpose: str | None = None
    route: str | None = None
    windows: Topology | None = None
    questions: bool = False
    near: int | None = None

    def grid(self, blocks: int) -> Grid:
        """The grid for sequences of so many blocks.

        Raises:
            TopologyError: the method does not learn for the purpose.
        """
        budget = self.method == "budget"
        learned_for = None if self.windows is None else self._checked_purpose(self.windows)
        if self.route not in (None, CONVERTED, LEARNED):
            raise TopologyError("--route", "convert or learned", short_repr(self.route), "leave it out for none")
        if self.route is not None and (self.purpose == ANSWERS or not budget or self.cuts):
            raise TopologyError(
                f"--route {self.route}",
                "--method budget and --for text, without --cuts",
                "another of these",
                "leave that out",
            )
        if self.near is not None and (self.route is None or self.near < self.block_size):
            raise TopologyError(
                "--near", f"--route, and at least a block of {self.block_size} tokens", str(self.near), "leave it out"
            )
        if self.purpose == ANSWERS and not budget:
            raise TopologyError("--for answers", "--method budget", f"--method {self.method}", "choose one of the two")
        text = TEXT in (self.purpose, learned_for) or self.route is not None or not budget
        make = Grid if text else Grid.for_answers
        return make(self.block_size, blocks, self.sink, self.density)

    def _checked_purpose(self, windows: Topology) -> str | None:
        """The purpose that given windows were learned for, None if they do not say, once they fit the request.

        Raises:
            TopologyError: they do not.
        """
        if windows.block_size != self.block_size:
            raise TopologyError(
                "--windows",
                f"--block {windows.block_size}, as the topology has it",
                f"--block {self.block_size}",
                "leave --block out",
            )
        if self.method != "budget" or self.cuts or self.questions:
            raise TopologyError(
                "--windows", "--method budget, without --cuts and --questions", "another of these", "leave that out"
            )
        if self.route is not None and windows.router is not None:
            raise TopologyError(
                "--windows",
                "with --route, a topology of windows alone",
                "one that has routes",
                "name the one that they were made of, or leave --route out",
            )
        purpose: str | None = windows.provenance.get("for")
        if self.route is None and purpose is not None and self.purpose not in (None, purpose):
            raise TopologyError(
                "--windows", f"--for {purpose}, as its windows", f"--for {self.purpose}", "leave --for out"
            )
        return purpose

    @property
    def measured_blocks(self) -> int:
        """The number of blocks in the sequences that are learned on; raises a TopologyError as `learn`."""
        clusters = self.cuts or self.method == "ultrametric"
        return measured_blocks(self.length, self.measured_length, self.block_size, clusters)


@dataclass(frozen=True)
class Effort:
    """Numbers of sequences per text: to measure costs on, to validate on, and fresh ones for each round of refinement.

    `cuts` is the number to propose cuts on, and the same number again is used to admit them.
    """

    calibrate: int = 2
    validate: int = 1
    refine: tuple[int, ...] = (1, 1, 1)
    cuts: int = 1


def learn(
    model: PreTrainedModel,
    texts: Sequence[TokenText],
    request: Request,
    effort: Effort | None = None,
    work: Path | None = None,
    progress: Progress | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Topology:
    """Learns a topology for a frozen model, without changing its weights.

    With `questions`, about half of the sequences for answers end with questions about facts hidden in them. That and
    learned routes need the model's tokenizer.
    `work` is a folder that keeps finished steps: a run that finds its steps there continues, with the same result.
    If torch.distributed has several processes, they share the sequences, and all return the same topology. They may
    share a folder, but need not.

    Raises:
        ModelError: the model is not a decoder with full attention, or a text holds too few sequences.
        TopologyError: a length is not a multiple of the block, or the density is out of reach.
    """
    check_decoder(model)
    if (request.route == LEARNED or request.questions) and tokenizer is None:
        raise ModelError("learn", "the model's tokenizer, to hide facts in texts", "none", "pass tokenizer")
    blocks = blocks_of(request.length, request.block_size)
    measured = request.measured_blocks
    started, started_cpu = time.perf_counter(), time.process_time()
    weights = fingerprint(model)
    provenance: dict[str, Any] = {
        "method": request.method,
        "model": Path(model.config.name_or_path or type(model).__name__).name,
        "weights_sha256": weights,
        "requested_density": request.density,
    }
    shape = dataclasses.replace(model_shape(model), weights_sha256=weights_id(model))
    size = (shape.num_hidden_layers, shape.num_attention_heads)
    if request.method == "window":
        grid = request.grid(blocks)
        equal = Pattern(uniform_windows(*size, blocks, request.sink, request.density))
        topology = pattern_topology(shape, grid, equal, provenance)
        return _with_provenance(topology, {"density": round(mean_density(topology), 5)})

    uniform_windows(*size, measured, request.sink, request.density)  # refuses a density out of reach before the work
    grid = request.grid(measured)
    sequences, questions = divided(texts, request, effort), 0
    if tokenizer is not None and request.questions and grid.asking:
        sequences, questions = with_questions(sequences, tokenizer, grid.scored, request.seed)
    store = CheckpointStore(work)
    identity: dict[str, object] = {"weights": weights}
    with frozen(model):
        runs = Runs(model, grid, store, identity, progress)
        if request.windows is None or request.route is not None:
            expect(progress, partial(_forecast, model, request, sequences))
        if request.method == "ultrametric":
            fresh = [*sequences.calibrate, *(tokens for each in sequences.refine for tokens in each)]
            trained = train_digits(model, fresh, grid, size, request.settings, request.seed, store, identity, progress)
            changes_of = partial(runs.mask_changes, sequences=sequences.calibrate, what="lowering cuts")
            pattern = lowered(trained.pattern, grid, changes_of)
            topology = _of_pattern(pattern, shape, grid, blocks, provenance)
            figures = _trained_figures(trained, pattern, runs, sequences, grid, size)
        elif request.windows is not None:
            topology = _given(request.windows, shape, blocks, provenance)
            figures = {"windows_of": request.windows.sha256, "heads_with_a_cut": 0}
        else:
            learned = learn_pattern(runs, sequences, grid, size, request.seed)
            topology = _of_pattern(learned.pattern, shape, grid, blocks, provenance)
            figures = _figures(learned)
        if request.route is not None:
            retrieval = None
            if request.route == LEARNED and tokenizer is not None:
                retrieval = retrieve(
                    model, tokenizer, sequences.calibrate, grid, request.seed, store, identity, progress
                )
            near = NEAR_TOKENS if request.near is None else (request.near,)
            routes = routed(model, runs, topology, retrieval, request.density, near, sequences, progress)
            topology, figures["routes"] = routes.topology, routes.figures(retrieval)
    own = (store.computed, store.found, time.process_time() - started_cpu + store.found_seconds)
    computed, found, cpu_seconds = processes_of(model).totals(own)
    measured_on: dict[str, Any] = {
        "measured_length": measured * request.block_size,
        "texts": [{"name": text.name, "sha256": text.sha256, "tokens": len(text.tokens)} for text in texts],
        "sequences": {
            "calibrate": len(sequences.calibrate),
            "validate": len(sequences.validate),
            "refine": [len(fresh) for fresh in sequences.refine],
            "with_questions": questions,
        },
    }
    if request.windows is not None and request.route is None:  # nothing was measured but what their learner measured
        measured_on = {name: value for name, value in request.windows.provenance.items() if name in measured_on}
    return _with_provenance(
        topology,
        {
            "seed": request.seed,
            "for": ANSWERS if grid.asking else TEXT,
            "density": round(mean_density(topology), 5),
            **measured_on,
            **figures,
            "steps": {"computed": int(computed), "found": int(found)},
            "seconds": round(time.perf_counter() - started, 1),
            "cpu_seconds": round(cpu_seconds, 1),
        },
    )


def _of_pattern(pattern: Pattern, shape: ModelShape, grid: Grid, blocks: int, provenance: dict[str, Any]) -> Topology:
    """The topology of a pattern that was measured on a grid, scaled to so many blocks."""
    topology = pattern_topology(shape, grid, pattern, provenance)
    return topology if blocks == grid.blocks else scaled(topology, blocks)


def _given(windows: Topology, shape: ModelShape, blocks: int, provenance: dict[str, Any]) -> Topology:
    """The windows of a topology that was learned before, for a model of this shape.

    Raises:
        TopologyError: it is for another model, or has clusters.
    """
    if dataclasses.replace(windows.model, weights_sha256=shape.weights_sha256) != shape:
        raise TopologyError("--windows", f"a topology for {shape}", f"one for {windows.model}", "name another")
    return dataclasses.replace(scaled(windows, blocks), model=shape, provenance=provenance)


def _forecast(model: PreTrainedModel, request: Request, sequences: Sequences) -> Forecast:
    descending = request.method == "ultrametric"
    learns = request.windows is None
    counts = Counts(
        calibrate=len(sequences.calibrate) if learns else 0,
        validate=len(sequences.validate),
        refine=tuple(len(fresh) for fresh in sequences.refine) if learns else (),
        cuts=max(map(len, sequences.cuts), default=0),
        descents=request.settings.steps * request.settings.batch if descending else 0,
        documents=len(sequences.calibrate) if request.route == LEARNED else 0,
        keys=0 if request.route is None else len(sequences.calibrate),
    )
    prompt = sequences.validate[0]
    stages = descending_stages if descending else learning_stages
    return forecast(stages(counts, seconds_of_prompt(model, prompt)), model, prompt.shape[1])


def divided(texts: Sequence[TokenText], request: Request, effort: Effort | None = None) -> Sequences:
    """The sequences that a request reads of texts, by use.

    Raises:
        ModelError: a text holds too few of them.
        TopologyError: as `learn`.
    """
    effort = effort or Effort()
    return divide(
        texts,
        request.measured_blocks * request.block_size,
        effort.calibrate,
        effort.validate,
        effort.refine,
        request.seed,
        effort.cuts if request.cuts else 0,
    )


def _figures(learned: Learned) -> dict[str, Any]:
    return {
        "validation": _validation(learned.divergence, learned.uniform_divergence),
        "windows": {"least": int(learned.pattern.windows.min()), "most": int(learned.pattern.windows.max())},
        "rounds": [dataclasses.asdict(step) for step in learned.rounds],
        "cut_rounds": [dataclasses.asdict(step) for step in learned.cut_rounds],
        "heads_with_a_cut": len(learned.pattern.cuts),
    }


def _trained_figures(
    trained: Trained, pattern: Pattern, runs: Runs, sequences: Sequences, grid: Grid, size: tuple[int, int]
) -> dict[str, Any]:
    equal = Pattern(uniform_windows(*size, grid.blocks, grid.sink, grid.density))
    divergence = runs.validate(pattern, sequences.validate, "the learned trees")
    return {
        "validation": _validation(divergence, runs.validate(equal, sequences.validate, "equal windows")),
        "steps_descended": len(trained.divergences),
        "last_divergence": trained.divergences[-1],
        "heads_with_a_cut": len(pattern.cuts),
        "cuts_lowered": sum(pattern.cuts.get(place) != cut for place, cut in trained.pattern.cuts.items()),
    }


def _validation(divergence: float, equal_windows: float) -> dict[str, Any]:
    ratio = round(divergence / equal_windows, 4) if equal_windows else None
    return {"divergence": divergence, "equal_windows": equal_windows, "ratio": ratio}


def _with_provenance(topology: Topology, more: dict[str, Any]) -> Topology:
    return dataclasses.replace(topology, provenance={**topology.provenance, **more})
