"""The order of the test files: those that take minutes come first, so that two workers end at about the same time."""

from __future__ import annotations

from typing import Any

SLOW = (
    "test_sharded", "test_layerwise", "test_launch", "test_layerwise_zero3", "test_checkpoint", "test_huggingface",
    "test_deepspeed", "test_lora_fa_sharded", "test_hosts", "test_evidence", "test_neutral", "test_low_bit",
    "test_fsdp1", "test_fsdp2", "test_replicas", "test_deepspeed_checkpoint", "test_resume", "test_mixed_model",
    "test_bench", "test_bf16_weights", "test_docs", "test_finetune", "test_huggingface_layerwise", "test_doctor",
    "test_plan", "test_int8_weights",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Sort by file; a file's own order stays."""
    place = {name: number for number, name in enumerate(SLOW)}
    items.sort(key=lambda item: place.get(item.path.stem, len(SLOW)))
