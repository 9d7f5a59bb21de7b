"""Every random number generator of a process: seeding, saving, restoring."""

import math
import random

import numpy as np
import torch


def seed_all(seed: int, step: int, rank: int) -> None:
    """Seed every generator (dropout is what uses them); other numbers for each process and place in the run."""
    number = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)  # CUDA's too


def random_state() -> dict[str, torch.Tensor]:
    """Every generator of this process: Python's and NumPy's as (int64, float64) pairs, torch's as bytes."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    if (version, kind) != (3, "MT19937"):
        raise RuntimeError(f"random's state has version {version} and NumPy's is {kind}; known are 3 and MT19937")
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([math.nan if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return {f"random.{name}": value for name, value in state.items()}


def restore_random_state(saved: dict[str, torch.Tensor]) -> None:
    """Inverse of `random_state`; CUDA's only where there is one on both sides."""
    state = {name.removeprefix("random."): value for name, value in saved.items() if name.startswith("random.")}
    gauss = state["python_gauss"].item()
    random.setstate((3, tuple(state["python"].tolist()), None if math.isnan(gauss) else gauss))
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, state["numpy_gauss"].item()))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
