# SPDX-License-Identifier: Apache-2.0
"""Modules for tests of tensor parallelism: a perceptron, a small GPT, a Llama, and what a library might have made."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import leyden as L


def whole(tensor: Tensor) -> Tensor:
    """A tensor as one process has it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Recorded(L.LightningModule):
    """Records what it saw, its losses, and the norms of its gradients before they are clipped."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.samples: list[list[int]] = []
        self.evaluated: list[int] = []
        self.rate = 0.05

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("seen", float(len(batch[0])), on_step=False, on_epoch=True, reduce_fx="sum")
        self.losses.append(loss.item())
        self.samples.append(batch[-1].tolist())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated += batch[-1].tolist()
        self.log("val", self.loss(batch))
        self.log("count", float(len(batch[0])), reduce_fx="sum")

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch[-1]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        grads = [whole(p.grad) for p in self.parameters() if p.grad is not None]
        self.norms.append(torch.stack([g.square().sum() for g in grads]).sum().sqrt().item())

    def configure_optimizers(self) -> Any:
        # not Adam: it makes steps of noise where a gradient is 0, as that of the bias of keys
        return torch.optim.SGD(self.parameters(), self.rate, momentum=0.9)


class Perceptron(Recorded):
    """Two layers one behind the other, and a norm and a head that stay whole."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 1)

    def loss(self, batch: Any) -> Tensor:
        return (self.head(self.norm(self.net(batch[0]))) - batch[1]).square().mean()


class Attention(nn.Module):
    """As in nanoGPT: one layer for queries, keys and values, and a number of heads in the code."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.n_head, self.n_embd, self.dropout = heads, width, dropout
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            for t in self.c_attn(x).split(self.n_embd, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C)))  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, heads, dropout)
        self.ln_2, self.mlp = nn.LayerNorm(width), MLP(width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class GPT(Recorded):
    """The usual small one, whose embedding is its head as well."""

    def __init__(self, dropout: float = 0.0, heads: int = 4) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.rate = 0.1
        width, vocabulary = 16, 32
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(8, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(2))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))  # type: ignore[no-any-return]

    def loss(self, batch: Any) -> Tensor:
        tokens = batch[0]
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


class LlamaAttention(nn.Module):
    """Queries, keys and values apart, fewer keys than queries."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        times = self.num_heads // self.num_kv_heads
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # type: ignore[no-any-return]


class LlamaMLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, 32, bias=False), nn.Linear(width, 32, bias=False)
        self.down_proj = nn.Linear(32, width, bias=False)
        nn.init.zeros_(self.down_proj.weight)  # what a trial must not be misled by

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Llama(GPT):
    """The same task, with layers that can stay split."""

    def __init__(self, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(5)
        for block in self.blocks:
            block.attn, block.mlp = LlamaAttention(16, heads, kv_heads), LlamaMLP(16)
        self.lm_head = nn.Linear(16, 32, bias=False)


def numbers(count: int) -> torch.utils.data.TensorDataset:
    """``count`` samples: four features, their sum, and the number of the sample."""
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(7))
    return torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True), torch.arange(count))


def texts(count: int) -> torch.utils.data.TensorDataset:
    """``count`` texts of 6 tokens, and their numbers."""
    tokens = torch.randint(0, 32, (count, 6), generator=torch.Generator().manual_seed(8))
    return torch.utils.data.TensorDataset(tokens, torch.arange(count))
