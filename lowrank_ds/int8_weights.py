"""`int8_weights`: linear layers whose weights are int8 codes, as Q-GaLore trains them (arXiv:2407.08296)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lowrank_ds import engines
from lowrank_ds import params as selection
from lowrank_ds.groups import logger
from lowrank_ds.int8_tensor import Int8Weight


def int8_weights(
    model: nn.Module,
    target_modules: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    block: int = 256,
) -> list[str]:
    """Keep the weights of linear layers as int8 codes with fp32 scales; no float copy of them stays.

    Call it before `fully_shard` and before the optimizer is built. Forward and backward compute in the activations'
    dtype with the dequantised weight of one layer at a time; gradients keep the dtype the weight had. Every optimizer
    of this package then updates the codes, a piece of a matrix at a time in fp32, and rounds stochastically.

    Args:
        model: any module; the weights of its `nn.Linear` layers are replaced by `Int8Weight` parameters.
        target_modules: substrings or regular expressions, searched in the weights' names; None: every linear layer but
            the output head and embeddings.
        exclude: patterns that win over targets.
        block: entries of a row that share a scale, >= 1; memory per weight is 1 + 4 / block bytes.

    Returns:
        The names of the weights that are int8 now.

    Raises:
        ValueError: a pattern matches no linear layer, nothing is left, or `block` is out of range.
        RuntimeError: a weight that cannot be int8, naming it: shared by two modules, not a whole plain tensor (an
            engine has taken over the model), a single row, or int8 already.
    """
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(f"int8_weights: block must be a whole number >= 1, got {block!r}.")
    layers = {
        f"{path}.weight" if path else "weight": m for path, m in model.named_modules() if isinstance(m, nn.Linear)
    }
    if not layers:
        raise ValueError(f"int8_weights: {type(model).__name__} has no nn.Linear layer.")
    found = [(selection.canonical(name), layer.weight) for name, layer in layers.items()]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    heads = [name for name, weight in found if head is not None and weight is getattr(head, "weight", None)]
    try:
        chosen = set(selection.select(found, target_modules, exclude, heads))
    except ValueError as error:
        raise ValueError(f"int8_weights, linear layers: {error}") from None
    users = _users(model)
    work = [(selection.canonical(n), layer) for n, layer in layers.items() if selection.canonical(n) in chosen]
    for name, layer in work:
        _check(name, layer.weight, users)
    for name, layer in work:
        weight = layer.weight
        quantized = Int8Weight.quantize(weight, block, name)
        layer.weight = nn.Parameter(quantized, requires_grad=weight.requires_grad)
    logger.info("int8_weights: %d weights, such as %s", len(work), work[0][0])
    return [name for name, _ in work]


def _users(model: nn.Module) -> dict[int, list[str]]:
    """{id of a parameter: all names it has}."""
    users: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(p), []).append(name)
    return users


def _check(name: str, weight: Tensor, users: dict[int, list[str]]) -> None:
    shared = users.get(id(weight), [name])
    if isinstance(weight, Int8Weight):
        raise RuntimeError(f"int8_weights: {name} is int8 already.")
    if len(shared) > 1:
        raise RuntimeError(
            f"int8_weights: {name} is one tensor under the names {', '.join(shared)}. Leave it out with exclude=[...], "
            "or untie the weights first."
        )
    plain = weight.dim() == 2 and not engines.is_dtensor(weight) and not hasattr(weight, "ds_id")
    if not plain or hasattr(weight, "_fsdp_flattened"):
        raise RuntimeError(
            f"int8_weights: {name} is no longer a whole, plain matrix: an engine has taken over the model. Call "
            "int8_weights(model) first, then fully_shard or replicate()."
        )
    if weight.shape[0] == 1:
        raise RuntimeError(f"int8_weights: {name} has a single row and gains nothing. Leave it out with exclude=[...].")
    if not weight.is_floating_point() or weight.is_meta:
        what = "on the meta device: give it numbers first" if weight.is_meta else f"{weight.dtype}: only floats can be"
        raise RuntimeError(f"int8_weights: {name} is {what}.")
