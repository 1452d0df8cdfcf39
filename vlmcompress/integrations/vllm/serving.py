"""One method as an engine serves it: counts known before any pixel, selection behind its tower.

No engine is imported here. What an engine brings are features, pixels' sizes and, for methods that
look at the tower, what was read of its attention; the method's code is that of `patch`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from vlmcompress.core.config import CONFIG_NAME
from vlmcompress.core.errors import ConfigError, UnsupportedInputError
from vlmcompress.core.keep import AutoKeep
from vlmcompress.core.tokens import VisualTokens
from vlmcompress.doctor import skeleton
from vlmcompress.families import family_of
from vlmcompress.families.base import Layout
from vlmcompress.families.towers import Tower
from vlmcompress.integrations.vllm.settings import Settings
from vlmcompress.live import positions
from vlmcompress.live.captured import Captured
from vlmcompress.live.install import check_evidence
from vlmcompress.live.patch import default_method
from vlmcompress.live.session import Session
from vlmcompress.live.timing import Stopwatch
from vlmcompress.methods import pipeline
from vlmcompress.methods.limits import refuse_untrained
from vlmcompress.methods.parts import in_parts, run_in_parts
from vlmcompress.methods.pipeline import Pipeline, Stage
from vlmcompress.methods.prompt.base import PromptCompressor
from vlmcompress.methods.stages import Resolved, run_stages

logger = logging.getLogger(__name__)

#: Methods that are tested on an engine; others that keep the rules below are taken too.
TESTED_METHODS = (
    "uniform",
    "pool",
    "divprune",
    "tome",
    "vqtoken",
    "fastervlm",
    "vtc_cls",
    "visionzip",
)


class Serving:
    """A pipeline of one method on one model, whose weights are elsewhere.

    Attributes:
        stage: the method with its budget.
        resolved: tower layers whose attention it looks at.
        fingerprint: tells apart what may not share caches.
    """

    def __init__(self, config: Any, settings: Settings) -> None:
        """Check everything that can be known without weights.

        Args:
            config: the model's configuration, of transformers.
            settings: what the server was told.

        Raises:
            VLMCompressError: what `patch` says of this method on this model, and for methods that
                no engine can serve.
        """
        model = skeleton(config)
        self._family, self._base = family_of(model), model.base_model
        built = pipeline.build(
            settings.method,
            settings.keep,
            default=default_method(self._family, self._base),
            positions=settings.positions,
            seed=settings.seed,
        )
        self.stage = servable(built)
        refuse_untrained(built)
        check_evidence(self._family, self._base, built)
        self._check_positions(settings)
        tower = self._family.tower(self._base)
        self._check_readable(tower)
        layers = () if tower is None else tower.layers(self._family.tower_module(self._base))
        self.has_cls, self._depth = tower is not None and tower.has_cls, len(layers)
        self.resolved = Resolved.of(built.needs(), self._depth)
        self.fingerprint = json.dumps(built.config.to_dict(), sort_keys=True)
        self.tokens_kept = cache(lambda layout: tokens_kept(self.stage, layout))
        self._single = lru_cache(4096)(self._layout)

    def _check_positions(self, settings: Settings) -> None:
        """Refuse what was trained or measured with places that an engine does not give.

        Raises:
            ConfigError: for a file that leaves M-RoPE's positions to `patch`.
        """
        given = settings.method
        if isinstance(given, str) or given is None:
            return
        if positions.resolve(given.positions, self._family) == "original":
            raise ConfigError(
                f"{CONFIG_NAME} has positions={given.positions!r}, which means original places for "
                f"{self._family.model_type}, and {_ONE_BY_ONE}; save the adapter with "
                "positions='contiguous', for which it should have been trained too."
            )

    def _check_readable(self, tower: Tower | None) -> None:
        """Refuse methods that look at a tower which only `patch` can read.

        Raises:
            ConfigError: for towers other than CLIP's and SigLIP's.
        """
        if self.stage.needs().attention and type(tower) is not Tower:
            raise ConfigError(
                f"{self.stage.method.name} looks at the attention of the vision tower, which is "
                f"not read inside an engine in {self._family.model_type} models; use 'divprune', "
                "'uniform', 'pool', 'vqtoken' or 'tome(metric=\"features\")'."
            )

    @property
    def before_connector(self) -> bool:
        """Whether rows are selected before the connector, as `patch` does it for this model."""
        return self.stage.method.reads != "llm" and self._family.connector(self._base) is not None

    def layout(self, n: int, **sizes: tuple[int, ...]) -> Layout:
        """How the n tokens of one image lie.

        Args:
            n: uncompressed tokens.
            sizes: what the model's `get_image_features` is told of one image, such as
                `image_sizes=(height, width)`.
        """
        return self._single(n, tuple(sizes.items()))

    def _layout(self, n: int, sizes: tuple[tuple[str, tuple[int, ...]], ...]) -> Layout:
        call = {name: torch.tensor([size]) for name, size in sizes}
        return self._family.layouts(self._base, call, [n])[0]

    def views(self, image_sizes: Tensor) -> list[int]:
        """Passes of the tower for each image of a model that cuts images into tiles."""
        return self._family.views(self._base, {"image_sizes": image_sizes})  # type: ignore[attr-defined,no-any-return]

    def session(self) -> Session:
        """Where a pass of the tower leaves what is read of it."""
        return Session(
            Stopwatch(torch.device("cpu")),
            cls_layers=self.resolved.cls_layers,
            received_layers=self.resolved.received_layers,
            key_layers=self.resolved.key_layers,
            wide_layers=self.resolved.wide_layers,
        )

    def compress(
        self, units: Sequence[Tensor], call: Mapping[str, Any], session: Session
    ) -> list[Tensor]:
        """Rows left of each image.

        Args:
            units: [n_i, d] of each image.
            call: what `get_image_features` is told of all of them, besides pixels.
            session: what was read of the tower.

        Returns:
            [k_i, d] of each, k_i as `tokens_kept` says.
        """
        out: dict[int, Tensor] = {}
        for group in self._groups(units, call, session):
            for done in self._run(group):
                out.update(zip(done.owner.tolist(), done.features, strict=True))
        return [out[i] for i in range(len(units))]

    def _groups(
        self, units: Sequence[Tensor], call: Mapping[str, Any], session: Session
    ) -> list[VisualTokens]:
        """Images of one layout together, with their evidence."""
        lengths = [len(unit) for unit in units]
        layouts = self._family.layouts(self._base, call, lengths)
        captured = Captured(self._family, self._base, session, call, lengths)
        groups = []
        for layout in dict.fromkeys(layouts):
            owners = [i for i, other in enumerate(layouts) if other == layout]
            features = torch.stack([units[i] for i in owners])
            groups.append(
                VisualTokens.from_features(
                    features,
                    segments=layout.segments,
                    owner=torch.tensor(owners),
                    tile=None if layout.tile is None else torch.tensor(layout.tile),
                    evidence=captured.evidence(owners, layout, features.shape[1]),
                )
            )
        return groups

    def _run(self, group: VisualTokens) -> list[VisualTokens]:
        """The method on images of one layout.

        What a method draws may depend on how many images it sees, so one that draws sees them one
        by one. An engine has no way to fail one image that late: one whose features hold NaN keeps
        its first rows, which are as spoilt as the others, and the log says so.
        """
        several = len(group.features) > 1
        if self.stage.method.stochastic and several:
            return self._one_by_one(group)
        try:
            return run_stages([self.stage], [group], self._depth)
        except UnsupportedInputError as error:
            if several:
                return self._one_by_one(group)
            logger.error("An image was not compressed by %s: %s", self.stage.method.name, error)
            tile = None if group.tile is None else tuple(group.tile.tolist())
            k = self.tokens_kept(Layout(group.segments, tile))
            return [group.select(torch.arange(k, device=group.features.device)[None])]

    def _one_by_one(self, group: VisualTokens) -> list[VisualTokens]:
        alone = (group.take_units(torch.tensor([i])) for i in range(len(group.features)))
        return [done for one in alone for done in self._run(one)]


def servable(built: Pipeline) -> Stage:
    """The one stage of a pipeline that an engine can serve.

    Raises:
        ConfigError: for any other pipeline, with the reason.
    """
    names = " | ".join(stage.to_spec() for stage in built.config.stages)
    if len(built.running) != 1 or len(built.stages) != 1:
        raise ConfigError(
            f"{names!r} cannot be served: an engine takes one method between vision tower and "
            f"language model, such as 'vtc_cls:0.1'. {_REMEDY}"
        )
    (stage,) = built.stages
    reason = _why_not(stage)
    if reason is None and built.config.positions == "original":
        reason = f"{_ONE_BY_ONE} (positions='contiguous')"
    if reason is not None:
        raise ConfigError(f"{names!r} cannot be served: {reason}. {_REMEDY}")
    return stage


_ONE_BY_ONE = "engines number what is left of a prompt one by one"
_REMEDY = (
    f"Tested methods are {', '.join(TESTED_METHODS)}; others run inside transformers, with "
    "vlmcompress.patch."
)


def _why_not(stage: Stage) -> str | None:
    """What keeps a method from being served; None for nothing."""
    method, needs = stage.method, stage.needs()
    if needs.asks or isinstance(method, PromptCompressor):
        return "it reads the question, and an engine shares an image's tokens between questions"
    if isinstance(stage.keep, AutoKeep) or method.count_kind != "exact":
        return "its count depends on the picture, and an engine must know it before any pixel"
    if stage.partition.scope == "prompt":
        return "a budget of a whole prompt depends on the other images, which engines cache apart"
    if not method.training_free or method.learns:
        return "it has trained parts of its own, which the plugin does not load"
    if needs.cls_features or needs.norms or needs.states:
        return "it reads states of the vision tower, and only attention is read inside an engine"
    return None


def tokens_kept(stage: Stage, layout: Layout) -> int:
    """Tokens that a stage leaves of an image, from its layout alone.

    Args:
        stage: of a method with the count kind `exact`.
        layout: how the image's tokens lie.
    """
    n = max(s.slice.stop for s in layout.segments) if layout.tile is None else len(layout.tile)
    image = VisualTokens.from_features(
        torch.zeros(1, n, 1),
        segments=layout.segments,
        tile=None if layout.tile is None else torch.tensor(layout.tile),
    )

    def kept(part: VisualTokens) -> int:
        assert not isinstance(stage.keep, AutoKeep)  # `servable` has seen to it
        return stage.method.tokens_kept(part.current_segments, stage.keep)

    def run(part: VisualTokens) -> list[VisualTokens]:
        return [part.select(torch.arange(min(part.n, kept(part)))[None])]

    if not in_parts(image):
        return run(image)[0].n
    return run_in_parts(image, stage.partition, lambda part: kept(part) >= part.n, run)[0].n


def layers_of(tower: nn.Module) -> nn.ModuleList:
    """The blocks of an engine's CLIP or SigLIP tower."""
    layers = tower.get_submodule("vision_model.encoder.layers")
    assert isinstance(layers, nn.ModuleList)  # a fact about the engine's models
    return layers
