"""A recipe: one choice on each axis. Algorithms are declarations of recipes (`algorithms.py`)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from lowrank_ds.residual import Drop, ScaleGradient, ScaleResidual
from lowrank_ds.rules import SGD, Adafactor, Adam
from lowrank_ds.subspace import Subspace


@dataclass(frozen=True)
class Momentum:
    """Flora: what lives in the subspace is the momentum of an already preconditioned update, M <- b1 M + (1-b1) R.

    kappa steps apart the momentum is carried to a new basis, M <- M (B_old^T B_new).
    """

    beta1: float = 0.9


@dataclass(frozen=True)
class Correction:
    """LoRA-FA: the rule works on G C, C = (A A^T)^-1 / s^2 (r x r), which is state and changes only with A or s.

    replicated: every rank that holds entries of the matrix keeps all of C (else a part, gathered at each step).
    """

    replicated: bool = False


@dataclass(frozen=True)
class Accumulation:
    """Micro-batches are summed in a subspace (`accumulate.py`): the recipe's own, or a random one of this rank.

    rank: None sums exactly, in the recipe's own subspace; a number sums a sketch in a fresh random subspace each step.
    """

    rank: int | None = None


@dataclass(frozen=True)
class Storage:
    """How state is kept between steps (`lowbit.py`); the mathematics always sees fp32.

    Args:
        moments: "fp32" or "8bit": exp_avg and exp_avg_sq, of plain parameters too.
        projector: "fp32", "8bit" or "4bit".
        smallest: matrices with fewer entries (all ranks' together) stay fp32.
    """

    moments: str = "fp32"
    projector: str = "fp32"
    smallest: int = 4096

    @property
    def exact(self) -> bool:
        """Whether everything is kept as it is."""
        return self.moments == "fp32" and self.projector == "fp32"


@dataclass(frozen=True)
class Recipe:
    """How the projected matrices of a parameter group are trained, and the parameters beside them.

    Args:
        rule: turns coordinates (or the entries of a plain parameter) into a direction.
        subspace: where the basis comes from; None when nothing is projected.
        residual: what happens to the rest of the gradient.
        momentum: set for Flora: the rule acts on the whole matrix, its momentum is what is compressed.
        correction: set for LoRA-FA: what counts as projected is not, its gradient is multiplied from the right.
        decay_last: weight decay multiplies the updated weight, W <- (1 - lr wd) (W - lr U), as in peft's LoRA-FA.
        accumulation: how micro-batches are summed; None: as whole gradients, by the engine.
        storage: how state is kept between steps.
    """

    rule: Adam | Adafactor | SGD
    subspace: Subspace | None = None
    residual: Drop | ScaleResidual | ScaleGradient = Drop()
    _: KW_ONLY  # a field more must not change what another means
    momentum: Momentum | None = None
    correction: Correction | None = None
    decay_last: bool = False
    accumulation: Accumulation | None = None
    storage: Storage = Storage()
