"""What transformers asks a plug-in for: how a folder's config.json speaks of it, and what to do while it loads."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tcompress.checkpoint.integrity import require_whole
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.errors import InputError, UsageError
from tcompress.runtime.ways import check_cache
from tcompress.transformers.computing import correct
from tcompress.transformers.names import WAY_OUT, Names
from tcompress.transformers.vacancies import Vacancy, dense_again, occupy, require_complete, vacate
from tcompress.workflow.decoding import CompressedView, view
from tcompress.workflow.hugging_face import METHOD, WEIGHTS
from tcompress.workflow.reading import read_layers

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """What ``load`` was asked for: the weights, where transformers does not tell, and the cache."""

    path: Path | None = None
    cache: str | None = None


ASKED: ContextVar[Asked] = ContextVar("ASKED", default=Asked())  # noqa: B039  # frozen


@register_quantization_config(METHOD)
class TcompressConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers comes without types
    """What config.json says of a compressed folder.

    weights: name of the file, or of its index. cache: as in ``tcompress.load_into``. dtype: of the dense weights, where
    the rest of config.json says nothing of it.

    Raises InputError for weights of another name, UsageError for a cache that there is not.
    """

    def __init__(self, weights: str = WEIGHTS[-1], cache: str = "auto", dtype: str | None = None, **_: Any) -> None:
        if weights not in WEIGHTS:
            raise InputError(f"quantization_config in config.json names {weights!r} as the weights, not {WEIGHTS[-1]}")
        check_cache(cache)
        self.quant_method, self.weights, self.cache, self.dtype = METHOD, weights, cache, dtype


@register_quantizer(METHOD)
class TcompressQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts compressed layers in a model while transformers loads the rest of it.

    Every error is raised before a model is returned: no layer is ever left with made-up weights.
    """

    requires_calibration = False
    requires_parameters_quantization = False

    def __init__(self, quantization_config: TcompressConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._dense: CompressedView | None = None
        self._vacancies: list[Vacancy] = []
        self._ties: dict[str, str] = {}
        self._device_map: object = None
        self._types: dict[str, tuple[torch.dtype, str | None]] = {}
        self._cache = quantization_config.cache
        if not self.pre_quantized:
            raise UsageError("from_pretrained compresses nothing; `tcompress compress` does")

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Raise UsageError for a device map that swaps layers in and out."""
        where = set(map(str, device_map.values())) if isinstance(device_map, Mapping) else {str(device_map)}
        if "disk" in where or ("cpu" in where and len(where) > 1):
            raise UsageError(
                "device_map keeps a part of the model on the disk, or on the CPU beside another device; compressed "
                f"layers stay where they are used: name one device, or accelerators only. {WAY_OUT}"
            )

    def update_tp_plan(self, config: Any) -> Any:
        return self._with_weights(config)  # transformers 5.0

    def update_attn_implementation(self, config: Any) -> Any:
        return self._with_weights(config)  # later ones

    def _with_weights(self, config: Any) -> Any:
        """Tell transformers which file to look for; in config.json itself every loader would take it for dense."""
        config.transformers_weights = self.quantization_config.weights
        if getattr(config, "dtype", None) is None and self.quantization_config.dtype is not None:
            config.dtype = getattr(torch, self.quantization_config.dtype, None)
        return config

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any = None, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        """Check the file and take the weights of its compressed layers out of the model.

        Raises InputError when the file is damaged, or does not fit the model.
        """
        asked = ASKED.get()
        path = asked.path
        if checkpoint_files:
            path = Path(checkpoint_files[0]).parent / self.quantization_config.weights
        if path is None:
            raise UsageError(
                "this version of transformers needs tcompress.transformers.load in place of from_pretrained"
            )
        with torch.device("cpu"), open_checkpoint(path) as checkpoint:
            self._dense = view(checkpoint)
            require_whole(checkpoint)
        self._cache = asked.cache or self.quantization_config.cache
        self._device_map, self._ties = device_map, dict(getattr(model, "all_tied_weights_keys", {}))
        names = Names(model, self._dense)
        self._types = names.types()
        self._vacancies = names.vacancies(self._ties)
        for vacancy in self._vacancies:
            vacate(vacancy, 0 if device_map is None else self._dense.stored_bytes(vacancy.stored))
        vacant = {name for vacancy in self._vacancies for name in vacancy.places}
        if self._ties:
            model.all_tied_weights_keys = {a: b for a, b in self._ties.items() if not vacant & {a, b}}
        ignored = model._keys_to_ignore_on_load_unexpected
        pattern = f"^(?:{'|'.join(map(re.escape, sorted(names.parts())))})$"
        model._keys_to_ignore_on_load_unexpected = [pattern] if ignored is None else type(ignored)([*ignored, pattern])

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Put the layers in. Raises InputError when their factors are damaged, UsageError for a model that is split."""
        assert self._dense is not None  # noqa: S101
        if getattr(model, "_device_mesh", None) is not None:
            raise UsageError(f"compressed layers cannot be split between processes. {WAY_OUT}")
        self.validate_environment(device_map=getattr(model, "hf_device_map", None))
        self._retype(model)
        layers = read_layers(self._dense)
        for vacancy in self._vacancies:
            devices = {name: self._device(model, name) for name in vacancy.places}
            hooks = {place.owner: place.module.__dict__.get("_hf_hook") for place in vacancy.places.values()}
            occupy(model, vacancy, layers[vacancy.stored], self._cache, devices)
            for owner, hook in hooks.items():
                if hook is not None:  # moves inputs to the layer's device; accelerate is there, it made the hook
                    importlib.import_module("accelerate.hooks").add_hook_to_module(model.get_submodule(owner), hook)
        correct(model)
        require_complete(model, self._vacancies, self._dense.checkpoint.path)
        self._dense = None
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights
        return model

    def _retype(self, model: Any) -> None:
        """Give dense tensors their types: some versions keep, or cast, those of quantized models otherwise."""
        assert self._dense is not None  # noqa: S101
        for name, held in chain(model.named_parameters(), model.named_buffers()):
            dtype, stored = self._types.get(name, (held.dtype, None))
            if held.dtype != dtype:
                values = held if stored is None else self._dense.read(stored, torch.device("cpu"))
                held.data = values.detach().to(dtype=dtype, device=held.device, copy=True)

    def _device(self, model: Any, name: str) -> torch.device:
        """Return where a layer is to be: as the map says, or where the rest of the model is."""
        found = getattr(model, "hf_device_map", None) or self._device_map
        if isinstance(found, Mapping):
            parents = name.split(".")
            for end in range(len(parents), -1, -1):
                if ".".join(parents[:end]) in found:
                    return torch.device(found[".".join(parents[:end])])
        rest = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
        return next(rest, torch.device("cpu"))

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        other = dtype if dtype != getattr(model.config, "dtype", None) else None
        for vacancy in self._vacancies:
            dense_again(model, vacancy, other)
        if self._ties:
            model.all_tied_weights_keys = self._ties
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Say no, and what to do instead: factors are written by tcompress, dense weights after ``dequantize``."""
        _log.warning(
            "save_pretrained writes no compressed layers: call model.dequantize() first, which makes them dense, "
            "or copy the compressed folder"
        )
        return False

    @property
    def is_trainable(self) -> bool:
        """Factors that are no codes train as weights do."""
        return True
