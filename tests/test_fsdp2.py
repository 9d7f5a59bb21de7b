"""FSDP2 features around the step: every mode against one process, placements, collectives, memory, traces."""

from __future__ import annotations

import functools
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lowrank_ds
from lowrank_ds import collectives
from tests import training
from tests.cluster import batches, launch, share, tiny_llama
from tests.counting import COUNTED, Counting, at_most

LIMIT = 1e-5
STEPS = 6  # refreshes at 0 and 4


# --- modes: the same training loop under FSDP2 and on one process, with one thing changed -----------------------------
def loop(model: Any, optimizer: Any, rank: int = 0, world: int = 1, pieces: int = 1, clip: float = 0.0, schedule=None):
    """Train on this rank's share of the global batches, in `pieces` micro-batches."""
    for batch in batches(STEPS):
        parts = share(batch, rank, world).chunk(pieces)
        for number, part in enumerate(parts, 1):
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(number == pieces)
            (model(input_ids=part, labels=part).loss / pieces).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    return training.weights_of(model)


def special_model(kind: str = "") -> nn.Module:
    """The tiny LLaMA: "frozen" matrix, "unused" layer, "tied" embedding, recomputed activations ("checkpointed")."""
    model = tiny_llama(tie_word_embeddings=kind == "tied")
    if kind == "frozen":
        model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    if kind == "unused":
        model.unused = nn.Linear(20, 16)
    if kind == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    return model


def columns(p: nn.Parameter) -> Any:
    """shard_placement_fn: matrices by columns."""
    from torch.distributed.tensor import Shard

    return Shard(1) if p.dim() == 2 else Shard(0)


def wide_by_columns(p: nn.Parameter) -> Any:
    """shard_placement_fn: wide matrices by columns, the others by rows (then "std" needs no reduction)."""
    from torch.distributed.tensor import Shard

    return Shard(1) if p.dim() == 2 and p.shape[1] > p.shape[0] else Shard(0)


def offload() -> Any:
    """Parameters, gradients and state on the CPU."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    return CPUOffloadPolicy(pin_memory=False)


def cosine(optimizer: Any) -> Any:
    """A learning-rate schedule."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def poisoned(model: Any, optimizer: Any, when: int = 3) -> None:
    """One entry of a gradient becomes NaN just before step `when`, on the rank that holds it."""
    name, (row, column), calls = "model.layers.1.mlp.up_proj.weight", (30, 3), [0]
    weight = dict(model.named_parameters())[name]

    def hook(*_: Any) -> None:
        if calls[0] == when:
            grad, first = weight.grad, 0
            if hasattr(grad, "to_local"):
                from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as offset

                first = offset(grad.shape, grad.device_mesh, grad.placements)[1][0]
                grad = grad.to_local()
            if first <= row < first + grad.shape[0]:
                grad[row - first, column] = float("nan")
        calls[0] += 1

    optimizer.register_step_pre_hook(hook)


# {mode: (recipe, model kind, fully_shard options, loop options, what else is done to (model, optimizer))}
Mode = tuple[str, str, Callable[[], dict], dict, Callable | None]
NOTHING: Callable[[], dict] = dict
MODES: dict[str, Mode] = {
    "columns: galore": ("galore", "", lambda: {"shard_placement_fn": columns}, {}, None),
    "columns: galore left": ("galore left", "", lambda: {"shard_placement_fn": columns}, {}, None),
    "columns: galore full": ("galore full", "", lambda: {"shard_placement_fn": columns}, {}, None),
    "columns: power rotate": ("galore power rotate", "", lambda: {"shard_placement_fn": columns}, {}, None),
    "columns: adafactor": ("galore adafactor", "", lambda: {"shard_placement_fn": columns}, {}, None),
    "columns: fira": ("fira", "", lambda: {"shard_placement_fn": columns}, {}, None),
    "columns: apollo": ("apollo", "", lambda: {"shard_placement_fn": columns}, {}, None),
    "columns: flora": ("flora", "", lambda: {"shard_placement_fn": columns}, {}, None),
    "wide by columns": ("fira", "", lambda: {"shard_placement_fn": wide_by_columns}, {}, None),
    "no reshard": ("fira", "", lambda: {"reshard_after_forward": False}, {}, None),
    "offload": ("fira", "", lambda: {"offload_policy": offload()}, {}, None),
    "accumulation": ("fira", "", NOTHING, {"pieces": 3}, None),
    "clipping": ("fira", "", NOTHING, {"clip": 0.05}, None),
    "schedule": ("fira", "", NOTHING, {"schedule": cosine}, None),
    "activation checkpointing": ("fira", "checkpointed", NOTHING, {}, None),
    "frozen": ("fira", "frozen", NOTHING, {}, None),
    "unused": ("fira", "unused", NOTHING, {}, None),
    "tied": ("fira", "tied", NOTHING, {}, None),
    "NaN": ("fira", "", NOTHING, {}, poisoned),
    "NaN at a refresh": ("galore", "", NOTHING, {}, functools.partial(poisoned, when=4)),
    "replicated projectors": ("galore power rotate", "", NOTHING, {}, None),
}
MORE = {"replicated projectors": {"projector_storage": "replicated"}}


