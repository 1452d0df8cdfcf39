"""What a model is made of, which methods it can run and why the others cannot.

Only a configuration is needed: the model is built on the meta device, without any memory for its
weights, and every method is tried on it by `patch` itself, so that the diagnosis is what `patch`
would say.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmcompress.core.errors import UnsupportedModelError, VLMCompressError
from vlmcompress.families import SUPPORTED, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from vlmcompress.families.base import Family

#: What the default configuration of a model type lacks to be built.
_REPAIRS: dict[str, dict[str, Any]] = {
    "aya_vision": {
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 364,
            "patch_size": 14,
        }
    },
}
_PACKAGES = ("torch", "torchvision", "transformers", "huggingface_hub")
_COLUMNS = (
    "family",
    "tower",
    "[CLS]",
    "layers read",
    "tokens per image or tile",
    "drops",
    "positions",
    "default",
)
_OPTIONAL = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "lmms_eval",
    "open_clip_torch",
    "peft",
    "vllm",
)


@dataclass(frozen=True)
class Verdict:
    """Whether one method can run.

    Attributes:
        name: of the method.
        runs: whether `patch` accepts it.
        reason: what `patch` says otherwise.
    """

    name: str
    runs: bool
    reason: str = ""


@dataclass(frozen=True)
class TowerFacts:
    """The vision tower.

    Attributes:
        type: `model_type` of its configuration.
        attention_readable: whether [CLS] rows and received attention can be read.
        has_cls: whether there is a [CLS] token; None where that is not known.
        layers: how many.
        layers_read: layers up to the last one that the connector reads; the rest is skipped.
        image_size: side in pixels; None for any size.
        patch_size: side in pixels.
    """

    type: str
    attention_readable: bool
    has_cls: bool | None
    layers: int | None
    layers_read: int | None
    image_size: int | None
    patch_size: int | None


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` finds.

    Attributes:
        model_type: of the configuration.
        model_class: that transformers builds for it; empty when it builds none.
        supported: whether `patch` takes such a model.
        reason: why not.
        tower: facts about the vision tower.
        before_connector: whether tokens are dropped before the connector, which then costs less.
        merge: patches per token, as the side of a square.
        grid: (h, w) of an image in tokens; None where images differ.
        rope: `1d` or `mrope`.
        positions: what `positions="auto"` means here.
        default_method: what `method=None` means here.
        text_layers: layers of the language model.
        text_width: width of the language model.
        methods: one verdict per registered method.
    """

    model_type: str
    model_class: str = ""
    supported: bool = False
    reason: str = ""
    tower: TowerFacts | None = None
    before_connector: bool = False
    merge: int = 1
    grid: tuple[int, int] | None = None
    rope: str = ""
    positions: str = ""
    default_method: str = ""
    text_layers: int | None = None
    text_width: int | None = None
    methods: tuple[Verdict, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def __str__(self) -> str:
        """The facts as text, one per line."""
        return "\n".join(_lines(self))


def diagnose(model: PreTrainedModel | PreTrainedConfig | Any) -> Diagnosis:
    """Examine a model, or what its configuration would build.

    Args:
        model: a model (also one that is patched, or inside PEFT) or a configuration. It is not
            changed, and weights are not looked at.

    Raises:
        UnsupportedModelError: for what has no transformers configuration.
    """
    config: Any = getattr(model, "config", model)
    model_type = getattr(config, "model_type", None)
    if not isinstance(model_type, str):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no transformers configuration; pass a HuggingFace model "
            "or its config."
        )
    try:
        built = skeleton(config)
        return _examine(built, family_of(built))
    except UnsupportedModelError as error:
        return Diagnosis(model_type, reason=str(error))


def config_of(name: str) -> PreTrainedConfig:
    """The configuration of a folder, a hub id or a model type.

    A model type such as `llava` stands for the configuration that transformers gives it.

    Raises:
        UnsupportedModelError: when there is none.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        if name in CONFIG_MAPPING and not Path(name).exists():
            return AutoConfig.for_model(name, **_REPAIRS.get(name, {}))
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModelError(f"No configuration found for {name!r}: {error}") from error


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration on the meta device."""
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise UnsupportedModelError(
            f"Model type {config.model_type!r} is no vision-language model of this transformers."
        )
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config)
    return model


def _examine(model: Any, family: Family) -> Diagnosis:
    from vlmcompress.live import positions
    from vlmcompress.live.patch import default_method
    from vlmcompress.methods import registry

    base, text = model.base_model, model.config.get_text_config()
    tower = _tower(family, base)
    return Diagnosis(
        model_type=family.model_type,
        model_class=type(model).__name__,
        supported=True,
        tower=tower,
        before_connector=family.connector(base) is not None,
        merge=family.merge,
        grid=_grid(tower, family.merge),
        rope=family.rope,
        positions=positions.resolve("auto", family),
        default_method=default_method(family, base),
        text_layers=getattr(text, "num_hidden_layers", None),
        text_width=getattr(text, "hidden_size", None),
        methods=tuple(_verdict(model, name) for name in registry.names()),
    )


