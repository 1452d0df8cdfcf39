"""The axes of the exactness tests, what is exempt from which equality, and why."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from tests import tiny
from tests.methods_list import CONNECTOR_METHODS
from tests.tiny import FAMILIES
from vlmcompress.families import family_of
from vlmcompress.methods import Method, create

OPTIONS: dict[str, dict[str, Any]] = dict(CONNECTOR_METHODS)

#: `make test`: every method runs on these families, every family with the methods below.
THREE_FAMILIES = ("llava", "paligemma", "qwen2_vl")
FOUR_METHODS = ("uniform", "random", "divprune", "pool")
SLICE_KERNELS = ("sdpa", "eager")

#: The axes of the full matrix (`make test-matrix`).
KERNELS = ("sdpa", "eager", "fake_flash", "flex_attention", "flash_attention_2")
DTYPES = ("float32", "bfloat16", "float16")
POSITIONS = ("original", "contiguous")
BUDGETS: tuple[float | int | str, ...] = (1, 0.5, "auto")

#: The equalities of the full matrix and what they are called in the documentation.
EQUALITIES: dict[str, str] = {
    "keep_all": "keep all = unpatched",
    "drop_is_mask": "drop = mask",
    "cut_by_hand": "contiguous = cut by hand",
    "batch_is_singles": "batch = singles",
    "cached_is_uncached": "cached = uncached",
    "cache_bytes": "cache bytes",
    "remove_restores": "remove restores",
}
#: Equalities outside the full matrix that have exemptions.
OTHER_EQUALITIES = {"turns": "turns over a cache"}


@dataclass(frozen=True)
class Exemption:
    """An equality that does not exist for some methods, families, kernels or dtypes.

    Attributes:
        reason: why not; the documentation prints it.
        equality: of `EQUALITIES` or `OTHER_EQUALITIES`; an empty tuple stands for all, here and in
            the rest.
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

#: Methods that put dropped tokens into kept ones.
MERGERS = ("visionzip", "prumerge", "prumerge_plus", "vscan", "tome", "pitome")

#: The tests skip these and only these; docs/exactness.md prints them.
EXEMPT: tuple[Exemption, ...] = (
    Exemption(
        "a mean of tokens is no subset of them; the prompt cut by hand is compared instead",
        equality=("drop_is_mask",),
        method=("pool", *MERGERS),
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
        kernel=("fake_flash", "flash_attention_2"),
    ),
    Exemption(
        "its router chooses experts, which jumps where rounding decides; other batch shapes "
        "round differently",
        equality=("batch_is_singles", "cached_is_uncached"),
        family=("kimi_k25",),
        dtype=LOW,
    ),
    Exemption(
        "transformers offers no flex attention for this model",
        family=("qwen2_vl", "glm4v", "kimi_k25"),
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


def exempt(equality: str, **place: str) -> str | None:
    """Why a place (method, family, kernel, dtype) is exempt from an equality, None if it is not."""
    found = (e.reason for e in EXEMPT if e.covers(equality=equality, **place))
    return next(found, None)


CLS_FAMILIES = ("llava", "vipllava", "llava_next")
READABLE_FAMILIES = tuple(f for f in FAMILIES if f != "llava_pixtral")


@cache
def absent(method: str, family: str) -> str | None:
    """Why a method does not exist on a family: its tower lacks the evidence; None if it does."""
    needs = create(method).needs()
    if needs.cls and family not in CLS_FAMILIES:
        return "the tower has no [CLS] token whose attention could be read"
    if needs.attention and family not in READABLE_FAMILIES:
        return "the tower's attention cannot be read"
    if needs.text and not text_readable(family):
        return "the tower's states before the connector cannot be read token by token"
    return None


@cache
def text_readable(family: str) -> bool:
    """Whether questions can be compared with the tower's states."""
    base = tiny.build(family).base_model
    facts = family_of(tiny.build(family))
    if family == "vipllava" or not facts.connector_reads_states:
        return False
    return facts.connector(base) is not None


def runs_on(method: str, family: str) -> bool:
    """Whether a method's evidence exists in a family's tower."""
    return absent(method, family) is None


def configured(name: str) -> Method:
    """A method with the options it is tested with.

    Layer options of the shared list are made for twelve layers; the tiny towers have six.
    """
    return create(name, **{k: v for k, v in OPTIONS[name].items() if k not in ("layers", "layer")})


def slices() -> list[tuple[str, str]]:
    """Slices of `make test`: every method on three families, every family with four methods."""
    own = [("llava", m) for m in names()] + [("vipllava", "vtc_cls")]
    pairs = [(f, m) for f in THREE_FAMILIES for m in names()]
    pairs += [(f, m) for f in FAMILIES for m in (*FOUR_METHODS, "received_attention")]
    return sorted({(f, m) for f, m in pairs + own if runs_on(m, f)})


def everything() -> list[tuple[str, str]]:
    """All (family, method) pairs that exist."""
    return sorted((f, m) for f in FAMILIES for m in names() if runs_on(m, f))


def names() -> list[str]:
    """Names of all connector methods under test."""
    return list(OPTIONS)
