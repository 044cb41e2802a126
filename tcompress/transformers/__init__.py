"""AutoModel.from_pretrained() of a compressed folder, by the registration that transformers has for such plug-ins.

``import tcompress.transformers`` is all that transformers 5 needs; transformers 4.57 needs ``load`` as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

try:
    from transformers import AutoConfig, AutoModel
    from transformers.utils import cached_file

    from tcompress.transformers.quantizer import ASKED, Asked, TcompressConfig, TcompressQuantizer
except ImportError as error:
    raise ImportError(
        f"transformers 4.57 or newer is needed ({error}): pip install 'tcompress[transformers]'"
    ) from None

from tcompress.errors import InputError
from tcompress.runtime.ways import check_cache
from tcompress.workflow.hugging_face import METHOD, is_ours, weights_in

__all__ = ["TcompressConfig", "TcompressQuantizer", "load"]

_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def load(folder: str | Path, auto_class: Any = AutoModel, *, cache: str | None = None, **kwargs: Any) -> Any:
    """Return the model of a compressed folder, or repository; with every version of transformers.

    auto_class: any class with ``from_pretrained``. cache: as in ``tcompress.load_into``; None takes what config.json
    says, or ``auto``. Anything else goes to ``from_pretrained``.

    Raises InputError when nothing compressed is there, the file is damaged, or does not fit the model.
    """
    if cache is not None:
        check_cache(cache)
    hub = {name: kwargs[name] for name in _HUB if name in kwargs}
    config = kwargs.pop("config", None)
    if config is None:
        trusted = {name: kwargs[name] for name in ("trust_remote_code",) if name in kwargs}
        config = AutoConfig.from_pretrained(folder, **hub, **trusted)
    settings = getattr(config, "quantization_config", None)
    if settings is None and (weights := weights_in(Path(folder, str(hub.get("subfolder", ""))))) is not None:
        settings = {"quant_method": METHOD, "weights": weights}  # of a folder whose config.json was left alone
    if not is_ours(settings):
        raise InputError("its config.json names no compressed weights", path=folder)
    config.quantization_config = settings
    config.transformers_weights = TcompressConfig.from_dict(settings).weights
    path = cached_file(str(folder), config.transformers_weights, **hub)
    token = ASKED.set(Asked(Path(path), cache))
    try:
        return auto_class.from_pretrained(folder, config=config, **kwargs)
    finally:
        ASKED.reset(token)
