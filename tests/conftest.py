"""The order of the test files: those that take minutes come first, so that two workers end at about the same time."""

from __future__ import annotations

from typing import Any

SLOW = (
    "test_sharded", "test_layerwise", "test_launch", "test_layerwise_zero3", "test_lora_fa_sharded",
    "test_huggingface_layerwise", "test_hosts", "test_deepspeed", "test_huggingface", "test_fsdp2", "test_neutral",
    "test_checkpoint", "test_deepspeed_checkpoint", "test_resume", "test_low_bit", "test_int8_weights",
    "test_bf16_weights",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Sort by file; a file's own order stays."""
    place = {name: number for number, name in enumerate(SLOW)}
    items.sort(key=lambda item: place.get(item.path.stem, len(SLOW)))
