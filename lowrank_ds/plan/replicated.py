"""DistributedDataParallel: every rank holds everything; gradients are averaged in buckets."""

from __future__ import annotations

from lowrank_ds.plan.engine import Engine

FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes, torch's defaults (torch/nn/parallel/distributed.py)


class Replicated(Engine):
    """DDP with its defaults: buckets beside the gradients (gradient_as_bucket_view=False), kept between steps."""

    def start(self) -> None:
        """Weights, and buckets unless this is the only rank."""
        self.ledger.add("weights", self.bytes_of(self.numel))
        self.ledger.add("buffers", self.bytes_of(self.numel) if self.settings.world > 1 else 0)

    def gradient(self, name: str) -> None:
        """Kept, and copied into its bucket."""
        self.ledger.add("gradients", self.bytes_of([name]))

    def backward_done(self) -> None:
        """Buckets are filled in the order in which gradients arrive, about the reverse of the parameters'."""
        limit, size = FIRST_BUCKET, 0
        if self.settings.world == 1:
            return
        for name in reversed(self.numel):
            size += self.bytes_of([name])
            if size >= limit:
                self.traffic.add("all-reduce", size)
                limit, size = BUCKET, 0
        self.traffic.add("all-reduce", size)

    def step(self) -> None:
        """Update; gradients are set to None."""
        self.update()
        self.ledger.drop("gradients", self.bytes_of(self.numel))
