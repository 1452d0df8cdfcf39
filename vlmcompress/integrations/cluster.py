"""Where batches are answered: a cluster of Ray, found or made."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vlmcompress.core.errors import ConfigError, MissingExtraError


@dataclass(frozen=True)
class Cluster:
    """Where it is done.

    Attributes:
        actors: that hold a model each.
        gpus: of an actor; a share such as 0.5 puts two of them on one. None for one where the
            cluster has any, and otherwise none.
        cpus: of an actor; torch takes so many threads.
        address: of a running cluster, or `auto`; None for one in this machine, that ends with the
            run.
    """

    actors: int = 1
    gpus: float | None = None
    cpus: float = 1
    address: str | None = None

    def __post_init__(self) -> None:
        """Check the counts.

        Raises:
            ConfigError: for counts that make no sense.
        """
        if self.actors < 1 or self.cpus <= 0 or (self.gpus is not None and self.gpus < 0):
            raise ConfigError(
                f"{self.actors} actors with {self.cpus} CPUs and {self.gpus} GPUs each; allowed "
                "are 1 or more actors, CPUs above 0 and GPUs of 0 or more."
            )


def ray_of() -> Any:
    """Ray with its data library.

    Raises:
        MissingExtraError: without them.
    """
    try:
        import ray.data
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise MissingExtraError("ray", "ray") from error
    return ray


@contextmanager
def started(cluster: Cluster) -> Iterator[None]:
    """Ray for the body: what runs already, a cluster at an address, or one in this machine."""
    ray = ray_of()
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"address": cluster.address}
    if cluster.address is None:
        needed = math.ceil(cluster.actors * cluster.cpus) + 1  # for the tasks that read
        options = {"num_cpus": max(needed, os.cpu_count() or 1), "include_dashboard": False}
    ray.init(**options, log_to_driver=False, logging_level="ERROR")
    logging.getLogger("ray.data").setLevel("ERROR")
    try:
        yield
    finally:
        ray.shutdown()
