"""The axes of the exactness tests, what is exempt from which equality, and why."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from tests import methods_list, tiny
from tests.tiny import FAMILIES
from vlmcompress import EvidenceError, UnsupportedModelError, VLMCompressError, patch
from vlmcompress.families import family_of
from vlmcompress.methods import LayerReducer, Method, create, get
from vlmcompress.methods.decoder.exiting import LayerExit
from vlmcompress.methods.tower.exiting import TowerExit

#: Every list of methods, so that none is forgotten here that is tested elsewhere.
OPTIONS: dict[str, dict[str, Any]] = {
    name: options
    for attribute, methods in vars(methods_list).items()
    if attribute.endswith("_METHODS")
    for name, options in methods
}

#: `make test`: every method runs on these families, every family with the methods below.
THREE_FAMILIES = ("llava", "paligemma", "qwen2_vl")
FOUR_METHODS = ("uniform", "random", "divprune", "pool")
SLICE_KERNELS = ("sdpa", "eager")

#: The axes of the full matrix (`make test-matrix`).
KERNELS = ("sdpa", "eager", "fake_flash", "flex_attention", "flash_attention_2")
DTYPES = ("float32", "bfloat16", "float16")
POSITIONS = ("original", "contiguous")
#: By stage: a tower cannot always come down to one patch, `auto` is for finished towers, and parts
#: of methods of the prompt are made for a count.
BUDGETS: dict[str, tuple[float | int | str, ...]] = {
    "connector": (1, 0.5, "auto"),
    "tower": (0.4,),
    "decoder": (1, 0.3),
    "prompt": (1, 4),
}

#: The equalities of the full matrix and what they are called in the documentation.
EQUALITIES: dict[str, str] = {
    "keep_all": "keep all = unpatched",
    "drop_is_mask": "drop = mask",
    "cut_by_hand": "contiguous = cut by hand",
    "batch_is_singles": "batch = singles",
    "cached_is_uncached": "cached = uncached",
    "cache_bytes": "cache bytes",
    "remove_restores": "remove restores",
    "same_seed": "same seed = same result",
    "training": "loss and gradients",
    "turns": "turns over a cache",
}
#: They ask nothing of a kernel or a dtype that the others do not ask.
ONCE_PER_FAMILY = ("same_seed", "training", "turns")
#: The kernel and dtype under which every equality of every method runs on every family.
PLAIN = ("sdpa", "float32")


@dataclass(frozen=True)
class Exemption:
    """An equality that does not exist for some methods, families, kernels or dtypes.

    Attributes:
        reason: why not; the documentation prints it.
        equality: of `EQUALITIES`; an empty tuple stands for all, here and in the rest.
        method: names of methods.
        family: families.
        kernel: kernels.
        dtype: dtypes.
    """

    reason: str
    equality: tuple[str, ...] = ()
    method: tuple[str, ...] = ()
    family: tuple[str, ...] = ()
    kernel: tuple[str, ...] = ()
    dtype: tuple[str, ...] = ()

    def covers(self, **place: str) -> bool:
        """Whether a place lies inside; an axis that the place does not name is not inside."""
        axes = ((name, getattr(self, name)) for name in AXES)
        return all(not values or place.get(name) in values for name, values in axes)


AXES = ("equality", "method", "family", "kernel", "dtype")
LOW = ("bfloat16", "float16")
#: Kernels that take no mask of their own making.
FLASH = ("fake_flash", "flash_attention_2")


def configured(name: str) -> Method:
    """A method with the options it is tested with.

    Layer options of the methods between tower and language model are made for twelve layers; the
    tiny towers have six.
    """
    left_out = ("layers", "layer") if stage_of(name) == "connector" else ()
    return create(name, **{k: v for k, v in OPTIONS[name].items() if k not in left_out})


def stage_of(name: str) -> str:
    """Where a method acts."""
    return get(name).stage


def names(*stages: str) -> list[str]:
    """Names of the methods under test, of some stages if any are given."""
    return [name for name in OPTIONS if not stages or stage_of(name) in stages]


def _which(stage: str, attribute: str, value: Any = True) -> tuple[str, ...]:
    """Methods of a stage that say something of themselves.

    Raises:
        ValueError: when there is none: an exemption of no method would be one of all.
    """
    told = {name: configured(name) for name in names(stage)}
    found = tuple(n for n, m in told.items() if getattr(m, attribute, False) == value)
    if not found:
        raise ValueError(f"no {stage} method has {attribute}={value}; take its exemption out")
    return found


#: Methods that put dropped tokens into kept ones.
MERGERS = (
    *("pool", "m3", "visionzip", "prumerge", "prumerge_plus", "vscan"),
    *("tome", "pitome", "vqtoken"),
)
#: The same inside the language model: into new rows, which they say, or into those that stay.
INNER_MERGERS = (*_which("decoder", "merges"), "holitom_llm")
#: Inside the tower, and every patch leaves it.
SPARING = tuple(n for n in names("tower") if configured(n).tokens_kept(25, 0.4) == 25)
#: Inside the language model, and every row stays.
BESIDE = tuple(n for n in names("decoder") if not isinstance(configured(n), LayerReducer))
#: Rows leave the layers before the last one.
EXITS = tuple(n for n in names() if isinstance(configured(n), LayerExit | TowerExit))

#: Between tower and language model, by trained weights.
TRAINED = tuple(n for n in names("connector", "prompt") if not configured(n).training_free)
#: The same, and something goes on where the prompt enters the language model.
ENTERING = tuple(names("prompt"))

#: Methods whose options say how much stays, so that `keep` cannot.
OWN_BUDGETS = tuple(n for n in names() if configured(n).own_budget)

#: Exemptions of kinds of methods that there need not be any of; one of no method is one of all.
_OF_KINDS = (
    Exemption(
        "its options, not `keep`, say what it does, and nothing says that all stays as it is",
        equality=("keep_all",),
        method=tuple(dict.fromkeys((*OWN_BUDGETS, *BESIDE))),
    ),
    Exemption(
        "it changes what layers do, and drops no token",
        equality=("drop_is_mask", "cut_by_hand", "cache_bytes"),
        method=BESIDE,
    ),
    Exemption(
        "its rows are made by trained weights, so that none of them is a token of the tower",
        equality=("keep_all", "drop_is_mask"),
        method=TRAINED,
    ),
    Exemption(
        "what the language model works on is more than the prompt and its short features: other "
        "rows in every layer, or fused ones; both are written out instead "
        "(`tests/seam/test_prompt_voco.py`, `tests/seam/test_prompt_mini.py`)",
        equality=("cut_by_hand",),
        method=ENTERING,
    ),
    Exemption(
        "the text of a turn is fused with the images of that turn alone, as the cache holds the "
        "others; all at once, it is fused with all of them",
        equality=("turns",),
        method=tuple(n for n in ENTERING if configured(n).fuses),
    ),
    Exemption(
        "a call leaves the layers together, when all of its samples may",
        equality=("batch_is_singles", "turns"),
        method=EXITS,
    ),
    Exemption(
        "layers that are passed over would learn nothing; in training it raises",
        equality=("training",),
        method=EXITS,
    ),
)

#: The tests skip these and only these; docs/exactness.md prints them.
EXEMPT: tuple[Exemption, ...] = (
    Exemption(
        "a mean of tokens is no subset of them; the prompt cut by hand is compared instead",
        equality=("drop_is_mask",),
        method=(*MERGERS, *INNER_MERGERS),
    ),
    *(exemption for exemption in _OF_KINDS if exemption.method),
    Exemption(
        "what goes inside the tower is missing from its later blocks, so that what stays differs "
        "from the full tower's; the prompt cut by hand is compared instead, and the tower with one "
        "written out (`tests/seam/test_tower.py` and those beside it)",
        equality=("drop_is_mask",),
        method=tuple(names("tower")),
    ),
    Exemption(
        "it spares work inside the tower and drops no token",
        equality=("cache_bytes",),
        method=SPARING,
    ),
    Exemption(
        "what it looks at grows with the answer, so that without a cache every step would choose "
        "anew",
        equality=("cached_is_uncached", "turns"),
        method=_which("decoder", "repeatable", False),
    ),
    Exemption(
        "it adds the log of what each token stands for to the tower's attention logits, which "
        "FlashAttention cannot; `patch` says so",
        method=_which("tower", "weighs_keys"),
        kernel=FLASH,
    ),
    Exemption(
        "FlashAttention takes no mask, so rows of its prefix see each other otherwise than under "
        "the kernels in which the reference hides or cuts",
        equality=("drop_is_mask", "cut_by_hand"),
        method=tuple(names("decoder")),
        family=("paligemma",),
        kernel=FLASH,
    ),
    Exemption(
        "its prefix attends both ways, so a longer prefix changes earlier states",
        equality=("turns",),
        family=("paligemma",),
    ),
    Exemption(
        "FlashAttention takes no mask, so its prefix and what follows see each other otherwise "
        "with a cache than without; unpatched, too",
        equality=("cached_is_uncached",),
        family=("paligemma",),
        kernel=FLASH,
    ),
    Exemption(
        "its router chooses experts, which jumps where rounding decides; other batch shapes "
        "round differently",
        equality=("batch_is_singles", "cached_is_uncached"),
        family=("kimi_k25",),
        dtype=LOW,
    ),
    Exemption(
        "which heads it edits, or which tokens it recycles together, hangs on thresholds and "
        "orders that rounding decides; other batch shapes round differently",
        equality=("batch_is_singles",),
        method=("var", "sparsevlm"),
        dtype=LOW,
    ),
    Exemption(
        "rows of its prompt see later ones, which block masks say that cannot be cut; it raises",
        method=tuple(names("decoder")),
        family=("paligemma",),
        kernel=("flex_attention",),
    ),
    Exemption(
        "transformers offers no flex attention for this model",
        family=("qwen2_vl", "qwen2_5_vl", "glm4v", "kimi_k25"),
        kernel=("flex_attention",),
    ),
    Exemption(
        "interpreted on the CPU, where it is several times slower than the other kernels; what "
        "it adds is masks of its own kind, which float32 shows",
        kernel=("flex_attention",),
        dtype=LOW,
    ),
    Exemption(
        "FlashAttention computes in half precision only",
        kernel=("flash_attention_2",),
        dtype=("float32",),
    ),
)


@cache
def exempt(equality: str, **place: str) -> str | None:
    """Why a place (method, family, kernel, dtype) is exempt from an equality, None if it is not."""
    found = (e.reason for e in EXEMPT if e.covers(equality=equality, **place))
    return next(found, None)


CLS_FAMILIES = ("llava", "vipllava", "llava_next")
READABLE_FAMILIES = tuple(f for f in FAMILIES if f != "llava_pixtral")


@cache
def absent(method: str, family: str) -> str | None:
    """Why a method does not exist on a family; None if it does."""
    if stage_of(method) != "connector":
        return refusal(method, family)
    needs = create(method).needs()
    if needs.cls and family not in CLS_FAMILIES:
        return "the tower has no [CLS] token whose attention could be read"
    if needs.layers and family not in READABLE_FAMILIES:
        return "the tower's attention cannot be read"
    if needs.text and not text_readable(family):
        return "the tower's states before the connector cannot be read token by token"
    return None


@cache
def refusal(method: str, family: str) -> str | None:
    """What `patch` says of a model on which a method inside tower or LLM cannot act.

    Told of no method and no model, so that equal reasons are equal.
    """
    model, told = _plain(family), configured(method)
    keep: Any = None if told.own_budget else 4 if told.stage == "prompt" else 0.5
    try:
        patch(model, told, keep=keep).remove()
    except (EvidenceError, UnsupportedModelError) as error:
        why = str(error).partition(";")[0].removeprefix(f"{method} ")
        return re.sub(rf"\b{family_of(model).model_type} ", "", why)
    except VLMCompressError:
        return None  # a mistake in the list, which the method's cells show
    return None


@cache
def _plain(family: str) -> Any:
    return tiny.build(family)


@cache
def text_readable(family: str) -> bool:
    """Whether questions can be compared with the tower's states."""
    base = _plain(family).base_model
    facts = family_of(_plain(family))
    if family == "vipllava" or not facts.connector_reads_states:
        return False
    return facts.connector(base) is not None


