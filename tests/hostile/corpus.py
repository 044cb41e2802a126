"""All malformed, malicious and odd checkpoints, by name."""

from tests.hostile import corpus_compressed, corpus_dense, corpus_torch
from tests.hostile.case import CASES, COMMANDS, Case

__all__ = ["CASES", "COMMANDS", "Case", "corpus_compressed", "corpus_dense", "corpus_torch"]
