"""Pixels to compressed visual tokens: one tower pass with its evidence, selection and connector."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmcompress.core.errors import (
    UnsupportedInputError,
    UnsupportedModelError,
)
from vlmcompress.core.tokens import Evidence, VisualTokens
from vlmcompress.families import Family
from vlmcompress.families.base import Layout
from vlmcompress.live import positions
from vlmcompress.live.captured import Captured
from vlmcompress.live.encoded import Encoded, by_owner, collected
from vlmcompress.live.question import Asked, rows_of
from vlmcompress.live.reading import ImageReader, by_image
from vlmcompress.live.session import Session, running
from vlmcompress.live.sparserun import run_of
from vlmcompress.live.timing import Stopwatch
from vlmcompress.live.tower import may_skip
from vlmcompress.live.towerrun import TowerRun
from vlmcompress.methods.pipeline import Pipeline, Stage
from vlmcompress.methods.stages import NAN_REMEDY, Group, Resolved, run_stages

#: The arguments that carry an image's pixels, in every supported family.
PIXEL_ARGUMENTS = ("pixel_values", "pixel_values_images")
VIDEO_ARGUMENTS = ("pixel_values_videos",)


def has_pixels(call: Mapping[str, Any]) -> bool:
    """Whether a call carries images."""
    return any(call.get(name) is not None for name in PIXEL_ARGUMENTS)


def encoder_arguments(base: nn.Module, call: Mapping[str, Any]) -> dict[str, Any]:
    """What `get_image_features` reads of a call, chosen by its signature as `generate` does."""
    names = inspect.signature(base.get_image_features).parameters  # type: ignore[arg-type]
    return {name: call[name] for name in names if name != "kwargs" and call.get(name) is not None}


class Encoder:
    """Runs a model's tower under a pipeline, once per instance."""

    def __init__(
        self,
        family: Family,
        base: nn.Module,
        pipeline: Pipeline,
        watch: Stopwatch,
        asked: Asked | None = None,
        placeholders: Sequence[int] = (),
    ) -> None:
        """Make one.

        Args:
            family: facts about the model.
            base: the model that holds tower and LLM.
            pipeline: the methods.
            watch: the stage clock.
            asked: the questions, where a method reads them.
            placeholders: of images, in each row of the batch, where a budget is that of a prompt.
        """
        self._family, self._base, self._pipeline, self._watch = family, base, pipeline, watch
        self._asked, self._placeholders = asked, placeholders
        self._tower_began: Any = None
        self._connector_began: Any = None
        self._beside: list[Group] = []
        self._tower = family.tower(base)
        self._layers = (
            None if self._tower is None else self._tower.layers(family.tower_module(base))
        )

    @property
    def depth(self) -> int | None:
        """Layers of the tower, where they are known."""
        return None if self._layers is None else len(self._layers)

    def encode(self, call: Mapping[str, Any]) -> Encoded:
        """Compressed visual tokens of the images in `call`.

        Raises:
            UnsupportedInputError: for videos.
            EvidenceError: when a method's evidence cannot be read from this tower.
        """
        if any(call.get(name) is not None for name in VIDEO_ARGUMENTS):
            raise UnsupportedInputError(
                "The call carries a video, and only images can be compressed; run prompts with "
                "videos inside `with handle.disabled():`."
            )
        arguments = encoder_arguments(self._base, call)
        session, wanted = self._session(arguments)
        before, after = self._pipeline.split()
        first: list[Group] = []
        run = session.run
        if (before or run is not None) and self._family.connector(self._base) is not None:
            session.select = lambda x: self._select(x, before, session, arguments, first)
        else:
            before, after = (), self._pipeline.stages
            if self._asked is not None and self._asked.source is not None:
                session.select = lambda x: self._see(x, session)
        if self._asked is not None:
            with self._watch.span("question"):
                self._asked.read_all()
        self._tower_began = self._watch.mark()
        with running(session):
            output = self._base.get_image_features(**arguments, return_dict=True)  # type: ignore[operator]
        if run is not None and not run.began:
            raise UnsupportedModelError(
                "The blocks of the vision tower did not run in this call (something answers in its "
                "place), so no method inside the tower could act."
            )
        if self._connector_began is None:
            self._watch.add("tower and connector", self._tower_began, self._watch.mark())
        else:
            self._watch.add("connector", self._connector_began, self._watch.mark())
        with self._watch.span("selection"):
            groups = self._after_connector(output.pooler_output, first, session, arguments)
            given, groups = self._run(after, groups)
        skipped = (
            0
            if session.skip_after is None or self.depth is None
            else self.depth - 1 - session.skip_after
        )
        encoded = collected(output, groups, wanted, skipped)
        if run is not None:
            encoded = dataclasses.replace(encoded, tower_keys=run.keys, tower_run=run.ran)
        encoded = self._with_whole(encoded, self._beside or given, groups, arguments)
        if session.acted is None:
            return encoded
        return dataclasses.replace(encoded, tower_patches=session.acted.plan)

    def _session(self, arguments: Mapping[str, Any]) -> tuple[Session, tuple[int, ...]]:
        # That this tower has what the methods look at was checked when they were chosen.
        needs = self._pipeline.needs()
        if self._tower is None or self._layers is None:
            return Session(self._watch), ()
        layers = Resolved.of(needs, len(self._layers))
        read = self._family.last_read_layer(self._base, arguments, len(self._layers))
        last = max([read, *layers.all()])
        session = Session(
            self._watch,
            self._tower,
            layers.cls_layers,
            layers.received_layers,
            layers.key_layers,
            last if last < len(self._layers) - 1 and may_skip(self._layers) else None,
            wide_layers=layers.wide_layers,
            level_layers=layers.state_layers,
        )
        if self._pipeline.tower is not None:
            self._check_checkpointing()
            depth = len(self._layers)
            session.run = run_of(self._pipeline.tower, self._tower, depth, read)
        if needs.norms:
            session.norm_layer = read
        if needs.cls_features:
            session.state_layers = self._family.read_layers(
                self._base, arguments, len(self._layers)
            )
        return session, tuple(sorted(layers.all()))

    def _check_checkpointing(self) -> None:
        """A checkpointed block is run again in backward, when the pass is over."""
        assert self._layers is not None  # `check_tower` has seen to it
        if torch.is_grad_enabled() and not may_skip(self._layers):
            raise UnsupportedInputError(
                "Gradient checkpointing of the vision tower runs its blocks a second time, which "
                "cannot be followed by a method inside the tower; switch it off for the tower, or "
                "compress between tower and LLM."
            )

    @staticmethod
    def _see(x: Tensor, session: Session) -> Tensor:
        """Remember what the connector reads, for questions to be compared with."""
        session.connector_input = x
        return x

    def _select(
        self,
        x: Tensor,
        stages: Sequence[Stage],
        session: Session,
        arguments: Mapping[str, Any],
        out: list[Group],
    ) -> Tensor:
        """Thin out what the connector reads ([b, n, d]); ragged results become one row.

        Where rows of the language model come out already, the connector gets a single one to pass
        over, and they take the place of its output.
        """
        self._watch.add("tower", self._tower_began, self._watch.mark())
        run = session.reduced
        if run is not None:
            x = self._in_order(x, run)
        if self._asked is not None and self._asked.source is not None:
            self._see(x, session)
        with self._watch.span("selection"):
            groups = self._group(list(x), session, arguments)
            given, made = self._run(stages, groups)
            out += made
            self._beside = given
            if run is None and _untouched(groups, [*out, *given]):
                # Its strides choose the connector's kernel, and so the last bit in half precision.
                self._connector_began = self._watch.mark()
                return x
            rows = [group.features[i] for group, i in (*by_owner(out), *by_owner(given))]
            features = out[0].features if len(out) == 1 and not given else torch.cat(rows)[None]
        self._connector_began = self._watch.mark()
        if self._pipeline.replaces_connector:
            session.replaced = features
            return x[:1, :1]
        return features

    def _in_order(self, x: Tensor, run: TowerRun) -> Tensor:
        """Rows that left a reduced tower ([b, k, d]), in the order of their places."""
        order = run.order()
        if x.shape[:2] != order.shape:
            raise UnsupportedInputError(
                f"The connector reads {x.shape[1]} rows per image and {order.shape[1]} patches "
                "left the tower; a method inside the tower needs a connector that reads patches "
                "alone."
            )
        if bool(x.isnan().any()):
            raise UnsupportedInputError(f"The states of the vision tower hold NaN. {NAN_REMEDY}")
        return torch.take_along_dim(x, order[..., None], 1)

    def _group(
        self, units: Sequence[Tensor], session: Session, arguments: Mapping[str, Any]
    ) -> list[Group]:
        """Images ([n_i, d] each) in groups of equal layouts, with their share of the evidence."""
        run = session.reduced
        lengths = [len(unit) if run is None else run.n_full for unit in units]
        layouts = self._family.layouts(self._base, arguments, lengths)
        captured = Captured(self._family, self._base, session, arguments, lengths)
        owners: dict[tuple[int, Layout], list[int]] = {}
        for i, kind in enumerate(zip(lengths, layouts, strict=True)):
            owners.setdefault(kind, []).append(i)
        groups = []
        for (n, layout), owner in owners.items():
            features = torch.stack([units[i] for i in owner])
            group = VisualTokens.from_features(
                features if run is None else features.new_empty(len(owner), n, 0),
                segments=layout.segments,
                owner=torch.tensor(owner),
                tile=None if layout.tile is None else torch.tensor(layout.tile),
            )
            if run is not None:
                group = group.regroup(features, run.source()[owner], run.assignment()[owner])
            evidence = captured.evidence(owner, layout, group.n)
            evidence = self._with_text(evidence, session, owner, lengths)
            groups.append(dataclasses.replace(group, evidence=evidence))
        return groups

    def _place(self, groups: Sequence[Group]) -> tuple[int | None, list[int]]:
        """Layers of the tower, and the row of the batch that each image belongs to.

        The latter where a budget is that of a prompt.
        """
        if not self._placeholders:
            return self.depth, []
        lengths = [group.n_full for group, _ in by_owner(groups)]
        return self.depth, rows_of(self._placeholders, lengths)

    def _run(self, stages: Sequence[Stage], groups: list[Group]) -> tuple[list[Group], list[Group]]:
        """Images after some stages, and what the last of them was given if it asks for it later."""
        prompt = self._pipeline.prompt
        asks = prompt is not None and (prompt.reads_images or prompt.fuses)
        if not asks or not stages:
            return [], run_stages(stages, groups, *self._place(groups))
        given = run_stages(stages[:-1], groups, *self._place(groups))
        return given, run_stages(stages[-1:], given, *self._place(given))

    def _with_whole(
        self,
        encoded: Encoded,
        given: Sequence[Group],
        made: Sequence[Group],
        arguments: Mapping[str, Any],
    ) -> Encoded:
        """With all rows of the images, or with what the language model has made of them."""
        method = self._pipeline.prompt
        if method is None or not given:
            return encoded
        whole, _ = by_image(given)
        if not method.reads_images:
            return dataclasses.replace(encoded, whole=tuple(whole.values()))
        mode = positions.resolve(self._pipeline.config.positions, self._family)
        with self._watch.span("reading"):
            heard = ImageReader(self._family, self._base, arguments, mode).all(given, made)
        read = tuple(len(rows) for rows in whole.values())
        return dataclasses.replace(encoded, heard=heard, read=read)

    def _with_text(
        self, evidence: Evidence, session: Session, units: Sequence[int], lengths: Sequence[int]
    ) -> Evidence:
        """Evidence with the questions of these images, and their tokens in the same space."""
        if self._asked is None:
            return evidence
        if self._asked.reader is not None:
            evidence = dataclasses.replace(evidence, question=self._asked.vectors(units, lengths))
        if self._asked.source is None or session.connector_input is None:
            return evidence
        states = session.connector_input[list(units)]
        text = self._asked.text(units, lengths).to(states.device)
        patches = self._asked.source.patches(states.detach())
        return dataclasses.replace(evidence, text=text, patches=patches)

    def _after_connector(
        self, pooled: Any, first: list[Group], session: Session, arguments: Mapping[str, Any]
    ) -> list[Group]:
        """Groups of connector outputs; those selected before it get their rows back."""
        if not first:
            return self._group(list(pooled), session, arguments)
        flat = torch.cat([unit.flatten(0, -2) for unit in pooled])
        lengths = [[group.n for group, _ in by_owner(groups)] for groups in (first, self._beside)]
        rows = flat.split([n for part in lengths for n in part])
        self._beside = _with_rows(self._beside, rows[len(lengths[0]) :])
        return _with_rows(first, rows[: len(lengths[0])])


def _with_rows(groups: Sequence[Group], rows: Sequence[Tensor]) -> list[Group]:
    """Groups whose images, in their order, have got other rows ([n, d] each)."""
    owners = (int(group.owner[i]) for group, i in by_owner(groups))
    new = dict(zip(owners, rows, strict=True))
    return [
        dataclasses.replace(g, features=torch.stack([new[o] for o in g.owner.tolist()]))
        for g in groups
    ]


def _untouched(before: Sequence[Group], after: Sequence[Group]) -> bool:
    """Whether every stage was bypassed."""
    return len(before) == len(after) and all(a is b for a, b in zip(before, after, strict=True))
