"""Methods with trained weights, by the name of their folder or repository."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, TypeVar

Kind = TypeVar("Kind", bound="Pretrained")


class Pretrained:
    """For methods with an option `weights`: what huggingface_hub's model mixin does for modules.

    That mixin itself does not fit: it makes a module from its arguments and fills it, and a method
    is no module. Its options are known here, and the sizes of what it learns only when it meets a
    model. The Hub is imported where it is used.
    """

    @classmethod
    def from_pretrained(cls: type[Kind], adapter: str | Path, **hub: Any) -> Kind:
        """The method in a folder or a repository of the Hub, to be given to `patch`.

        ```python
        handle = patch(model, LearnedCompressor.from_pretrained("user/mqt-8"))
        ```

        Args:
            adapter: as `vlmcompress.hub.learned` takes it.
            hub: likewise.

        Raises:
            ConfigError: for an adapter that is more than one method, or one of another class.
            CheckpointError: for weights that are no safetensors.
        """
        from vlmcompress.hub.loading import learned

        return learned(adapter, cls, **hub)

    def save_pretrained(self, folder: str | Path, **about: Any) -> Path:
        """Write options, weights and a card into a folder that `from_pretrained` reads.

        Args:
            folder: made where it is missing.
            about: what the card is to say, as `vlmcompress.hub.save_learned` takes it.

        Raises:
            ConfigError: for a method without weights.
            CheckpointError: when it cannot be written.
        """
        from vlmcompress.hub.saving import save_learned

        return save_learned(self, folder, **about)

    def push_to_hub(
        self, repo_id: str, *, about: dict[str, Any] | None = None, **options: Any
    ) -> str:
        """Put what `save_pretrained` writes on the Hub; the commit's address.

        Args:
            repo_id: `"user/name"`.
            about: what the card is to say, as for `save_pretrained`.
            options: of `vlmcompress.hub.push`, such as `private` and `token`.

        Raises:
            ConfigError: for a method without weights.
        """
        from vlmcompress.hub.uploads import push

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **{"name": repo_id, **(about or {})})
            return push(folder, repo_id, **options)
