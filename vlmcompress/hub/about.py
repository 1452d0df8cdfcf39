"""What a card says beside what the adapter's files say: base model, licence, data sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from vlmcompress.core.errors import ConfigError
from vlmcompress.hub.fetching import is_repo_id
from vlmcompress.hub.folder import CARD

#: Gives the metadata of the card of a model by its Hub id, None where there is none.
Lookup = Callable[[str], Any]


@dataclass(frozen=True)
class About:
    """Facts for a card that no file of the adapter holds.

    Attributes:
        name: of the adapter: its Hub id, or the name of its folder.
        base_model: Hub id of the model that it is for.
        relation: to that model: `adapter`, or `finetune` for merged weights.
        license: as the Hub names it; `other` stands with a name and a link.
        license_name: of a licence that the Hub does not name.
        license_link: to its text.
        datasets: Hub ids of what it was trained on.
        pipeline_tag: what the model is for.
    """

    name: str
    base_model: str | None = None
    relation: str = "adapter"
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    datasets: Sequence[str] = field(default=())
    pipeline_tag: str = "image-text-to-text"

    def __post_init__(self) -> None:
        """Check what goes into front matter."""
        if self.base_model is not None and not is_repo_id(self.base_model):
            raise ConfigError(
                f"base_model is {self.base_model!r}; give the id of its repository on the Hub, "
                "such as 'llava-hf/llava-1.5-7b-hf', or leave it out."
            )
        if isinstance(self.datasets, str):
            raise ConfigError(f"datasets is {self.datasets!r}; give a list of Hub ids.")

    def with_license_of(self, data: Any) -> About:
        """With the licence of a base model's card, which an adapter inherits; one given stays."""
        if self.license is not None or data is None:
            return self
        return dataclasses.replace(
            self,
            license=getattr(data, "license", None),
            license_name=getattr(data, "license_name", None),
            license_link=getattr(data, "license_link", None),
        )


def describe(
    model: Any,
    name: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    lookup: Lookup | None = None,
) -> About:
    """Facts about the adapter of a model.

    Args:
        model: what it is for.
        name: of the adapter.
        base_model: Hub id; found from the model where it was loaded from the Hub.
        license: of the adapter; that of the base model where it is not given and can be found, in
            a README.md beside the weights or by `lookup`.
        datasets: that it was trained on.
        lookup: asks the Hub.
    """
    place = str(getattr(model, "name_or_path", "") or "")
    if base_model is None and is_repo_id(place) and not Path(place).exists():
        base_model = place
    about = About(name, base_model, license=license, datasets=tuple(datasets))
    about = about.with_license_of(_card_beside(Path(place)) if place else None)
    if lookup is not None and base_model is not None and about.license is None:
        about = about.with_license_of(lookup(base_model))
    return about


def of_folder(folder: Path) -> About:
    """What the card of an adapter says already, to write it anew."""
    data = _card_beside(folder)
    named = {
        "base_model": getattr(data, "base_model", None),
        "license": getattr(data, "license", None),
        "license_name": getattr(data, "license_name", None),
        "license_link": getattr(data, "license_link", None),
        "relation": getattr(data, "base_model_relation", None),
        "pipeline_tag": getattr(data, "pipeline_tag", None),
    }
    given: dict[str, Any] = {k: v for k, v in named.items() if isinstance(v, str)}
    if not is_repo_id(given.get("base_model", "")):  # peft notes places on this machine
        given.pop("base_model", None)
    listed = getattr(data, "datasets", None) or []
    datasets = [listed] if isinstance(listed, str) else list(listed)
    return About(folder.resolve().name, **given, datasets=datasets)


def _card_beside(folder: Path) -> Any:
    """Metadata of the card in a model's folder, None where there is no readable one."""
    if not (folder / CARD).is_file():
        return None
    try:
        return ModelCard.load(folder / CARD, ignore_metadata_errors=True).data
    except Exception:  # pyyaml's errors share no base with others; no card is no licence
        return None
