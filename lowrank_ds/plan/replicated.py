"""DistributedDataParallel: every rank holds everything; gradients are averaged in buckets."""

from __future__ import annotations

from typing import Any

from lowrank_ds.plan.engine import Engine, Waiting

FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes, torch's defaults (torch/nn/parallel/distributed.py)


class Replicated(Engine):
    """DDP with its defaults: buckets beside the gradients (gradient_as_bucket_view=False), kept between steps.

    One rank is the plain model: no buckets, and layer-wise updates are possible.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.waiting = Waiting(self, lambda names: self.ledger.drop("gradients", self.bytes_of(names)))

    def start(self) -> None:
        """Weights, and buckets unless this is the only rank."""
        self.ledger.add("weights", self.bytes_of(self.numel))
        self.ledger.add("buffers", self.bytes_of(self.numel) if self.settings.world > 1 else 0)

    def gradient(self, name: str) -> None:
        """Kept, and copied into its bucket; of a single rank, layer-wise, used soon."""
        self.ledger.add("gradients", self.bytes_of([name]))
        if self.settings.layerwise:
            self.waiting.arrived(name)

    def backward_done(self) -> None:
        """Buckets are filled in the order in which gradients arrive, about the reverse of the parameters'."""
        self.waiting.flush()
        if self.settings.world == 1:
            return
        limit, size = FIRST_BUCKET, 0
        for name in reversed(self.numel):
            size += self.bytes_of([name])
            if size >= limit:
                self.traffic.add("all-reduce", size)
                limit, size = BUCKET, 0
        self.traffic.add("all-reduce", size)

    def step(self) -> None:
        """Update; gradients are set to None."""
        if self.settings.layerwise:
            return
        self.update()
        self.ledger.drop("gradients", self.bytes_of(self.numel))
