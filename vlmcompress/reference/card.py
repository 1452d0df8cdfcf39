"""The model card and the tables of the reference model, from a run's summary and a study."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

from .study import POSITIONS

_CARD = """
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags: [vlmcompress, llava, synthetic]
---

# The reference vision-language model

A `LlavaForConditionalGeneration` of {parameters} parameters (CLIP tower 8 x 192 at 224 px, Llama
8 x 192 with grouped-query attention), trained from scratch on two CPU cores on drawn scenes, with a
CLIP text head in `text_head/`. It is there to test and to demonstrate compression on any machine in
seconds. It knows {knowledge}, and nothing else.

Read its curves with care:

- [CLS] was taught to attend to what is drawn (a direct loss, layers -4 to -1), so methods that read
  [CLS] attention are near an oracle here. They are not on released models.
- A part of the training steps dropped image tokens, by [CLS] attention, by coverage or at random,
  with original and with renumbered positions. It tolerates compression better than models that
  never saw any.
- Patches were taught to name the object they show, so little of an object leaks into the ground:
  random selection looks worse than on released models.
"""
_QUICK = """
`all@196` keeps every token; `cls@20` keeps the 20 with the highest [CLS] attention of layer -2,
renumbered (`-original`: with their own positions); `random@20` keeps 20 at random.
"""
_KEEPS = ("0.1", "0.05")  # of the table of both worlds
_SHOWN = ("vtc_cls", "fastervlm", "divprune", "random")  # by kind


_BARRED = re.compile(r"`([^`]*\|[^`]*)`")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *map(_barred, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _barred(row: Sequence[str]) -> list[str]:
    """Cells whose bars do not end them, neither on the Hub and GitHub nor in Python-Markdown."""
    return [_BARRED.sub(_as_html, cell) for cell in row]


def _as_html(code: re.Match[str]) -> str:
    return f"<code>{html.escape(code[1]).replace('|', '&#124;')}</code>"


def estimate(value: dict[str, float]) -> str:
    """A mean and its interval, in percent."""
    mean, low, high = (100 * value[key] for key in ("mean", "low", "high"))
    return f"{mean:.1f} ({low:.1f}-{high:.1f})"


def targets_table(study: dict[str, Any]) -> str:
    """What the model was made to reach, and what it reached."""
    rows = [[t["target"], t["found"], "yes" if t["met"] else "**no**"] for t in study["targets"]]
    return markdown(["target", "found", "met"], rows)


def worlds_table(study: dict[str, Any]) -> str:
    """Methods at small budgets, one column per world and budget; positions renumbered."""
    results = {name: modes[POSITIONS[0]] for name, modes in study["worlds"].items()}
    columns = [(name, keep) for keep in _KEEPS for name in results]
    header = ["", *(f"{name}, keep {keep}" for name, keep in columns)]
    full = ["all tokens", *(estimate(results[name]["full"]) for name, _ in columns)]
    blind = ["no image", *(estimate(results[name]["blind_interval"]) for name, _ in columns)]
    methods = results[columns[0][0]]["accuracy"][_KEEPS[0]]
    rows = [
        [f"`{m}`", *(estimate(results[name]["accuracy"][keep][m]) for name, keep in columns)]
        for m in methods
    ]
    return markdown(header, [full, *rows, blind])


def accuracy_table(results: dict[str, Any]) -> str:
    """Method x keep of one world and position mode, with 95 % intervals."""
    accuracy = results["accuracy"]
    methods = next(iter(accuracy.values()))
    rows = [[f"`{m}`", *(estimate(row[m]) for row in accuracy.values())] for m in methods]
    return markdown(["method", *(f"keep {keep}" for keep in accuracy)], rows)


def kinds_table(results: dict[str, Any]) -> str:
    """Accuracy by kind of question: all tokens, some methods at keep 0.1, no image."""
    at = results["by_kind_at"][_KEEPS[0]]
    kinds = list(results["by_kind"])
    rows = [("all tokens", results["by_kind"])]
    rows += [(f"`{m}`, keep {_KEEPS[0]}", at[m]) for m in _SHOWN if m in at]
    rows.append(("no image", results["blind_by_kind"]))
    return markdown(
        ["", *kinds], [[name, *(f"{100 * row[k]:.1f}" for k in kinds)] for name, row in rows]
    )


def detector_table(study: dict[str, Any]) -> str:
    """[CLS] attention as a detector of what is drawn, layer by layer."""
    worlds = study["detector"]
    header = ["tower layer", *(f"{what}, {name}" for name in worlds for what in ("AUC", "mass"))]
    first = next(iter(worlds.values()))
    rows = [
        [
            str(layer["layer"]),
            *(
                f"{worlds[name]['layers'][i][key]:.3f}"
                for name in worlds
                for key in ("auc", "mass")
            ),
        ]
        for i, layer in enumerate(first["layers"])
    ]
    area = ["share of the area", *(c for n in worlds for c in ("", f"{worlds[n]['area']:.3f}"))]
    return markdown(header, [*rows, area])


def quick_table(log: dict[str, Any]) -> str:
    """Accuracy of the settings that training validates, by kind."""
    columns = list(next(iter(log["test"].values())))
    rows = [[name, *(f"{100 * row[k]:.1f}" for k in columns)] for name, row in log["test"].items()]
    return markdown(["tokens", *columns], rows)


def card(log: dict[str, Any], study: dict[str, Any] | None = None) -> str:
    """The model card, in Markdown.

    Args:
        log: summary of the training run.
        study: of the finished weights; without it the card shows the run's own test.
    """
    head = _CARD.strip().replace("{parameters}", f"{log['parameters'] / 1e6:.1f} M")
    head = head.replace("{knowledge}", _knowledge(log))
    if study is None:
        asked = f"{log['test_scenes']} scenes of the test split, twelve questions each"
        measured = [_QUICK.strip(), quick_table(log), f"Accuracy in %, on {asked}."]
    else:
        measured = _measured(study)
    runs = [*log.get("before", []), log]
    minutes = "; then ".join(_minutes(run["stages"]) for run in runs)
    notes = [f"Training time: {minutes}.", *log.get("notes", [])]
    return "\n\n".join([head, *measured, *notes]) + "\n"


def _knowledge(log: dict[str, Any]) -> str:
    """What the run was asked, by what its test asks."""
    known = "eight kinds of questions about coloured shapes on cluttered grounds"
    if not any("text" in row for row in log["test"].values()):
        return known
    return f"{known}, and three about signs and small tables on natural-looking ones"


def _minutes(stages: dict[str, dict[str, float]]) -> str:
    return ", ".join(f"{name} {stage['minutes']:.0f} min" for name, stage in stages.items())


def _measured(study: dict[str, Any]) -> list[str]:
    sizes = ", ".join(f"{n} about {name}" for name, n in study["plan"]["questions"].items())
    objects = study["worlds"].get("objects", {}).get(POSITIONS[0])
    return [
        f"Accuracy in % (95 % interval, bootstrap over scenes) on held-out questions ({sizes}), "
        "unweighted mean over the kinds; `random` is the mean of "
        f"{study['plan']['seeds']} seeds. `oracle` keeps the patches that drawn things cover most, "
        "`oracle_asked` those that the question is about, `anti_oracle` the ground.",
        worlds_table(study),
        *([kinds_table(objects)] if objects else []),
        *([targets_table(study)] if study["targets"] else []),
    ]


_MODES = {
    "contiguous": "positions renumbered",
    "original": "original positions",
}


def report(study: dict[str, Any]) -> str:
    """Every table of a study, under headings, for the documentation."""
    parts = ["### Targets", targets_table(study), "### Both worlds", worlds_table(study)]
    for name, modes in study["worlds"].items():
        size = study["plan"]["questions"][name]
        for mode, results in modes.items():
            parts += [f"### {name}, {_MODES[mode]} ({size} questions)", accuracy_table(results)]
        parts += [f"### {name} by kind of question", kinds_table(modes[POSITIONS[0]])]
    scenes = study["plan"]["scenes"]
    parts += [f"### [CLS] attention as a detector ({scenes} scenes)", detector_table(study)]
    return "\n\n".join(parts)
