"""Task: stories260K, a language model of children's stories, for models/stories260K.safetensors.

The data are in ../shared/data beside the checkout, or where TCOMPRESS_DATA says; TCOMPRESS_SCORED limits the stories
that are scored. All scored stories are in tinystories_sample.txt too: calibration takes what comes after the last one.
"""

from __future__ import annotations

import functools
import math
import os
import struct
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

DATA = Path(os.environ.get("TCOMPRESS_DATA", Path(__file__).parents[4] / "shared" / "data"))
SCORED = int(os.environ.get("TCOMPRESS_SCORED", "0")) or None
WORDS, WIDTH, INNER, LAYERS, HEADS, SHARED_HEADS = 512, 64, 172, 5, 8, 4
BASE = 10000.0  # of the angles by which positions turn
CONTEXT = 256
BEGIN, FIRST_BYTE = 1, 3  # tokens: the beginning of a text; byte 0, after which the other 255 come
TEXTS, CHARACTERS = 40, 400  # of calibration; each text is of whole paragraphs, with at least so many characters


class Attention(nn.Module):
    """Causal attention, two heads of queries to one of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.size = WIDTH // HEADS
        self.wq = nn.Linear(WIDTH, HEADS * self.size, bias=False)
        self.wk = nn.Linear(WIDTH, SHARED_HEADS * self.size, bias=False)
        self.wv = nn.Linear(WIDTH, SHARED_HEADS * self.size, bias=False)
        self.wo = nn.Linear(HEADS * self.size, WIDTH, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """Return what each position gathers from those before it. turns: (positions, size / 2), complex."""
        q, k, v = (
            each(x).unflatten(-1, (-1, self.size)).transpose(1, 2)  # (batch, heads, positions, size)
            for each in (self.wq, self.wk, self.wv)
        )
        q, k = turned(q, turns), turned(k, turns)
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(found.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: one linear layer opens and closes the other."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(WIDTH, INNER, bias=False)
        self.w2 = nn.Linear(INNER, WIDTH, bias=False)
        self.w3 = nn.Linear(WIDTH, INNER, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return an array of the shape of x."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    """Attention and a feed-forward network, each beside a way past it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.attention = Attention()
        self.ffn_norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.feed_forward = FeedForward()

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """Return an array of the shape of x."""
        x = x + self.attention(self.attention_norm(x), turns)
        return x + self.feed_forward(self.ffn_norm(x))


class Stories(nn.Module):
    """A Llama of 260,000 parameters. The output has the embedding's weight, which the checkpoint holds once."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.output = nn.Linear(WIDTH, WORDS, bias=False)
        self.output.weight = self.tok_embeddings.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (batch, positions, words) of what follows each token of (batch, positions)."""
        half = WIDTH // HEADS // 2
        speeds = BASE ** -(torch.arange(half, device=tokens.device) / half)
        angles = torch.outer(torch.arange(tokens.shape[1], device=tokens.device), speeds)
        turns = torch.polar(torch.ones_like(angles), angles)
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, turns)
        return self.output(self.norm(x))


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Turn each pair of neighbouring values by the angle of its position."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


class Tokens:
    """The 512 pieces that texts are made of: tok512.bin, as llama2.c writes it."""

    def __init__(self, path: Path) -> None:
        content, at = path.read_bytes(), 4  # the length of the longest piece comes first
        self.pieces: list[bytes] = []
        self.scores: list[float] = []
        while at < len(content):
            score, length = struct.unpack_from("<fi", content, at)
            self.scores.append(score)
            self.pieces.append(content[at + 8 : at + 8 + length])
            at += 8 + length
        for byte in range(256):  # they are written <0x0A>, and are never joined with others
            self.pieces[FIRST_BYTE + byte] = bytes([byte])
        self.numbers = {piece: at for at, piece in enumerate(self.pieces) if at >= FIRST_BYTE + 256}

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text: its beginning, and its characters joined, best pieces first."""
        found: list[int] = []
        for character in " " + text:
            known = self.numbers.get(character.encode())
            found += [FIRST_BYTE + byte for byte in character.encode()] if known is None else [known]
        while True:
            pairs = ((self._joined(*pair), at) for at, pair in enumerate(pairwise(found)))
            best = max(((self.scores[token], -at, token) for token, at in pairs if token is not None), default=None)
            if best is None:
                return [BEGIN, *found]
            at = -best[1]
            found[at : at + 2] = [best[2]]

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens, without the space that each text begins with."""
        content = b"".join(self.pieces[token] for token in tokens if token >= FIRST_BYTE)
        return content.decode(errors="replace").removeprefix(" ")

    def _joined(self, one: int, two: int) -> int | None:
        single = any(FIRST_BYTE <= token < FIRST_BYTE + 256 for token in (one, two))
        return None if single else self.numbers.get(self.pieces[one] + self.pieces[two])


@functools.cache
def tokens() -> Tokens:
    """Return the pieces; read once in a process."""
    return Tokens(DATA / "models" / "tok512.bin")


@functools.cache
def stories() -> list[list[int]]:
    """Return the tokens of all stories that can be scored."""
    with np.load(DATA / "sets" / "stories_tokens.npz") as stored:
        numbers = stored["ids"].tolist()
        return [numbers[start:end] for start, end in pairwise(stored["offset"].tolist())]


def model() -> nn.Module:
    """Return the architecture."""
    return Stories()


def evaluate(model: nn.Module) -> dict[str, float]:
    """Return what the first 256 tokens of each story cost: nats a token, and bits a character of their text."""
    device = next(chain(model.parameters(), model.buffers())).device
    nats, count, characters = 0.0, 0, 0
    with torch.inference_mode():
        for story in stories()[:SCORED]:
            told = story[: CONTEXT + 1]
            given = torch.tensor(told, device=device)
            logits = model(given[None, :-1])[0]
            nats += float(F.cross_entropy(logits.float(), given[1:], reduction="sum"))
            count += len(told) - 1
            characters += len(tokens().decode(told[1:]))
    return {"nats_per_token": nats / count, "bits_per_character": nats / math.log(2) / characters}


def unscored_texts() -> list[str]:
    """Return texts of whole paragraphs from the end of the sample, where no scored story is."""
    scored = [tokens().decode(story).strip() for story in stories()]
    sample = (DATA / "sets" / "tinystories_sample.txt").read_text("utf-8").replace("\n\n", "\n")  # as the stories are
    end = max(sample.rfind(story) + len(story) for story in scored)
    texts, text = [], ""
    for paragraph in sample[end:].strip().split("\n"):
        text = f"{text}\n{paragraph}".lstrip()
        if len(text) >= CHARACTERS:
            texts.append(text)
            text = ""
    assert all(story in sample[:end] for story in scored)
    return texts


def calibration_batches() -> list[Tensor]:
    """Return the tokens of 40 texts, a text a batch."""
    return [torch.tensor([tokens().encode(text)[:CONTEXT]]) for text in unscored_texts()[:TEXTS]]