def run_mode(mode: str, model: Any, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Weights after training `model` in a mode."""
    recipe, _, _, settings, prepare = MODES[mode]
    optimizer = training.build(recipe, model, **MORE.get(mode, {}))
    if prepare is not None:
        prepare(model, optimizer)
    schedule = settings.get("schedule")
    return loop(model, optimizer, rank, world, **settings | ({"schedule": schedule(optimizer)} if schedule else {}))


def run_modes(rank: int, world: int) -> dict[str, dict[str, torch.Tensor]]:
    """All modes in one pair of processes."""
    found = {}
    for mode, (_, kind, options, _, _) in MODES.items():
        model = training.fully_sharded("fsdp2", world, special_model(kind), **options())
        found[mode] = run_mode(mode, model, rank, world)
    return found if rank == 0 else {}


@functools.cache
def mode_results() -> dict[str, dict[str, torch.Tensor]]:
    """{mode: weights} from two ranks."""
    return launch(2, run_modes)[0]


@pytest.mark.parametrize("mode", list(MODES))
def test_equal_to_one_process(mode: str) -> None:
    """Weights after 6 steps, two refreshes, are within fp32 rounding of one process."""
    torch.set_num_threads(1)
    expected = run_mode(mode, special_model(MODES[mode][1]), 0, 1)
    difference = training.largest_difference(mode_results()[mode], expected)
    assert difference <= LIMIT, f"{difference:.1e}"
    assert training.largest_difference(expected, training.weights_of(special_model(MODES[mode][1]))) > 5e-3


# --- low precision ---------------------------------------------------------------------------------------------------
def low_precision(rank: int, world: int) -> dict[str, Any]:
    """{mode: (weights, state dtypes, matrices projected)} with bf16 compute, and with bf16 parameters."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy, found = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32), {}
    for mode, model in (("bf16 compute", tiny_llama()), ("bf16 parameters", tiny_llama().bfloat16())):
        options = {"mp_policy": policy} if mode == "bf16 compute" else {}
        model = training.fully_sharded("fsdp2", world, model, **options)
        optimizer = training.build("fira", model)
        weights = loop(model, optimizer, rank, world)
        slots = [s for slots in optimizer._slots.values() for s in slots]
        dtypes = {t.dtype for state in optimizer.state.values() for t in state.values()}
        found[mode] = weights, dtypes, sum(s.projected for s in slots), {p.dtype for p in model.parameters()}
    return found


@functools.cache
def low_precision_results() -> dict[str, Any]:
    """From two ranks."""
    return launch(2, low_precision)[0]


@pytest.mark.parametrize("mode", ["bf16 compute", "bf16 parameters"])
def test_bf16_follows_fp32_and_keeps_fp32_state(mode: str) -> None:
    """Projected, state in fp32 whatever the parameters are, and near the fp32 run."""
    torch.set_num_threads(1)
    weights, state, projected, params = low_precision_results()[mode]
    assert state == {torch.float32} and projected == 14
    assert params == {torch.bfloat16 if mode == "bf16 parameters" else torch.float32}
    model = tiny_llama()
    start, exact = training.weights_of(model), loop(model, training.build("fira", model))
    moved = sum((exact[n] - start[n]).square().sum() for n in exact).sqrt()
    apart = sum((exact[n] - weights[n]).square().sum() for n in exact).sqrt()
    assert apart < 0.25 * moved


def rounded(rank: int, world: int, kind: str) -> dict[str, torch.Tensor]:
    """bf16 weights after 4 steps on gradients that are the same however the model is sharded."""
    model = tiny_llama().bfloat16()
    placement = {"shard_placement_fn": columns} if kind == "columns" else {}
    if kind != "one":
        model = training.fully_sharded("fsdp2" if kind == "columns" else kind, world, model, **placement)
    optimizer = training.build("galore right", model, lr=1e-3)
    for step in range(4):
        for i, p in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * step + i)
            p.grad = _distributed(torch.randn(p.shape, generator=generator).bfloat16(), p)
        optimizer.step()
    return training.weights_of(model)