def _tower(family: Family, base: Any) -> TowerFacts:
    module, tower = family.tower_module(base), family.tower(base)
    config: Any = module.config
    layers = None if tower is None else len(tower.layers(module))
    return TowerFacts(
        type=config.model_type,
        attention_readable=tower is not None,
        has_cls=None if tower is None else tower.has_cls,
        layers=layers,
        layers_read=None if layers is None else family.last_read_layer(base, {}, layers) + 1,
        image_size=None if _any_size(family, config) else config.image_size,
        patch_size=getattr(config, "patch_size", None),
    )


def _any_size(family: Family, config: Any) -> bool:
    """Whether the processor decides on the grid, image by image."""
    from vlmcompress.families.base import GridFamily

    size = getattr(config, "image_size", None)
    return isinstance(family, GridFamily) or config.model_type == "pixtral" or size is None


def _grid(tower: TowerFacts, merge: int) -> tuple[int, int] | None:
    if not tower.image_size or not tower.patch_size:
        return None
    side = tower.image_size // tower.patch_size // merge
    return side, side


def _verdict(model: Any, name: str) -> Verdict:
    from vlmcompress import patch
    from vlmcompress.methods import registry

    own = registry.create(name).own_budget
    try:
        with patch(model, name, keep=None if own else 0.5):
            return Verdict(name, True)
    except VLMCompressError as error:
        return Verdict(name, False, str(error))


def _lines(found: Diagnosis) -> list[str]:
    head = f"{found.model_type} ({found.model_class})" if found.model_class else found.model_type
    if not found.supported or found.tower is None:
        return [head, f"cannot be compressed: {found.reason}"]
    runs = [v.name for v in found.methods if v.runs]
    where = "before the connector" if found.before_connector else "after the connector"
    return [
        head,
        f"tower: {found.tower.type}, {_attention(found.tower)}",
        f"layers: {_layers(found.tower)}; language model {found.text_layers} x {found.text_width}",
        f"tokens: {_tokens(found)}",
        f"methods that look at no features drop tokens {where}",
        f"positions: {found.rope} RoPE, auto means {found.positions}",
        f"default method: {found.default_method}",
        f"can run: {', '.join(runs)}",
        *(f"cannot run {v.name}: {v.reason}" for v in found.methods if not v.runs),
    ]


def _attention(tower: TowerFacts) -> str:
    if not tower.attention_readable:
        return "attention cannot be read"
    return "with [CLS]" if tower.has_cls else "without [CLS]; received attention can be read"


def _layers(tower: TowerFacts) -> str:
    if tower.layers is None or tower.layers_read is None:
        return "tower unknown"
    skipped = tower.layers - tower.layers_read
    note = f", the last {skipped} of them not read and skipped" if skipped else ""
    return f"tower {tower.layers}{note}"


def _tokens(found: Diagnosis) -> str:
    squares = f"{found.merge} x {found.merge} patches per token" if found.merge > 1 else ""
    if found.grid is None:
        grid = "as many as the image is large"
    else:
        grid = f"{found.grid[0]} x {found.grid[1]} = {found.grid[0] * found.grid[1]} per image"
    return "; ".join(filter(None, (grid, squares)))


@dataclass(frozen=True)
class Environment:
    """Versions and what is supported.

    Attributes:
        python: version.
        packages: versions of what the library needs.
        optional: versions of what extras bring; None where not installed.
        device: name of the GPU, or cpu.
        families: model types that `patch` takes.
    """

    python: str
    packages: dict[str, str | None]
    optional: dict[str, str | None]
    device: str
    families: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def __str__(self) -> str:
        """One fact per line."""
        installed = {**self.packages, **self.optional}
        names = ("not installed" if v is None else v for v in installed.values())
        return "\n".join(
            [
                f"python {self.python} on {self.device}",
                *(f"{n} {v}" for n, v in zip(installed, names, strict=True)),
                f"supported families: {', '.join(self.families)}",
            ]
        )


def environment() -> Environment:
    """What is installed here."""
    import torch

    from vlmcompress import __version__

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return Environment(
        python=platform.python_version(),
        packages={"vlmcompress": __version__, **_versions(_PACKAGES)},
        optional=_versions(_OPTIONAL),
        device=device,
        families=SUPPORTED,
    )


def _versions(packages: Sequence[str]) -> dict[str, str | None]:
    return {name: _version(name) for name in packages}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def families_table() -> str:
    """The supported families with the configurations that transformers gives them, as Markdown."""
    lines = [f"| {' | '.join(_COLUMNS)} |", f"|{' --- |' * len(_COLUMNS)}"]
    for model_type in SUPPORTED:
        found = diagnose(config_of(model_type))
        tower = found.tower
        if tower is None:  # a family whose own default cannot be built has a repair above
            raise UnsupportedModelError(found.reason)
        count = "by size" if found.grid is None else str(found.grid[0] * found.grid[1])
        merged = f" ({found.merge} x {found.merge} merged)" if found.merge > 1 else ""
        cells = (
            f"`{model_type}`",
            f"`{tower.type}`",
            "yes" if tower.has_cls else "no",
            f"{tower.layers_read} of {tower.layers}",
            count + merged,
            "before the connector" if found.before_connector else "after it",
            found.positions,
            f"`{found.default_method}`",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
