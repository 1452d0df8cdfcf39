"""Cards: front matter and text, made from what lies in the folder.

Every number comes from the results file beside the card; what else stands there is configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from vlmcompress.core.config import StageConfig
from vlmcompress.core.errors import CheckpointError, ConfigError
from vlmcompress.hub.about import About
from vlmcompress.hub.fetching import is_repo_id
from vlmcompress.hub.folder import (
    CARD,
    EVAL_RESULTS,
    PEFT_CONFIG,
    RESULTS,
    Adapter,
    read,
    read_json,
)
from vlmcompress.hub.results import Evaluation, date_of, evaluations

TEMPLATE = Path(__file__).with_name("card.md.jinja")
TAGS = ("vlmcompress", "visual-token-compression")
_BEGIN, _END = "<!-- vlmcompress:begin -->", "<!-- vlmcompress:end -->"
_MERGED = "finetune"
_MINE = "# Written by vlmcompress from results.json.\n"
#: Stands in cards that were made from an empty template and say nothing.
_EMPTY = "[More Information Needed]"


def write_card(folder: str | Path, about: About) -> Path:
    """Write README.md of an adapter, and `.eval_results` where full official splits were measured.

    What others wrote into an existing README.md stays: keys of its front matter that are not set
    here, its tags, and text outside the part between the markers (peft appends its version). A
    card that is nothing but an empty template is replaced.

    Args:
        folder: of the adapter, with results.json where something was measured.
        about: what the files do not say.

    Raises:
        ConfigError: for a folder that holds no adapter, or results and cards that cannot be read.
        CheckpointError: when it cannot be written.
    """
    adapter = read(folder)
    path = adapter.folder / RESULTS
    results = read_json(path, "results file") if path.is_file() else {}
    found = evaluations(results)
    card = ModelCard.from_template(
        _front_matter(adapter, about, found),
        template_path=str(TEMPLATE),
        **_text(adapter, about, results, found),
    )
    old = adapter.folder / CARD
    if old.is_file():
        card = _joined(old, card)
    try:
        old.write_text(f"{str(card).strip()}\n", encoding="utf-8")
        _write_official(adapter.folder / EVAL_RESULTS, found, date_of(results))
    except OSError as error:
        raise CheckpointError(f"The card {old} cannot be written ({error}).") from error
    return old


def table(found: Sequence[Evaluation]) -> list[str]:
    """Lines of a Markdown table of evaluations, the compared ones last."""
    if not found:
        return []
    rows = [
        (e.dataset.name, e.setting, e.metric, e.shown, "" if e.questions is None else e.questions)
        for e in sorted(found, key=lambda e: e.compared)
    ]
    lines = [("asked", "setting", "metric", "value", "questions")]
    cells = [*lines, ("---", "---", "---", "---:", "---:"), *rows]
    return [f"| {' | '.join(map(_cell, row))} |" for row in cells]


def _front_matter(adapter: Adapter, about: About, found: Sequence[Evaluation]) -> ModelCardData:
    mine = [e.for_index() for e in found if not e.compared]
    methods = dict.fromkeys(stage.method.replace("_", "-") for stage in adapter.config.stages)
    return ModelCardData(
        base_model=about.base_model,
        base_model_relation=about.relation if about.base_model else None,
        library_name=_library(adapter, about),
        pipeline_tag=about.pipeline_tag,
        tags=[*TAGS, *methods, *(["lora"] if adapter.lora else [])],
        license=about.license,
        license_name=about.license_name,
        license_link=about.license_link,
        datasets=list(about.datasets) or None,
        model_name=about.name.rpartition("/")[2] if mine else None,
        eval_results=mine or None,
    )


def _library(adapter: Adapter, about: About) -> str:
    if about.relation == _MERGED:
        return "transformers"
    return "peft" if adapter.lora else "vlmcompress"


def _text(
    adapter: Adapter, about: About, results: Mapping[str, Any], found: Sequence[Evaluation]
) -> dict[str, Any]:
    config = adapter.config
    trained = config.trained_keep
    return {
        "begin": _BEGIN,
        "end": _END,
        "title": about.name.rpartition("/")[2],
        "name": about.name,
        "base": f"`{about.base_model}`" if about.base_model else "one model",
        "loaded": about.name if about.relation == _MERGED else about.base_model,
        "merged": about.relation == _MERGED,
        "stages": [{"spec": _spec(stage)} for stage in config.stages],
        "positions": config.positions,
        "trained": None if trained is None else _range(*trained),
        "parts": [s.options["weights"] for s in config.stages if s.options.get("weights")],
        "lora": _lora(adapter.folder) if adapter.lora else None,
        "rows": table(found),
        "date": date_of(results),
        "command": results.get("command"),
        "license_shown": about.license_link or about.license_name or about.license,
    }


def _spec(stage: StageConfig) -> str:
    options = {k: v for k, v in stage.options.items() if k != "weights"}
    return StageConfig(stage.method, stage.keep, options, stage.site).to_spec()


def _range(low: float, high: float) -> str:
    return f"keep {low}" if low == high else f"keep {low} to {high}"


def _lora(folder: Path) -> dict[str, Any]:
    data = read_json(folder / PEFT_CONFIG, "configuration of peft")
    target = data.get("target_modules")
    shown = target if isinstance(target, str) else _list(target)
    return {"rank": data.get("r"), "target": _cell(shown)}


def _list(names: object) -> str:
    return ", ".join(sorted(map(str, names))) if isinstance(names, Iterable) else str(names)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _joined(path: Path, new: ModelCard) -> ModelCard:
    """The new card with what others wrote into the old one."""
    try:
        old = ModelCard.load(path)
    except Exception as error:  # pyyaml's errors share no base with others
        raise ConfigError(
            f"{path} has front matter that cannot be read ({error}); correct or delete it."
        ) from error
    before, after = _others(old.text)
    data = {**_theirs(old), **new.data.to_dict()}
    tags = [*new.data.to_dict().get("tags", []), *old.data.to_dict().get("tags", [])]
    data["tags"] = list(dict.fromkeys(tags))
    merged = ModelCardData(**data)
    text = "\n\n".join(part for part in (before, new.text.strip(), after) if part)
    return ModelCard(f"---\n{merged.to_yaml()}\n---\n\n{text}\n")


def _theirs(old: ModelCard) -> dict[str, Any]:
    """Front matter that may stay.

    No numbers, which no results file here says, and no base model by its place on a machine, as
    peft notes it.
    """
    data = old.data.to_dict()
    data.pop("model-index", None)
    base = data.get("base_model")
    if isinstance(base, str) and not is_repo_id(base):
        del data["base_model"]
    return data


def _others(text: str) -> tuple[str, str]:
    """What stands before and after the part between the markers."""
    if _BEGIN in text and _END in text:
        before, rest = text.split(_BEGIN, 1)
        return before.strip(), rest.split(_END, 1)[1].strip()
    return "", "" if _EMPTY in text else text.strip()


def _write_official(folder: Path, found: Sequence[Evaluation], date: str | None) -> None:
    """One file for each full official split; those of earlier results go."""
    for path in folder.glob("*.yaml"):
        if path.read_text(encoding="utf-8").startswith(_MINE):
            path.unlink()
    official = [e for e in found if e.official]
    if official:
        folder.mkdir(exist_ok=True)
    for each in official:
        entries = eval_result_entries_to_yaml([each.for_leaderboard(date)])
        (folder / each.file_name).write_text(_MINE + yaml_dump(entries), encoding="utf-8")
