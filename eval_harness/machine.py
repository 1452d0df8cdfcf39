"""What a measurement must say about where it was taken."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

from vlmcompress.reference.weights import WEIGHTS_DIR


def describe(model: Any) -> dict[str, Any]:
    """`environment`, and the model's type, kernel and shape, JSON-ready."""
    return {
        **environment(),
        "device": device_name(torch.device(model.device)),
        **gpu(torch.device(model.device)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": _kernels(model.config),
        "shape": name_of(model),
    }


def name_of(model: Any) -> str:
    """Hub id of a model, or `reference`, or its folder's own name: not where the folder lies."""
    name = str(getattr(model, "name_or_path", "")) or type(model).__name__
    folder = Path(name)
    if not folder.is_dir():
        return name
    return "reference" if folder.resolve() == WEIGHTS_DIR else folder.resolve().name


def environment() -> dict[str, Any]:
    """When, which commit, on what machine and with which versions, JSON-ready."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def gpu(device: torch.device) -> dict[str, Any]:
    """Driver and clocks of a GPU as its own tool tells them; empty elsewhere."""
    if device.type != "cuda":
        return {}
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "power.limit")
    asked = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    told: list[str] = []
    try:
        lines = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10)
        told = lines.stdout.splitlines()[device.index or 0].split(", ")
    except (OSError, subprocess.SubprocessError, IndexError):
        pass  # what the tool would say stays unknown
    return {"cuda": torch.version.cuda, "gpu": dict(zip(fields, told, strict=False))}


def commit() -> str:
    """Short hash of the checkout that holds this package, `-dirty` when files differ; or empty."""
    here = str(Path(__file__).parent)
    try:
        found = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The name of a GPU; the type of anything else."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _kernels(config: Any) -> dict[str, str]:
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    return {
        name: str(part._attn_implementation)
        for name, part in (("tower", vision), ("language_model", text))
        if part is not None
    }
