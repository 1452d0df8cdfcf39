"""The servers that answers are compared on: models, methods, and ways to start one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from eval_harness.served.models import MODELS
from eval_harness.served.server import PLAIN
from vlmcompress.core.config import CompressionConfig, StageConfig
from vlmcompress.integrations.vllm.serving import TESTED_METHODS
from vlmcompress.reference.weights import WEIGHTS_DIR, load

KEEP = 0.1
RANK, ALPHA, ADAPTER = 8, 16, "drawn"
#: Methods for towers whose attention only `patch` reads.
OF_FEATURES = ("uniform", "pool", "divprune", "tome(metric='features')", "vqtoken")


@dataclass(frozen=True)
class Case:
    """One server.

    Attributes:
        model: of `MODELS`, or a way to start the reference model: `merged`, a folder that says
            itself what it was trained for; `lora`, an adapter beside the model; `two_ranks`, heads
            split over two processes.
        method: without its budget.
    """

    model: str
    method: str

    @property
    def name(self) -> str:
        """What the command line calls it."""
        return f"{self.model}:{self.method}"

    @property
    def spec(self) -> str:
        """Method and budget."""
        return f"{self.method}:{KEEP}"


CASES = (
    *(Case(model, method) for model in ("llava", "llava_next") for method in TESTED_METHODS),
    *(Case(model, method) for model in ("qwen2_vl", "qwen2_5_vl") for method in OF_FEATURES),
    *(Case(way, "vtc_cls") for way in ("merged", "lora", "two_ranks")),
)


@dataclass(frozen=True)
class Setup:
    """How a case is run.

    Attributes:
        served: folder that the engine loads.
        truth: folder that transformers loads.
        told: what `--hf-overrides` says to the plugin.
        options: of the server.
        asked_as: the model's name in requests; None for the folder.
        environment: of the server's process.
    """

    served: Path
    truth: Path
    told: Mapping[str, Any]
    options: tuple[str, ...] = PLAIN
    asked_as: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def prepare(case: Case, work: Path) -> Setup:
    """Write the folders of a case."""
    if case.model == "merged":
        folder = _merged(work / "merged", case)
        return Setup(folder, folder, {})
    if case.model == "lora":
        return _with_lora(work, case)
    if case.model == "two_ranks":
        folder = MODELS["llava"](work / "llava")
        split = (*PLAIN, "--tensor-parallel-size", "2")
        cores = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
        return Setup(folder, folder, {"method": case.spec}, split, environment=cores)
    folder = MODELS[case.model](work / case.model)
    return Setup(folder, folder, {"method": case.spec})


def _config(case: Case) -> CompressionConfig:
    return CompressionConfig((StageConfig(case.method, KEEP),), trained_keep=(KEEP, KEEP))


def _merged(folder: Path, case: Case) -> Path:
    """What `hub.merge` and `processor.save_pretrained` leave: names as transformers writes them."""
    model, processor = load()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    _config(case).save(folder)
    return folder


def _with_lora(work: Path, case: Case) -> Setup:
    """Drawn LoRA in the language model: beside it for the engine, added up for transformers."""
    adapter, added = work / "lora", work / "lora_added"
    adapter.mkdir(parents=True, exist_ok=True)
    model, processor = load()
    draw = torch.Generator().manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if "language_model" in name and name.endswith(("q_proj", "v_proj")):
            rows, columns = module.weight.shape
            a = torch.randn(RANK, columns, generator=draw) * columns**-0.5
            b = torch.randn(rows, RANK, generator=draw) * 0.02
            module.weight.data += ALPHA / RANK * b @ a
            found[f"base_model.model.{name}.lora_A.weight"] = a
            found[f"base_model.model.{name}.lora_B.weight"] = b
    save_file(found, adapter / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": str(WEIGHTS_DIR),
    }
    (adapter / "adapter_config.json").write_text(json.dumps(described), encoding="utf-8")
    _config(case).save(adapter)
    model.save_pretrained(added)
    processor.save_pretrained(added)
    options = (*PLAIN, "--enable-lora", "--lora-modules", f"{ADAPTER}={adapter}")
    base = MODELS["llava"](work / "llava")
    return Setup(base, added, {"config": str(adapter)}, options, ADAPTER)
