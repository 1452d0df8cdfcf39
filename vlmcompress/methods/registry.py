"""Names to methods, imported only when asked for.

Third parties add methods through the entry-point group `vlmcompress.methods`; a built-in name
cannot be taken over.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from vlmcompress.core.errors import ConfigError, UnknownMethodError
from vlmcompress.methods.base import Method

ENTRY_POINT_GROUP = "vlmcompress.methods"

BUILTIN: dict[str, str] = {
    "random": "vlmcompress.methods.connector.random:Random",
    "uniform": "vlmcompress.methods.connector.uniform:Uniform",
    "pool": "vlmcompress.methods.connector.pool:Pool",
    "fastervlm": "vlmcompress.methods.connector.fastervlm:FasterVLM",
    "vtc_cls": "vlmcompress.methods.connector.vtc_cls:VTCCLS",
    "received_attention": "vlmcompress.methods.connector.received_attention:ReceivedAttention",
    "divprune": "vlmcompress.methods.connector.divprune:DivPrune",
    "hired": "vlmcompress.methods.connector.hired:HiRED",
    "visionzip": "vlmcompress.methods.connector.visionzip:VisionZip",
    "prumerge": "vlmcompress.methods.connector.prumerge:PruMerge",
    "prumerge_plus": "vlmcompress.methods.connector.prumerge_plus:PruMergePlus",
    "vispruner": "vlmcompress.methods.connector.vispruner:VisPruner",
    "scope": "vlmcompress.methods.connector.scope:Scope",
    "holov": "vlmcompress.methods.connector.holov:HoloV",
    "vscan": "vlmcompress.methods.connector.vscan:VScan",
    "tome": "vlmcompress.methods.connector.tome:ToMe",
    "pitome": "vlmcompress.methods.connector.pitome:PiToMe",
    "vqtoken": "vlmcompress.methods.connector.vqtoken:VQToken",
    "vq_codebook": "vlmcompress.methods.connector.vq_codebook:VQCodebook",
    "cdpruner": "vlmcompress.methods.connector.cdpruner:CDPruner",
    "m3": "vlmcompress.methods.connector.m3:M3",
    "tokenpacker": "vlmcompress.methods.connector.tokenpacker:TokenPacker",
    "c_abstractor": "vlmcompress.methods.connector.c_abstractor:CAbstractor",
    "mqt": "vlmcompress.methods.connector.mqt:MQT",
    "lookup": "vlmcompress.methods.connector.lookup:Lookup",
    "windowed": "vlmcompress.methods.connector.windowed:Windowed",
    "bus": "vlmcompress.methods.connector.bus:BUS",
    "quecc": "vlmcompress.methods.prompt.quecc:QueCC",
    "llava_mini": "vlmcompress.methods.prompt.llava_mini:LLaVAMini",
    "voco_llama": "vlmcompress.methods.prompt.voco_llama:VoCoLLaMA",
    "evit": "vlmcompress.methods.tower.evit:EViT",
    "tome_tower": "vlmcompress.methods.tower.tome:ToMeTower",
    "pitome_tower": "vlmcompress.methods.tower.pitome:PiToMeTower",
    "mctf": "vlmcompress.methods.tower.mctf:MCTF",
    "ats": "vlmcompress.methods.tower.ats:ATS",
    "sta": "vlmcompress.methods.tower.sta:STA",
    "zero_tprune": "vlmcompress.methods.tower.zero_tprune:ZeroTPrune",
    "token_clustering": "vlmcompress.methods.tower.token_clustering:TokenClustering",
    "vomix": "vlmcompress.methods.tower.vomix:VoMix",
    "hvt": "vlmcompress.methods.tower.hvt:HVT",
    "t2t": "vlmcompress.methods.tower.t2t:T2T",
    "sit": "vlmcompress.methods.tower.sit:SiT",
    "sparsifiner": "vlmcompress.methods.tower.sparsifiner:Sparsifiner",
    "early_exit_tower": "vlmcompress.methods.tower.early_exit:EarlyExitTower",
    "fastv": "vlmcompress.methods.decoder.fastv:FastV",
    "pyramiddrop": "vlmcompress.methods.decoder.pyramiddrop:PyramidDrop",
    "random_layer": "vlmcompress.methods.decoder.random_layer:RandomLayer",
    "uniform_layer": "vlmcompress.methods.decoder.uniform_layer:UniformLayer",
    "sparsevlm": "vlmcompress.methods.decoder.sparsevlm:SparseVLM",
    "fitprune": "vlmcompress.methods.decoder.fitprune:FitPrune",
    "vscan_llm": "vlmcompress.methods.decoder.vscan_llm:VScanLLM",
    "topv": "vlmcompress.methods.decoder.topv:TopV",
    "holitom_llm": "vlmcompress.methods.decoder.holitom_llm:HoliTomLLM",
    "prunevid_llm": "vlmcompress.methods.decoder.prunevid_llm:PruneVidLLM",
    "atp": "vlmcompress.methods.decoder.atp:ATP",
    "var": "vlmcompress.methods.decoder.var:VAR",
    "mod": "vlmcompress.methods.decoder.mod:MoD",
    "early_exit": "vlmcompress.methods.decoder.early_exit:EarlyExit",
}


@cache
def _external() -> dict[str, EntryPoint]:
    return {ep.name: ep for ep in entry_points(group=ENTRY_POINT_GROUP) if ep.name not in BUILTIN}


def names() -> list[str]:
    """All registered method names, sorted."""
    return sorted({*BUILTIN, *_external()})


def get(name: str) -> type[Method]:
    """The class registered under `name`.

    Raises:
        UnknownMethodError: with near names, when there is none.
        ConfigError: when a third party's entry point is no `Method`.
    """
    if name in BUILTIN:
        module, _, attribute = BUILTIN[name].partition(":")
        return getattr(import_module(module), attribute)  # type: ignore[no-any-return]
    if name in _external():
        method = _external()[name].load()
        if not (isinstance(method, type) and issubclass(method, Method)):
            raise ConfigError(
                f"Entry point {name!r} of group {ENTRY_POINT_GROUP!r} is {method!r}; "
                "it must be a subclass of vlmcompress.methods.Method."
            )
        return method
    raise UnknownMethodError(name, names())


def create(name: str, **options: Any) -> Method:
    """An instance of the method `name` with `options` set.

    Raises:
        UnknownMethodError: for an unknown name.
        ConfigError: for an option the method does not have.
    """
    method = get(name)
    known = [f.name for f in dataclasses.fields(method)]  # type: ignore[arg-type]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(
            f"Method {name!r} has no option {', '.join(unknown)}; "
            f"its options: {', '.join(known) or 'none'}."
        )
    return method(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
