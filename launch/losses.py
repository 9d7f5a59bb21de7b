"""Losses of a micro-batch: of plain token ids, or of instructions, in which only some tokens count.

A batch of instructions is a dict: `input_ids` and `labels` [rows, length] (-100: does not count), either
`attention_mask` (padded rows) or `position_ids` (rows packed from several examples), and `items` (0-d), what the sum of
its losses is divided by: the same for every micro-batch of a step, so that each trained token weighs the same however
the step is dealt to processes and micro-batches.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100  # label of a token that does not count
Batch = Tensor | dict[str, Tensor]


def model_inputs(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """What the model is called with, on the device; batch: ids [rows, length] or a dict of these."""
    given = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    inputs = {k: v.to(device, non_blocking=True) for k, v in given.items() if k not in ("labels", "items")}
    # With a cache transformers does not look at where positions begin again: packed examples would see each other.
    return inputs | {"use_cache": False} if "position_ids" in inputs else inputs


def forward_loss(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """0-d loss: the mean over all tokens of plain ids; sum over tokens that count / `items` of instructions."""
    inputs = model_inputs(batch, device)
    if isinstance(batch, Tensor):
        return model(**inputs, labels=inputs["input_ids"]).loss
    losses = token_losses(model(**inputs).logits, batch["labels"].to(device))
    return losses.sum() / batch["items"].to(device)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log likelihood of each token but the first, 0 where it does not count, [rows, length - 1].

    logits: [rows, length, vocabulary]; labels: [rows, length].
    """
    return F.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none", ignore_index=IGNORED
    )


@torch.no_grad()
def leak(logits_of: Callable[[Batch], Tensor]) -> float:
    """How much of a packed example's logits comes from the example before it, in their standard deviations.

    0 to rounding where the model looks at where positions begin again. Bloom, Falcon, Mamba, MPT and OPT do not
    (transformers 5.23).
    logits_of: the model in evaluation mode, such as `Trainer.logits`.
    """
    size = 8
    first, second, same = (torch.arange(size) + start for start in (3, 3 + size, 3 + 2 * size))
    ids = torch.stack([torch.cat([first, same]), torch.cat([second, same])])
    logits = logits_of({"input_ids": ids, "position_ids": torch.arange(size).repeat(2, 2)})[:, size:].float()
    return ((logits[0] - logits[1]).abs().max() / logits.std()).item()
