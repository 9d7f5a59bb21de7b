"""Perplexity on held-out text: the same number, bit for bit, however many processes share the work."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from launch.losses import Batch, token_losses

ROWS = 8  # of a batch, always: other shapes round differently
LogitsOf = Callable[[Batch], Tensor]


def perplexity(logits_of: LogitsOf, blocks: np.ndarray, rank: int, world: int, device: torch.device) -> float:
    """exp of the mean negative log likelihood of each token given those before it in its block.

    blocks: [count, length] token ids.
    """

    def batch_of(rows: np.ndarray) -> tuple[Batch, Tensor]:
        ids = torch.from_numpy(blocks[rows].astype(np.int64)).to(device)
        return ids, ids

    losses = row_losses(logits_of, len(blocks), batch_of, rank, world, device)
    return exp_mean(losses, len(blocks) * (blocks.shape[1] - 1))


def exp_mean(losses: Tensor, tokens: int) -> float:
    """exp(sum of losses / tokens); infinite where that is no float any more (a mean above 709)."""
    try:
        return math.exp(losses.sum().item() / tokens)
    except OverflowError:
        return math.inf


@torch.no_grad()
def row_losses(
    logits_of: LogitsOf,
    count: int,
    batch_of: Callable[[np.ndarray], tuple[Batch, Tensor]],
    rank: int,
    world: int,
    device: torch.device,
) -> Tensor:
    """Summed negative log likelihood of each of `count` rows, float64 [count] on the CPU of every process.

    batch_of: row numbers [ROWS] -> (what the model is given, labels [ROWS, length]). Every process runs the same number
    of batches (the last ones repeat row 0), as ZeRO-3 needs, with the same rows whatever the number of processes; sums
    are taken over a table of rows, so their order is always the same.
    """
    losses = torch.zeros(count, dtype=torch.float64, device=device)
    for number in range(math.ceil(count / (ROWS * world))):
        start = (number * world + rank) * ROWS
        rows = np.arange(start, start + ROWS)
        real = rows < count
        batch, labels = batch_of(np.where(real, rows, 0))
        sums = token_losses(logits_of(batch), labels.to(device)).double().sum(dim=1)
        losses[start : start + int(real.sum())] = sums[: int(real.sum())]
    if world > 1:
        dist.all_reduce(losses)  # every entry has one owner, the rest are zeros: exact
    return losses.cpu()
