"""Run a function on n gloo processes of this machine, and the tiny LLaMA that the distributed tests train."""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import pickle
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

TIMEOUT = 600  # seconds for one launch


def launch(world: int, function: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT) -> list[Any]:
    """[function(rank, world, *arguments) for each rank], each in a process of its own that has joined a gloo group.

    Raises AssertionError with the first failing rank's traceback; no process outlives the call.
    """
    context = _context()
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        processes = [
            context.Process(target=_worker, args=(rank, world, store, results, function, arguments), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(results, processes, world, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()


def _context() -> Any:
    """Processes are forked from a server that has imported the heavy packages once (each would take 5-8 s for it)."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    return context


def _collect(results: Any, processes: list, world: int, deadline: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < world:
        try:
            rank, value, error = results.get(timeout=1)
        except queue.Empty:
            dead = [i for i, p in enumerate(processes) if not p.is_alive() and i not in found]
            assert time.monotonic() < deadline, f"ranks {set(range(world)) - set(found)} did not answer in time"
            assert not dead or not results.empty(), f"rank {dead} died with exit code {processes[dead[0]].exitcode}"
            continue
        assert error is None, f"rank {rank} failed:\n{error}"
        found[rank] = pickle.loads(value)
    return [found[rank] for rank in range(world)]


def _worker(rank: int, world: int, store: str, results: Any, function: Callable, arguments: tuple) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_SIZE=str(world), DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0",
    )  # fmt: skip
    import torch
    import torch.distributed as dist

    faulthandler.enable()  # a rank that crashes says where
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", store, datetime.timedelta(seconds=120), world, rank)
        # pickled here: tensors sent through a queue live in files that end with their process
        results.put((rank, pickle.dumps(function(rank, world, *arguments)), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # a CheckpointException is one; whatever it is, the parent must hear of it
        results.put((rank, None, traceback.format_exc()))
        results.close()
        results.join_thread()
        os._exit(1)


def quiet_deepspeed() -> Any:
    """DeepSpeed without its JIT-compiled shared-memory op (which hangs on a stale lock) and without chatter."""
    import logging

    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo", dist_init_required=False)
    return deepspeed


def tiny_llama(seed: int = 0, **overrides: Any) -> Any:
    """A real LlamaForCausalLM, 2 layers, whose matrices do not divide by 2, 3 or 4 ranks (36, 52, 61 and 12 wide)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 61, "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 2,
        "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 32,
        "tie_word_embeddings": False, "attn_implementation": "eager", "use_cache": False,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(sizes | overrides)))


def batches(steps: int, size: int = 12, length: int = 16, vocabulary: int = 61) -> list[Any]:
    """`steps` global batches of tokens (size, length): the same for every world size."""
    import torch

    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocabulary, (size, length), generator=generator) for _ in range(steps)]


def share(batch: Any, rank: int, world: int) -> Any:
    """This rank's part of a global batch."""
    return batch.chunk(world)[rank]
