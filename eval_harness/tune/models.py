"""Answers the search's questions with a model, and keeps every answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from eval_harness import machine
from eval_harness.asking import FULL
from eval_harness.clock import Clock
from eval_harness.provenance import source, versions
from eval_harness.resume import Part, measured
from eval_harness.stages import parts
from eval_harness.sweep.asker import Asked as Shown
from eval_harness.sweep.asker import Asker, Unusable
from eval_harness.sweep.metrics import metric_of
from eval_harness.sweep.plan import SweepPlan
from eval_harness.sweep.settings import Setting
from eval_harness.tune.budget import Budget, OutOfTime
from eval_harness.tune.costs import Meter
from eval_harness.tune.judge import HELD_OUT, SEARCH, Cost, Scores
from eval_harness.tune.plan import FLOPS, TunePlan
from eval_harness.tune.samples import Asked, Samples
from vlmcompress.core.errors import ConfigError, UnsupportedInputError, VLMCompressError

_REQUESTS = 4  # questions that are timed in turn
_FRESH_ROUNDS = 12  # at least, in the test of a ceiling
_WARMUP = 1


@dataclass(frozen=True)
class ModelJudge:
    """A model, its processor and the user's questions.

    Attributes:
        model: unpatched, and so again after every call.
        processor: of the model.
        clip: as `patch` takes it.
        plan: of the run.
        samples: the questions.
        folder: where every finished step is kept; those that are there are not done again.
        budget: of the run.
        tick: called with what was done or found, a line of text.
    """

    model: Any
    processor: Any
    clip: Any
    plan: TunePlan
    samples: Samples
    folder: Path
    budget: Budget
    tick: Callable[[str], None] = lambda line: None

    @property
    def sizes(self) -> Mapping[str, int]:
        """Images of each part."""
        return self.samples.sizes

    @property
    def widest(self) -> int:
        """Questions about the image that most are about."""
        return self.samples.widest

    def costs(self, specs: Sequence[str]) -> dict[str, Cost | str]:
        """What pipelines cost, or why the library refuses them; those without time left lack."""
        found: dict[str, Cost | str] = {}
        for spec, told in self._measured(specs, "cost", self.plan.rounds):
            found[spec] = told["refused"] if "refused" in told else self._as_cost(told)
        return found

    def again(self, specs: Sequence[str]) -> dict[str, list[float]]:
        """Fresh measurements of pipelines, in the unit of the ceiling."""
        if self.plan.cost == FLOPS:
            return {s: [c.value] for s, c in self.costs(specs).items() if isinstance(c, Cost)}
        unit = "shares" if self.plan.goal.max_seconds is None else "seconds"
        rounds = max(_FRESH_ROUNDS, self.plan.rounds)
        fresh = self._measured(specs, "again", rounds)
        return {spec: told[unit] for spec, told in fresh if "refused" not in told}

    def scores(self, spec: str | None, part: str, first: int, last: int) -> Scores:
        """Scores of the questions about some images; 0 where the picture cannot be read."""
        images = self.samples.parts[part][first:last]
        asked = [one for image in images for one in image]
        name = f"{part}.{_hash(spec or FULL)}.{first}-{last}"
        identity = [
            *(self.plan.answers(), self.samples.identity, versions()),
            *(spec, _source(spec), part, first, last),
        ]
        told = self._kept(name, identity, ("ask", len(asked)), lambda: self._ask(spec, asked))
        self.tick(f"{spec or 'all tokens'}: {len(asked)} questions")
        start = first + (self.sizes[SEARCH] if part == HELD_OUT else 0)
        numbers = np.repeat(np.arange(start, start + len(images)), [len(i) for i in images])
        return Scores(np.array(told["scores"], dtype=float), numbers)

    def _kept(
        self, name: str, identity: Any, step: tuple[str, int], work: Callable[[], Any]
    ) -> Any:
        """A step's result from the folder, or done now if there is time."""

        def timed() -> Any:
            with self.budget.step(*step):
                return work()

        return measured([Part(name, identity, timed)], self.folder)[name]

    def _measured(
        self, specs: Sequence[str], kind: str, rounds: int
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Cost of every pipeline, until time is up."""
        requests = self._requests()
        device = machine.device_name(self.model.device)
        common = [self.plan.times(), self.samples.identity, versions(), device, rounds]
        with self._meter(requests) as meter:
            for spec in specs:
                work = lambda spec=spec: _cost(meter, spec, self.plan.cost, rounds)  # noqa: E731
                identity = [*common, spec, _source(spec)]
                try:
                    told = self._kept(f"{kind}.{_hash(spec)}", identity, (kind, 1), work)
                except OutOfTime:
                    return
                self.tick(f"{spec}: cost")
                yield spec, told

    def _as_cost(self, told: dict[str, Any]) -> Cost:
        if self.plan.cost == FLOPS:
            return Cost(told["share"], told["share"], told)
        share, seconds = median(told["shares"]), median(told["seconds"])
        return Cost(share, share if self.plan.goal.max_seconds is None else seconds, told)

    @contextmanager
    def _meter(self, requests: Sequence[Shown]) -> Iterator[Meter]:
        from vlmcompress import patch

        options = {"processor": self.processor, "clip": self.clip, "positions": self.plan.positions}
        kind: Any = self.plan.clock
        with patch(self.model, "uniform", keep=1, **options) as handle:
            clock = Clock(self.model.device, kind)
            yield Meter(self._asker(None), handle, parts(self.model), clock, requests)

    def _requests(self) -> list[Shown]:
        """The first questions of the search whose pictures can be read."""
        found: list[Shown] = []
        for image in self.samples.parts[SEARCH]:
            try:
                found.append(_shown(image[0]))
            except UnsupportedInputError:
                continue
            if len(found) == _REQUESTS:
                break
        if not found:
            raise ConfigError("None of the pictures can be read, so that nothing can be timed.")
        return found

    def _asker(self, spec: str | None) -> Asker:
        plan = SweepPlan(
            self.plan.model,
            self.plan.tasks,
            (Setting(spec or FULL),),
            positions=self.plan.positions,
            reuse_tower=False,
        )
        return Asker(self.model, self.processor, plan, self.clip)

    def _ask(self, spec: str | None, asked: Sequence[Asked]) -> dict[str, Any]:
        """Scores of questions, and why some were not answered."""
        scores, why = [], dict[str, int]()
        with self._asker(spec) as asker:
            for start in range(0, len(asked), self.plan.batch):
                batch = asked[start : start + self.plan.batch]
                answers = self._answers(asker, spec, batch, self.plan.rules.seed + start)
                for one, answer in zip(batch, answers, strict=True):
                    if isinstance(answer, VLMCompressError):
                        why[str(answer)] = why.get(str(answer), 0) + 1
                        scores.append(0.0)
                    else:
                        metric = metric_of(one.question.metric)
                        scores.append(metric.score(answer, one.question))
        return {"scores": scores, "failed": why}

    def _answers(
        self, asker: Asker, spec: str | None, asked: Sequence[Asked], seed: int
    ) -> list[str | VLMCompressError]:
        """Texts, or why there are none."""
        found: dict[int, str | VLMCompressError] = {}
        shown: dict[int, Shown] = {}
        for place, one in enumerate(asked):
            try:
                shown[place] = _shown(one)
            except UnsupportedInputError as error:
                found[place] = error
        setting, longest = Setting(spec or FULL), max(o.task.config.new_tokens for o in asked)
        while shown:
            places = [*shown]
            try:
                batch = asker.batch([*shown.values()], (setting,))
                answers = asker.answers(batch, setting, longest, seed)
            except Unusable as error:
                for i, text in error.why.items():
                    found[places[i]] = UnsupportedInputError(text)
                    del shown[places[i]]
            except VLMCompressError as error:
                if spec is None:
                    raise
                found.update(dict.fromkeys(places, error))
                break
            else:
                texts = [answer.text for answer in answers]
                found.update(zip(places, texts, strict=True))
                break
        return [found[place] for place in range(len(asked))]


def _cost(meter: Meter, spec: str, kind: str, rounds: int) -> dict[str, Any]:
    """A pipeline's cost, or that the library refuses it."""
    try:
        return meter.count(spec) if kind == FLOPS else meter.time(spec, rounds, _WARMUP)
    except VLMCompressError as error:
        return {"refused": str(error)}


def _shown(asked: Asked) -> Shown:
    """A question with its pictures opened."""
    pictures = asked.question.pictures
    return Shown(
        asked.task.prompt(asked.question),
        tuple(picture.open() for picture in pictures),
        tuple(picture.key for picture in pictures),
    )


def _source(spec: str | None) -> str:
    return "" if spec is None else source(spec)


def _hash(spec: str) -> str:
    return sha256(spec.encode()).hexdigest()[:16]
