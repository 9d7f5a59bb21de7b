"""Imported once by the server that test processes are forked from: whatever takes long to import, no threads."""

import deepspeed  # noqa: F401
import peft  # noqa: F401
from transformers import LlamaForCausalLM, Trainer  # noqa: F401

import lowrank_ds  # noqa: F401
