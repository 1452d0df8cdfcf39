"""Which (family, method) pairs the exactness tests run, and what pairs are exempt from."""

from __future__ import annotations

from tests.methods_list import CONNECTOR_METHODS
from tests.tiny import FAMILIES

#: Every method runs on these, every family with the methods below.
THREE_FAMILIES = ("llava", "paligemma", "qwen2_vl")
FOUR_METHODS = ("uniform", "random", "divprune", "pool")
KERNELS = ("sdpa", "eager")

#: (method, family, equality: reason); "*" is all. docs/exactness.md prints them.
EXEMPT: tuple[tuple[str, str, str], ...] = (
    (
        "pool",
        "*",
        "drop = mask: a mean of tokens is no subset of them; "
        "the hand-cut forward is compared instead",
    ),
    (
        "*",
        "paligemma",
        "turns over a cache: its prefix attends both ways, "
        "so a longer prefix changes earlier states",
    ),
)


def exempt(equality: str, *, method: str = "*", family: str = "*") -> str | None:
    """Why a pair is exempt from an equality, None where it is not."""
    for m, f, reason in EXEMPT:
        if reason.startswith(equality) and m in ("*", method) and f in ("*", family):
            return reason
    return None


def exemptions_table() -> str:
    """The exemptions as docs/exactness.md shows them."""
    rows = [
        f"| {'all' if m == '*' else f'`{m}`'} | {'all' if f == '*' else f'`{f}`'} | {reason} |"
        for m, f, reason in EXEMPT
    ]
    return "\n".join(["| method | family | equality and reason |", "|---|---|---|", *rows])


CLS_FAMILIES = ("llava", "vipllava")
READABLE_FAMILIES = tuple(f for f in FAMILIES if f != "llava_pixtral")


def runs_on(method: str, family: str) -> bool:
    """Whether a method's evidence exists in a family's tower."""
    if method in ("fastervlm", "vtc_cls", "hired"):
        return family in CLS_FAMILIES
    if method == "received_attention":
        return family in READABLE_FAMILIES
    return True


def slices() -> list[tuple[str, str]]:
    """Slices of `make test`: every method on three families, every family with four methods."""
    own = [("llava", m) for m in names()] + [("vipllava", "vtc_cls")]
    pairs = [(f, m) for f in THREE_FAMILIES for m in names()]
    pairs += [(f, m) for f in FAMILIES for m in (*FOUR_METHODS, "received_attention")]
    return sorted({(f, m) for f, m in pairs + own if runs_on(m, f)})


def everything() -> list[tuple[str, str]]:
    """All pairs that can run."""
    return sorted((f, m) for f in FAMILIES for m in names() if runs_on(m, f))


def names() -> list[str]:
    """Names of all connector methods under test."""
    return [name for name, _ in CONNECTOR_METHODS]