def _distributed(whole: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    if not hasattr(p, "placements"):
        return whole
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, first = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    part = whole[tuple(slice(f, f + s) for f, s in zip(first, shape, strict=True))].contiguous()
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=whole.stride())


@pytest.mark.parametrize(("kind", "world"), [("fsdp2", 3), ("columns", 2), ("fsdp2 tp", 4)])
def test_stochastic_rounding_does_not_see_the_sharding(kind: str, world: int) -> None:
    """bf16 weights: the noise belongs to an entry's place in the matrix, on row shards, column shards and tiles."""
    torch.set_num_threads(1)
    expected, found = rounded(0, 1, "one"), launch(world, rounded, kind)[0]
    differing = sum((expected[n] != found[n]).sum().item() for n in expected)
    assert differing <= 0.001 * sum(w.numel() for w in expected.values())  # fp32 rounding decides a few draws
    assert training.largest_difference(expected, found) < 0.01


# --- collectives and memory ------------------------------------------------------------------------------------------
def count_collectives(rank: int, world: int, layers: int) -> dict[str, tuple[int, int, dict]]:
    """{recipe: (collectives, bytes, kinds) that our optimizer issues in one ordinary step}."""
    found = {}
    for recipe in COUNTED:
        model = training.fully_sharded("fsdp2", world, tiny_llama(num_hidden_layers=layers))
        optimizer = training.build(recipe, model)
        training.train_sharded(model, optimizer, "fsdp2", rank, world, range(2))
        counter = collectives.dist = Counting(torch.distributed)
        training.train_sharded(model, optimizer, "fsdp2", rank, world, range(2, 3))
        collectives.dist = torch.distributed
        found[recipe] = counter.calls, counter.bytes, dict(counter.kinds)
    return found


def test_collectives_per_step_do_not_grow_with_depth(capsys: pytest.CaptureFixture) -> None:
    """Small, the same for 2 and 6 layers; GaLore with right projection only gathers its bases."""
    shallow, deep = (launch(2, count_collectives, layers)[0] for layers in (2, 6))
    with capsys.disabled():
        print("\ncollectives a step adds (FSDP2 x 2; 2 layers -> 6 layers; bytes received per rank)")
        for recipe, (calls, size, kinds) in shallow.items():
            print(f"  {recipe:18s} {calls} -> {deep[recipe][0]}   {size} -> {deep[recipe][1]} bytes   {kinds}")
    for recipe, (calls, _, kinds) in shallow.items():
        assert calls == deep[recipe][0] <= at_most(recipe), recipe
        assert kinds == deep[recipe][2], recipe
    assert shallow["galore right"][2] == {"all_gather": 1}
    # all matrices ask for their sums in one round, also those that complete no lines before
    assert [shallow[recipe][2]["all_reduce"] for recipe in ("fira", "apollo", "galore adafactor")] == [1, 1, 2]


LARGER = {"hidden_size": 132, "intermediate_size": 356, "num_hidden_layers": 3, "num_key_value_heads": 3,
          "vocab_size": 509}  # fmt: skip
MEASURED = ("galore", "galore full", "fira", "apollo", "flora", "galore adafactor")


def state_sizes(optimizer: torch.optim.Optimizer, inside: str = "") -> int:
    """Bytes of state held here for parameters whose name contains `inside`."""
    group = optimizer.param_groups[0]
    named = zip(group["param_names"], group["params"], strict=True)
    parts = [t for name, p in named if inside in name for t in optimizer.state[p].values()]
    return sum(getattr(t, "to_local", lambda t=t: t)().nbytes for t in parts)


