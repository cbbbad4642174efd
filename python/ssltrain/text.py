# SPDX-License-Identifier: Apache-2.0
"""The text tower of ``ssltrain clip``: hashed words and parts of words, averaged, and two layers.

A bag of words and of their letters in threes (as fastText has them) needs no vocabulary, learns from a
few thousand captions, and takes a word that it never saw by its parts.  It knows no word order.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BUCKETS = 1 << 15  # rows of the table of embeddings; 0 is no token
LETTERS = 3


def pieces(caption: str) -> list[str]:
    """Words of a caption, and the threes of letters of each, its ends marked."""
    words = re.findall(r"\w+", caption.casefold())
    found = []
    for word in words:
        marked = f"<{word}>"
        found.append(marked)
        found += [marked[i : i + LETTERS] for i in range(len(marked) - LETTERS + 1)]
    return found


def tokenize(captions: Iterable[str]) -> Tensor:
    """Numbers of the pieces of each caption, int32 [N, L]; 0 where a caption has fewer than L."""
    rows = [
        [
            1 + zlib.crc32(piece.encode("utf-8", "surrogatepass")) % (BUCKETS - 1)
            for piece in pieces(c)
        ]
        for c in captions
    ]
    tokens = torch.zeros(len(rows), max(1, *(len(row) for row in rows), 1), dtype=torch.int32)
    for row, numbers in enumerate(rows):
        tokens[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.int32)
    return tokens


class TextEncoder(nn.Module):
    """Tokens, int32 [N, L], to [N, ``dim``]."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(BUCKETS, width, padding_idx=0)
        nn.init.normal_(self.table.weight, std=width**-0.5)
        with torch.no_grad():
            self.table.weight[0] = 0
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Projections of captions."""
        count = (tokens != 0).sum(1, keepdim=True).clamp(min=1)
        mean = self.table(tokens).sum(1) / count
        z: Tensor = self.out(F.gelu(self.hidden(mean)))
        return z
