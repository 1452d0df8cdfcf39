"""Loading a model to train LoRA on, its language model in 4 bits if wanted (QLoRA).

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (https://arxiv.org/abs/2305.14314),
section 3: weights in 4-bit NormalFloat with doubly quantised constants, adapters in full precision.
Tower, connector and output head stay as they are: they are small, and the connector's rows are what
compression chooses from.
"""

from __future__ import annotations

from typing import Any

import torch

from vlmcompress.core.errors import ConfigError, UnsupportedModelError
from vlmcompress.core.extras import require
from vlmcompress.training.targets import outside_decoder


def load_in_4bit(model: str, precision: str, device: torch.device) -> Any:
    """A model whose language model's linear maps are in 4 bits.

    Args:
        model: a folder or a hub id.
        precision: `float32` or `bfloat16`: of what is not quantised, and of the passes.
        device: where it goes.

    Raises:
        UnsupportedModelError: when transformers cannot load it.
        ConfigError: for a model that is quantised already.
        MissingExtraError: without bitsandbytes and accelerate.
    """
    require("accelerate")
    require("bitsandbytes")
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

    dtype: torch.dtype = getattr(torch, precision)
    try:
        config = AutoConfig.from_pretrained(model)
        if getattr(config, "quantization_config", None) is not None:
            raise ConfigError(f"{model} is quantised already; load it without load_in_4bit.")
        with torch.device("meta"):
            skeleton = AutoModelForImageTextToText.from_config(config)
        options = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=outside_decoder(skeleton),
        )
        return AutoModelForImageTextToText.from_pretrained(
            model, quantization_config=options, dtype=dtype, device_map={"": device}
        ).eval()
    except ConfigError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise UnsupportedModelError(f"{model!r} cannot be loaded in 4 bits: {error}") from error
