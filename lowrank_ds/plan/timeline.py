"""One step of a LLaMA on one rank, event by event: what the forward keeps, what the backward makes and frees.

The order is autograd's: the latest operation first. Only what is larger than a row of numbers is followed.
"""

from __future__ import annotations

from lowrank_ds.plan.activations import Sizes
from lowrank_ds.plan.engine import ROOT, Engine
from lowrank_ds.plan.ledger import Ledger

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


class Step:
    """Drives an engine and a ledger through forward, backward and update."""

    def __init__(self, engine: Engine, ledger: Ledger) -> None:
        self.engine, self.ledger, self.settings = engine, ledger, engine.settings
        self.sizes = Sizes(self.settings)
        self.layers = [f"model.layers.{i}" for i in range(self.settings.config["num_hidden_layers"])]
        self.tied = HEAD not in self.settings.shapes
        self.head = EMBED if self.tied else HEAD

    def run(self) -> None:
        """The whole step; the engine has started."""
        self.forward()
        self.backward()
        self.ledger.begin("step", "in the step")
        self.engine.step()

    def _add(self, size: int) -> None:
        self.ledger.add("activations", size)

    # -- forward ----------------------------------------------------------------------------------------------------
    def forward(self) -> None:
        """Layers, head and loss."""
        self.ledger.begin("forward", "in the forward")
        sizes, engine = self.sizes, self.engine
        engine.open(ROOT, False)
        self._add(sizes.tables)
        self._use(EMBED, sizes.hidden)
        for layer in self.layers:
            engine.open(layer, False)
            self._layer_forward(layer)
            engine.close(layer, False)
        self._use(NORM, sizes.norm + sizes.hidden)
        if sizes.narrow:
            self._add(-sizes.hidden)
        self.ledger.doing = "at the end of the forward (the loss)"
        self._use(self.head, sizes.logits)
        if sizes.narrow:
            self._add(sizes.probabilities)
        self._add(sizes.probabilities)
        self._add(-sizes.logits - (sizes.probabilities if sizes.narrow else 0))
        engine.forward_done()

    def _use(self, name: str, kept: int) -> None:
        self.engine.need(name)
        self._add(kept)
        self.engine.release(name)

    def _layer_forward(self, layer: str) -> None:
        """Without checkpointing everything is kept; with it, only the input: what came and went is smaller than in the
        backward."""
        sizes = self.sizes
        self._recompute(layer)
        if self.settings.checkpointing:
            self._add(sizes.hidden - sizes.layer)
        else:
            self._add(sizes.hidden - (sizes.hidden if sizes.narrow else 0))

    def _recompute(self, layer: str) -> None:
        sizes, between = self.sizes, 0 if self.sizes.narrow else self.sizes.hidden
        for name, kept in (
            ("input_layernorm", sizes.norm + sizes.hidden), ("self_attn.q_proj", sizes.queries),
            ("self_attn.k_proj", sizes.keys), ("self_attn.v_proj", sizes.keys),
            ("self_attn.o_proj", sizes.queries + sizes.sums + between),
            ("post_attention_layernorm", sizes.norm + sizes.hidden),
            ("mlp.gate_proj", 2 * sizes.inner), ("mlp.up_proj", 2 * sizes.inner), ("mlp.down_proj", 0),
        ):  # fmt: skip
            self._use(f"{layer}.{name}.weight", kept)

    # -- backward ---------------------------------------------------------------------------------------------------
    def backward(self) -> None:
        """From the loss to the embedding."""
        sizes, engine = self.sizes, self.engine
        self.ledger.begin("backward", "at the start of the backward (the loss)")
        engine.open(ROOT, True)
        self._add(2 * sizes.probabilities)
        self._add(-2 * sizes.probabilities)
        if sizes.narrow:
            self._add(sizes.logits)
            self._add(-sizes.probabilities)
        self._linear(self.head, sizes.hidden, sizes.logits)
        self._add(-sizes.hidden)  # its input
        self._norm_backward(NORM)
        if not sizes.narrow:
            self._add(-sizes.hidden)  # the norm's input
        for number, layer in reversed(list(enumerate(self.layers))):
            self.ledger.doing = f"in the backward of layer {number}"
            engine.open(layer, True)
            self._layer_backward(layer)
            self.ledger.doing = f"when layer {number}'s gradients are reduced"
            engine.close(layer, True)
            self._add(-sizes.stream)
        self.ledger.doing = "at the end of the backward"
        engine.need(EMBED)
        if self.tied:  # two whole gradients, then their sum
            self.ledger.touch("gradients", engine.bytes_of([EMBED]))
            self.ledger.drop("gradients", engine.bytes_of([EMBED]))
        engine.gradient(EMBED)
        engine.release(EMBED)
        self._add(-sizes.hidden)
        self._add(-sizes.tables)
        engine.backward_done()

    def _linear(self, name: str, made: int, freed: int) -> None:
        """Gradients of a linear layer's input and weight; then `freed` goes."""
        self.engine.need(name)
        self._add(made)
        if name == EMBED:  # the tied head's part of its gradient waits in autograd for the embedding's
            self.ledger.add("gradients", self.engine.bytes_of([name]))
        else:
            self.engine.gradient(name)
        self._add(-freed)
        self.engine.release(name)

    def _norm_backward(self, name: str) -> None:
        """The gradient of the output becomes that of the input; some fp32 copies come and go."""
        self.engine.need(name)
        self.ledger.touch("activations", 5 * self.sizes.exact)
        self.engine.gradient(name)
        self._add(-self.sizes.norm)
        self.engine.release(name)

    def _layer_backward(self, layer: str) -> None:
        """The gradient of the output (eTh) is alive before, that of the input after."""
        if self.settings.checkpointing:
            self._recompute(layer)
        self._mlp_backward(f"{layer}.mlp")
        self._norm_backward(f"{layer}.post_attention_layernorm.weight")
        self._add(-self.sizes.hidden - (0 if self.sizes.narrow else self.sizes.hidden))  # its input's gradient joins
        self._attention_backward(f"{layer}.self_attn")
        self._norm_backward(f"{layer}.input_layernorm.weight")
        self._add(-self.sizes.hidden)

    def _mlp_backward(self, mlp: str) -> None:
        sizes = self.sizes
        inner, hidden = sizes.inner, sizes.hidden
        self._linear(f"{mlp}.down_proj.weight", inner, inner)
        self._add(2 * inner)  # gradients of SiLU's output and of up's, while both and their product's gradient live
        self._add(-3 * inner)
        self._linear(f"{mlp}.up_proj.weight", hidden, inner)
        self._add(inner)
        self._add(-2 * inner)
        self._linear(f"{mlp}.gate_proj.weight", hidden, inner)
        self._add(-2 * hidden)  # the two gradients are one; the input of both

    def _attention_backward(self, attention: str) -> None:
        sizes = self.sizes
        queries, keys, hidden = sizes.queries, sizes.keys, sizes.hidden
        self._linear(f"{attention}.o_proj.weight", queries, 0)
        self._add(queries + 2 * keys)
        self._add(-sizes.attention - queries)
        self.ledger.touch("activations", 3 * queries)
        self._linear(f"{attention}.v_proj.weight", hidden, keys)
        self._linear(f"{attention}.k_proj.weight", hidden, keys + hidden)
        self._linear(f"{attention}.q_proj.weight", hidden, queries + hidden)
        self._add(-hidden)  # their input
