"""Checkpoints that any engine and any number of ranks can load: `save_checkpoint`, `load_checkpoint`."""

from lowrank_ds.checkpoint.agree import CheckpointError
from lowrank_ds.checkpoint.load import load_checkpoint
from lowrank_ds.checkpoint.records import records
from lowrank_ds.checkpoint.save import save_checkpoint

__all__ = ["CheckpointError", "load_checkpoint", "records", "save_checkpoint"]
