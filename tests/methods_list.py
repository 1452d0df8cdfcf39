"""Every built-in method with the options it is tested with, one line each."""

from __future__ import annotations

from typing import Any

CONNECTOR_METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("random", {"seed": 3}),
    ("uniform", {}),
    ("pool", {}),
    ("fastervlm", {"layer": -2}),
    ("vtc_cls", {"layers": (0.25, -3, 5)}),
    ("received_attention", {"layers": (-4, -3, -2)}),
    ("divprune", {}),
    ("hired", {"layer": 0.5}),
    ("visionzip", {"contextual": 0.25}),
    ("prumerge", {"neighbours": 5}),
    ("prumerge_plus", {"neighbours": 5}),
    ("vispruner", {"important": 0.4}),
    ("scope", {}),
    ("holov", {"crops": 4}),
    ("vscan", {"window": 3}),
    ("tome", {}),
    ("pitome", {"margin": 0.2}),
    ("vqtoken", {"iterations": 20}),
    ("cdpruner", {}),
    ("m3", {}),
)

#: Those between tower and language model whose rows are made by trained weights.
TRAINED_METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("vq_codebook", {"size": 16, "channels": 8}),
    ("tokenpacker", {"layers": (0.5, -1), "head_width": 16}),
    ("c_abstractor", {"depth": 1}),
    ("mqt", {"max_tokens": 16, "head_width": 16}),
    ("lookup", {"depth": 1}),
    ("windowed", {"stages": 1}),
    ("bus", {"depth": 1, "text_width": 6}),
    ("quecc", {"heads": 4}),
)

#: Those whose work goes on where the prompt enters the language model.
PROMPT_METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llava_mini", {"fusion": 1, "heads": 4}),
    ("voco_llama", {}),
)

TOWER_METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("evit", {}),
    ("tome_tower", {}),
    ("pitome_tower", {"margin": 0.5}),
    ("mctf", {}),
    ("ats", {}),
    ("sta", {}),
    ("zero_tprune", {"rounds": (4, 2, 1)}),
    ("token_clustering", {"reconstruct": False}),
    ("vomix", {"temperature": 0.1}),
    ("hvt", {"pooling": "average"}),
    ("t2t", {"overlap": 2}),
    ("sit", {"reverse": True}),
)

#: Those inside the tower that take no patch off it.
SPARSE_TOWER_METHODS: tuple[tuple[str, dict[str, Any]], ...] = (("sparsifiner", {"rank": 4}),)

#: Those inside the tower that end it early.
EXIT_TOWER_METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("early_exit_tower", {"threshold": 0.9}),
)

#: Those inside the language model, with layers that a model of three has.
LAYER_METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("fastv", {"layers": (1,)}),
    ("pyramiddrop", {"layers": (1, 2)}),
    ("random_layer", {"layers": (1, 2), "seed": 3}),
    ("uniform_layer", {"layers": (1, 2)}),
    ("sparsevlm", {"layers": (1, 2), "recycled": 0.5}),
    ("fitprune", {}),
    ("vscan_llm", {"layers": (1,), "rotary": False}),
    ("topv", {"layers": (1,), "recovered": 0.25}),
    ("holitom_llm", {"layers": (2,)}),
    ("prunevid_llm", {"layers": (1,)}),
)

#: Those of them whose own thresholds say how many stay.
ADAPTIVE_LAYER_METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("atp", {"layers": (1, 2), "sample_rates": (0.25,)}),
)

#: Those that drop nothing there: they edit attention, let tokens pass by layers, or leave early.
BESIDE_METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("var", {"tau": 2.0, "layers": (1,)}),
    ("mod", {"layers": (1,)}),
    ("early_exit", {"threshold": 0.9}),
)
