"""Perplexity on held-out blocks: the same number, bit for bit, however many processes share the work."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

ROWS = 8  # of a batch, always: other shapes round differently


@torch.no_grad()
def perplexity(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    blocks: np.ndarray,
    rank: int,
    world: int,
    device: torch.device,
) -> float:
    """exp of the mean negative log likelihood of each token given those before it in its block.

    blocks: [count, length] token ids. Every process runs the same number of batches of the same shape (the last ones
    repeat block 0), as ZeRO-3 needs, and sums are taken over a per-block table, so their order is always the same.
    """
    losses = torch.zeros(len(blocks), dtype=torch.float64, device=device)
    rounds = math.ceil(len(blocks) / (ROWS * world))
    for number in range(rounds):
        start = (number * world + rank) * ROWS
        rows = np.arange(start, start + ROWS)
        real = rows < len(blocks)
        ids = torch.from_numpy(blocks[np.where(real, rows, 0)].astype(np.int64)).to(device)
        sums = _block_losses(logits_of(ids), ids)
        losses[start : start + int(real.sum())] = sums[: int(real.sum())]
    if world > 1:
        dist.all_reduce(losses)  # every entry has one owner, the rest are zeros: exact
    return math.exp(losses.cpu().sum().item() / (len(blocks) * (blocks.shape[1] - 1)))


def _block_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Summed negative log likelihood of each row; logits [rows, length, vocabulary], ids [rows, length]."""
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), ids[:, 1:], reduction="none")
    return each.double().sum(dim=1)
