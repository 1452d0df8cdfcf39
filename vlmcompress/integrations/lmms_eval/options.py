"""What lmms-eval's `--model_args` say about compression, checked before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlmcompress.core.errors import ConfigError, ConfigTypeError, UnsupportedModelError


@dataclass(frozen=True)
class Options:
    """Without `method`, `keep` and `adapter` the model is not compressed.

    Attributes:
        pretrained: a folder, a hub id or `reference`.
        method: a name or a spec string; None with a `keep` is the model's default method.
        keep: what is kept: a fraction, a count or `auto`.
        adapter: a folder or hub id of an adapter, which says method and budget itself; `keep`
            then chooses among the budgets that it was trained for.
        positions: as `patch` takes it; `auto` where not given.
        seed: of methods that draw numbers; 0 where not given.
        clip: for methods that read the question, as `vlmcompress generate --clip` takes it.
    """

    pretrained: str
    method: str | None = None
    keep: float | int | str | None = None
    adapter: str | None = None
    positions: str | None = None
    seed: int | None = None
    clip: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before gigabytes are loaded for it.

        Raises:
            ConfigError, ConfigTypeError: for values that make no sense, alone or together.
            UnknownMethodError: for an unknown method.
        """
        from vlmcompress.methods import pipeline

        for name in ("pretrained", "method", "adapter", "positions", "clip"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ConfigTypeError(f"{name} is {value!r}; it must be a text.")
        if not self.pretrained:
            raise ConfigError("pretrained is missing; give a folder, a hub id or 'reference'.")
        if self.adapter is not None:
            self._check_adapter()
        elif self.compresses:
            pipeline.build(self.method, self.keep, **self._how())
        else:
            self._refuse("without method, keep and adapter nothing is compressed", self._how())

    @property
    def compresses(self) -> bool:
        """Whether there is anything to patch."""
        return (self.method, self.keep, self.adapter) != (None, None, None)

    def apply(self, model: Any, processor: Any) -> Any:
        """Patch a model.

        Args:
            model: as loaded, on its device.
            processor: its processor.

        Returns:
            The handle; None where nothing is compressed.

        Raises:
            VLMCompressError: where `patch` or `vlmcompress.hub.load` refuses.
        """
        from vlmcompress import load_adapter, patch
        from vlmcompress.loading import clip_of

        if not self.compresses:
            return None
        clip = None if self.clip is None else clip_of(self.clip, model.device)
        shared = {"keep": self.keep, "processor": processor, "clip": clip}
        if self.adapter is not None:
            return load_adapter(model, self.adapter, **shared)
        return patch(model, self.method, **shared, **self._how())

    def _how(self) -> dict[str, Any]:
        """What is said beside method and budget."""
        given = {"positions": self.positions, "seed": self.seed}
        return {name: value for name, value in given.items() if value is not None}

    def _check_adapter(self) -> None:
        from vlmcompress.hub.fetching import locate
        from vlmcompress.hub.folder import read

        own = {"method": self.method, **self._how()}
        self._refuse("an adapter says these itself", {k: v for k, v in own.items() if v})
        read(locate(str(self.adapter)))

    def _refuse(self, why: str, given: dict[str, Any]) -> None:
        if given:
            told = ", ".join(f"{name}={value}" for name, value in given.items())
            raise ConfigError(f"{told} is of no use here: {why}. Leave it out.")


def loaded(
    pretrained: str,
    dtype: str = "auto",
    device: str | None = None,
    device_map: str | None = None,
    attn_implementation: str | None = None,
) -> tuple[Any, Any]:
    """A model in evaluation mode and its processor.

    Args:
        pretrained: a folder, a hub id or `reference`.
        dtype: `auto` is the checkpoint's.
        device: the GPU where there is one, otherwise the CPU, where not given.
        device_map: as transformers takes it; all of the model on the device where not given.
        attn_implementation: as transformers takes it.

    Raises:
        ConfigError: for an unknown dtype or device.
        UnsupportedModelError: for a model that cannot be loaded.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vlmcompress.loading import device_of, dtype_of, location

    where = location(pretrained)
    how = {
        "dtype": dtype if dtype == "auto" else dtype_of(dtype),
        "device_map": device_map or device_of(device or "auto"),
        "attn_implementation": attn_implementation,
    }
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(where, **how)
        return model.eval(), AutoProcessor.from_pretrained(where)
    except (OSError, ValueError, SafetensorError) as error:
        raise UnsupportedModelError(f"{pretrained!r} cannot be loaded: {error}") from error
