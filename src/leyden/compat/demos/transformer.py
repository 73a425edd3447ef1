# SPDX-License-Identifier: Apache-2.0
"""A small transformer that models language, and the text that it is shown on."""

from __future__ import annotations

import math
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, Dataset

from leyden import atomic
from leyden.module import LightningModule

_TEXT = "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/train.txt"


def _put(content: bytes, path: Path) -> None:
    path.write_bytes(content)


class Transformer(nn.Module):
    """An encoder and a decoder with an embedding in common.

    Args:
        vocab_size: Words; WikiText-2 has 33278.
        ninp: Width.
        nhead: Heads of attention.
        nhid: Width of the feed-forward layers.
        nlayers: Layers of the encoder, and of the decoder.
        dropout: Of all layers.
    """

    def __init__(
        self,
        vocab_size: int = 33278,
        ninp: int = 200,
        nhead: int = 2,
        nhid: int = 200,
        nlayers: int = 2,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.pos_encoder = PositionalEncoding(ninp, dropout)
        self.embedding = nn.Embedding(vocab_size, ninp)
        self.transformer = nn.Transformer(
            d_model=ninp,
            nhead=nhead,
            num_encoder_layers=nlayers,
            num_decoder_layers=nlayers,
            dim_feedforward=nhid,
            dropout=dropout,
            batch_first=True,
        )
        self.decoder = nn.Linear(ninp, vocab_size)
        self.ninp, self.vocab_size = ninp, vocab_size
        self.src_mask: Tensor | None = None

    def generate_square_subsequent_mask(self, size: int) -> Tensor:
        """A (size, size) mask that is minus infinity above the diagonal, so that no position sees a later one."""
        return torch.full((size, size), float("-inf")).triu(diagonal=1)

    def forward(self, inputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Take two (batch, length) of word numbers; return (batch * length, vocab_size) of log-probabilities."""
        length = inputs.shape[1]
        if self.src_mask is None or self.src_mask.size(0) != length:
            self.src_mask = self.generate_square_subsequent_mask(length).to(inputs.device)
        if mask is None:
            mask = self.generate_square_subsequent_mask(length).to(inputs.device)
        scale = math.sqrt(self.ninp)
        source = self.pos_encoder(self.embedding(inputs) * scale)
        shown = self.pos_encoder(self.embedding(target) * scale)
        out = self.decoder(self.transformer(source, shown, tgt_mask=mask))
        return functional.log_softmax(out, dim=-1).view(-1, self.vocab_size)


class PositionalEncoding(nn.Module):
    """Adds sines and cosines, one row of a table for all positions, and drops out (Vaswani et al. 2017, simplified).

    Args:
        dim: Width.
        dropout: What is dropped.
        max_len: Rows of the table.
    """

    def __init__(self, dim: int, dropout: float = 0.1, max_len: int = 5000) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p=dropout)
        self.dim, self.max_len = dim, max_len
        self.pe: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.pe is None:
            self.pe = self._table(x.device)
        out: Tensor = self.dropout(x + self.pe[:, x.size(1)])
        return out

    def _table(self, device: torch.device) -> Tensor:
        place = torch.arange(0, self.max_len, dtype=torch.float, device=device).unsqueeze(1)
        rate = torch.exp(torch.arange(0, self.dim, 2, device=device).float() * (-math.log(10000.0) / self.dim))
        table = torch.zeros(self.max_len, self.dim, device=device)
        table[:, 0::2] = torch.sin(place * rate)
        table[:, 1::2] = torch.cos(place * rate)
        return table.unsqueeze(0)


class WikiText2(Dataset[Any]):
    """The training text of WikiText-2 in blocks of words, each with the block that is one word further.

    Args:
        data_dir: The text is, or will be, here.
        block_size: Words in a block.
        download: Fetch the text if it is not there.
    """

    def __init__(self, data_dir: Path = Path("./data"), block_size: int = 35, download: bool = True) -> None:
        super().__init__()
        self.path = data_dir / "wikitext-2.txt"
        if download:
            self.download(self.path)
        self.data, self.dictionary = tokenize(self.path)
        self.block_size = block_size

    @property
    def vocab_size(self) -> int:
        """How many words there are."""
        return len(self.dictionary)

    def __len__(self) -> int:
        return len(self.data) // self.block_size - 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        begin = index * self.block_size
        end = begin + self.block_size
        return self.data[begin:end], self.data[begin + 1 : end + 1]

    @staticmethod
    def download(destination: Path) -> None:
        """Fetch the text, unless it is there."""
        if destination.exists():
            return
        destination.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(_TEXT) as answer:
            content = answer.read()
        atomic.write_file(destination, partial(_put, content))


class Dictionary:
    """Words and their numbers."""

    def __init__(self) -> None:
        self.word2idx: dict[str, int] = {}
        self.idx2word: list[str] = []

    def add_word(self, word: str) -> int:
        """Return the number of a word, a new one for a new word."""
        if word not in self.word2idx:
            self.word2idx[word] = len(self.idx2word)
            self.idx2word.append(word)
        return self.word2idx[word]

    def __len__(self) -> int:
        return len(self.idx2word)


def tokenize(path: Path) -> tuple[Tensor, Dictionary]:
    """Return the words of a text as numbers, one tensor, and the dictionary; each line ends with ``<eos>``."""
    dictionary = Dictionary()
    with open(path, encoding="utf8") as text:
        numbers = [dictionary.add_word(word) for line in text for word in [*line.split(), "<eos>"]]
    return torch.tensor(numbers, dtype=torch.int64), dictionary


class LightningTransformer(LightningModule):
    """The transformer, trained by SGD on WikiText-2."""

    def __init__(self, vocab_size: int = 33278) -> None:
        super().__init__()
        self.model = Transformer(vocab_size=vocab_size)

    def forward(self, inputs: Tensor, target: Tensor) -> Tensor:
        out: Tensor = self.model(inputs, target)
        return out

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, target = batch
        return functional.nll_loss(self(inputs, target), target.view(-1))

    def configure_optimizers(self) -> Optimizer:
        return SGD(self.model.parameters(), lr=0.1)

    def prepare_data(self) -> None:
        WikiText2(download=True)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(WikiText2())
