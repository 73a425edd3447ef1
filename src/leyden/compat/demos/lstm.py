# SPDX-License-Identifier: Apache-2.0
"""A small LSTM that models language, its state carried from batch to batch."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, Sampler

from leyden.compat.demos.transformer import WikiText2
from leyden.module import LightningModule


class SimpleLSTM(nn.Module):
    """An embedding, an LSTM and a linear layer.

    Args:
        vocab_size: Words.
        ninp: Width of the embedding.
        nhid: Width of the state.
        nlayers: Layers.
        dropout: Of all layers.
    """

    def __init__(
        self, vocab_size: int = 33278, ninp: int = 512, nhid: int = 512, nlayers: int = 4, dropout: float = 0.2
    ) -> None:
        super().__init__()
        self.vocab_size, self.nlayers, self.nhid = vocab_size, nlayers, nhid
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(vocab_size, ninp)
        self.rnn = nn.LSTM(ninp, nhid, nlayers, dropout=dropout, batch_first=True)
        self.decoder = nn.Linear(nhid, vocab_size)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the weights of the embedding and of the last layer from [-0.1, 0.1]; its bias is 0."""
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)

    def forward(self, input: Tensor, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Take (batch, length) of word numbers and a state; return (batch * length, vocab_size) of log-probabilities, and
        the next state."""
        out, hidden = self.rnn(self.drop(self.encoder(input)), hidden)
        decoded = self.decoder(self.drop(out)).view(-1, self.vocab_size)
        return functional.log_softmax(decoded, dim=1), hidden

    def init_hidden(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return the state to begin with: zeros, (nlayers, batch_size, nhid) twice."""
        weight = next(self.parameters())
        shape = (self.nlayers, batch_size, self.nhid)
        return weight.new_zeros(shape), weight.new_zeros(shape)


class SequenceSampler(Sampler[list[int]]):
    """Batches in which each place goes on with the sequence that it had in the batch before.

    Args:
        dataset: Anything with a length; what is left over at its end is not drawn.
        batch_size: How many sequences run side by side.
    """

    def __init__(self, dataset: Sized, batch_size: int) -> None:
        super().__init__()
        self.dataset, self.batch_size = dataset, batch_size
        self.chunk_size = len(dataset) // batch_size

    def __iter__(self) -> Iterator[list[int]]:
        end = len(self.dataset) - len(self.dataset) % self.batch_size
        return (list(range(first, end, self.chunk_size)) for first in range(self.chunk_size))

    def __len__(self) -> int:
        return self.chunk_size


class LightningLSTM(LightningModule):
    """The LSTM, trained by SGD on WikiText-2."""

    def __init__(self, vocab_size: int = 33278) -> None:
        super().__init__()
        self.model = SimpleLSTM(vocab_size=vocab_size)
        self.hidden: tuple[Tensor, Tensor] | None = None

    def on_train_epoch_end(self) -> None:
        self.hidden = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, target = batch
        hidden = self.model.init_hidden(inputs.size(0)) if self.hidden is None else self.hidden
        out, self.hidden = self.model(inputs, (hidden[0].detach(), hidden[1].detach()))
        loss = functional.nll_loss(out, target.view(-1))
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def prepare_data(self) -> None:
        WikiText2(download=True)

    def train_dataloader(self) -> DataLoader[Any]:
        dataset = WikiText2()
        return DataLoader(dataset, batch_sampler=SequenceSampler(dataset, batch_size=20))

    def configure_optimizers(self) -> Optimizer:
        return SGD(self.parameters(), lr=20.0)
