"""Adapters: folders with a configuration, what its methods learnt, and LoRA where there is some.

`save` and `load` are inverse to each other, on a disk or, with `push`, by way of the Hub.
"""

from vlmcompress.hub.about import About
from vlmcompress.hub.cards import write_card
from vlmcompress.hub.loading import learned, load, unload
from vlmcompress.hub.merging import merge
from vlmcompress.hub.saving import save, save_learned
from vlmcompress.hub.uploads import push, push_results

__all__ = [
    "About",
    "learned",
    "load",
    "merge",
    "push",
    "push_results",
    "save",
    "save_learned",
    "unload",
    "write_card",
]

#: The name under which `load` stands in `vlmcompress` itself.
load_adapter = load
