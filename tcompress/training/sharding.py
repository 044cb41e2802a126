"""Launchers that share a model out among processes, which training cannot go along with."""

from __future__ import annotations

import os

from tcompress.errors import UsageError

_SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
_YES = {"1", "true", "yes", "y", "on", "t"}


def require_whole_models() -> None:
    """Raise UsageError where `accelerate launch` asks for parameters in shards.

    Scores are taken, and states saved, by one process from factors that are whole; methods read and change them between
    epochs. On the CPU Accelerate would leave such a wish aside without a word.
    """
    for variable, name in _SHARDING.items():
        if os.environ.get(variable, "").lower() in _YES:
            way_out = (
                "start it with `accelerate launch --multi_gpu`: each process has the whole of the compressed model"
            )
            raise UsageError(f"Accelerate is set up for {name}, and factors are not trained in shards; {way_out}")
