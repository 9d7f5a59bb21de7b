"""Programs around lowrank_ds: data, models, training, evaluation. The package itself needs none of it."""

import os

import torch

if not torch.cuda.is_available():
    # Has to be known before deepspeed is imported: it would guess, with a warning on every process.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