def runs_on(method: str, family: str) -> bool:
    """Whether a method's evidence exists in a family's tower."""
    return absent(method, family) is None


def slices() -> list[tuple[str, str]]:
    """Slices of `make test`: every method on three families, every family with several methods."""
    pairs = [(f, m) for m in names() for f in chosen_families(m)]
    pairs += [(f, m) for f in FAMILIES for m in (*FOUR_METHODS, "received_attention")]
    return sorted({(f, m) for f, m in pairs if runs_on(m, f)})


@cache
def chosen_families(method: str) -> tuple[str, ...]:
    """Three families that stand for all, the usual ones before others; fewer where none is left."""
    order = dict.fromkeys((*THREE_FAMILIES, *FAMILIES))
    return tuple(f for f in order if runs_on(method, f))[:3]


def everything() -> list[tuple[str, str]]:
    """All (family, method) pairs that exist."""
    return sorted((f, m) for f in FAMILIES for m in names() if runs_on(m, f))


def crossed(equality: str, method: str, family: str, kernel: str, dtype: str) -> bool:
    """Whether a cell belongs to the matrix.

    With `PLAIN` all of them do. Under other kernels and dtypes methods between tower and language
    model run on every family. Those inside either run on the three that are chosen for each, with
    every kernel in float32, every dtype under the plain kernel, and on a GPU its own kernel.
    """
    if (kernel, dtype) == PLAIN:
        return True
    if equality in ONCE_PER_FAMILY:
        return False
    if stage_of(method) == "connector":
        return True
    alone = kernel == PLAIN[0] or dtype == PLAIN[1] or kernel == "flash_attention_2"
    return alone and family in chosen_families(method)