def measure_state(rank: int, world: int, kind: str) -> dict[str, tuple[int, int]]:
    """{recipe: bytes of state on this rank, (all, of the layers)}."""
    found = {}
    for recipe in MEASURED:
        optimizer = training.build(recipe, training.fully_sharded(kind, world, tiny_llama(**LARGER)), rank=32)
        optimizer.init_state()
        assert lowrank_ds.state_bytes(optimizer) == state_sizes(optimizer)
        found[recipe] = state_sizes(optimizer), state_sizes(optimizer, "_proj")
    return found


def test_state_summed_over_ranks_is_the_one_process_state(capsys: pytest.CaptureFixture) -> None:
    """At most 5 % more than one process, projectors included: 2 and 4 ranks; on tiles for what is tensor parallel."""
    alone = {}
    for recipe in MEASURED:
        optimizer = training.build(recipe, tiny_llama(**LARGER), rank=32)
        optimizer.init_state()
        alone[recipe] = state_sizes(optimizer), state_sizes(optimizer, "_proj")
    rows = []
    for world, kind, which in ((2, "fsdp2", 0), (4, "fsdp2", 0), (4, "fsdp2 tp", 1)):
        ranks = launch(world, measure_state, kind)
        for recipe in MEASURED:
            held = [r[recipe][which] for r in ranks]
            rows.append(
                (
                    world,
                    kind,
                    recipe,
                    max(held),
                    sum(held) / alone[recipe][which],
                    world * max(held) / alone[recipe][which],
                )
            )
    with capsys.disabled():
        print(
            "\noptimizer state: largest rank's bytes, sum over ranks / one process, largest rank x ranks / one process"
        )
        print(
            "\n".join(
                f"  {w} x {k:9s} {r:18s} {size:9d} {total:.4f} {worst:.4f}" for w, k, r, size, total, worst in rows
            )
        )
    assert all(ratio <= 1.05 for *_, ratio, _ in rows)


