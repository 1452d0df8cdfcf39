"""The small vision-language model that ships with the library, and the scenes it is asked about."""

from .data import Sample, samples
from .questions import KINDS

__all__ = ["KINDS", "Sample", "samples"]