def fake_ranks(rank: int, world: int) -> dict[str, list[int]]:
    """{recipe: [bytes on a rank of many, bytes on one process]} at LLaMA-7B's dimensions."""
    command = [sys.executable, "-m", "tests.fake_ranks", str(rank), str(world)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("rank", [0, 63])
def test_state_per_rank_at_7b_dimensions_on_64_ranks(rank: int, capsys: pytest.CaptureFixture) -> None:
    """8 layers of LLaMA-7B, rank 128: a rank's state is a 64th of one process's, projectors included."""
    found = fake_ranks(rank, 64)
    with capsys.disabled():
        print(f"\nLLaMA-7B, 8 layers, r 128, rank {rank} of 64 (FSDP2): MiB of state, x 64 / one process")
        for recipe, (here, one) in found.items():
            print(f"  {recipe:18s} {here / 2**20:8.2f} MiB  {here * 64 / one:.4f}")
    assert all(here * 64 <= 1.05 * one for here, one in found.values())


def wrapped_too_late(rank: int, world: int) -> list[str]:
    """What is logged when fully_shard comes after the optimizer."""
    model, records = tiny_llama(), []
    optimizer = training.build("fira", model)
    training.fully_sharded("fsdp2", world, model)
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("lowrank_ds").addHandler(handler)
    training.train_sharded(model, optimizer, "fsdp2", rank, world, range(1))
    return records


def test_sharding_after_the_optimizer_was_built_is_said() -> None:
    """The optimizer holds parameters that no longer train: its first step says that nothing was updated."""
    assert any("nothing was updated" in message for message in launch(2, wrapped_too_late)[0])


def raw_dtensors(rank: int, world: int) -> dict[str, float]:
    """{placements: difference from plain tensors} for tensor parallelism alone; gradients that are unsummed parts."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh, found = init_device_mesh("cpu", (world,)), {}
    cases = {
        "rows": (Shard(0), Shard(0)),
        "columns": (Shard(1), Shard(1)),
        "unsummed": (Replicate(), Partial()),
        "resharded": (Shard(0), Shard(1)),
    }
    for name, (placement, given) in cases.items():
        torch.manual_seed(0)
        start, grads = torch.randn(10, 6), torch.randn(4, 10, 6)
        plain, sharded = nn.Parameter(start.clone()), nn.Parameter(distribute_tensor(start, mesh, [placement]))
        optimizers = [lowrank_ds.FiraAdamW([("w", p)], lr=1e-2, rank=3, update_proj_gap=2) for p in (plain, sharded)]
        for grad in grads:
            plain.grad = grad
            part = grad * (rank + 1) / 3 if given == Partial() else distribute_tensor(grad, mesh, [given]).to_local()
            sharded.grad = DTensor.from_local(part, mesh, [given])
            for optimizer in optimizers:
                optimizer.step()
        found[name] = (sharded.detach().full_tensor() - plain.detach()).abs().max().item()
    return found


def test_tensor_parallelism_alone_and_unsummed_gradients() -> None:
    """DTensors without FSDP; gradients with other placements than their weight (sequence parallel norms)."""
    for found in launch(2, raw_dtensors):
        assert set(found) == {"rows", "columns", "unsummed", "resharded"}
        assert all(difference <= 1e-6 for difference in found.values()), found


def hooked(rank: int, world: int, kind: str) -> dict[str, torch.Tensor]:
    """GaLore's own layer-wise recipe, one optimizer per parameter stepped by a hook, after `fully_shard`."""
    model = tiny_llama() if kind == "one" else training.fully_sharded(kind, world)
    plain_names = ("norm", "embed", "lm_head")
    for name, p in model.named_parameters():
        group = {"params": [(name, p)]} | ({} if any(x in name for x in plain_names) else {"rank": 8})
        optimizer = lowrank_ds.GaLoreAdamW([group], lr=1e-2, update_proj_gap=training.GAP, rank=None, subspace="svd")

        def update(weight: torch.Tensor, optimizer=optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(update)
    for batch in batches(STEPS):
        mine = share(batch, rank, world)
        model(input_ids=mine, labels=mine).loss.backward()
    return training.weights_of(model)


@pytest.mark.parametrize(("kind", "world"), [("fsdp2", 2), ("replicate", 2)])
def test_hooks_registered_after_sharding_equal_steps(kind: str, world: int) -> None:
    """FSDP2 and replicate() fire post-accumulate hooks with the reduced gradient; exact SVDs inside them too."""
    torch.set_num_threads(1)
    model = tiny_llama()
    expected = loop(model, training.build("galore", model))
    assert training.largest_difference(hooked(0, 1, "one"), expected) <= LIMIT
    assert training.largest_difference(launch(world, hooked, kind)[0], expected) <= LIMIT


def test_torchs_optimizer_in_backward_is_refused() -> None:
    """_apply_optimizer_in_backward builds one optimizer per bare tensor, which no hook of FSDP2 or DDP ever steps."""
    from torch.distributed.optim import _apply_optimizer_in_backward

    with pytest.raises(ValueError, match="parameter names are unknown"):
        _apply_optimizer_in_backward(lowrank_ds.GaLoreAdamW, tiny_llama().parameters(), {"lr": 1e-2, "rank": 8})


def small_buckets(rank: int, world: int) -> tuple[dict[str, dict[str, torch.Tensor]], int]:
    """({recipe: weights} with a few matrices to a bucket, collectives of the last recipe's last step)."""
    from lowrank_ds import optimizer as module

    module._BUCKET = 3000  # numbers; 14 matrices of up to 1872 entries
    found = {recipe: training.fsdp2(rank, world, recipe, steps=STEPS) for recipe in ("galore", "fira", "flora")}
    model = training.fully_sharded("fsdp2", world)
    optimizer = training.build("galore right", model)
    training.train_sharded(model, optimizer, "fsdp2", rank, world, range(2))
    counter = collectives.dist = Counting(torch.distributed)
    training.train_sharded(model, optimizer, "fsdp2", rank, world, range(2, 3))
    return found, counter.calls


def test_buckets_are_prefetched_in_the_same_order_everywhere() -> None:
    """Many buckets, each begun while the one before computes: the same weights."""
    torch.set_num_threads(1)
    for found, calls in launch(2, small_buckets):
        assert calls >= 3
        for recipe, weights in found.items():
            assert training.largest_difference(weights, training.one_process(recipe, STEPS)) <= LIMIT, recipe
