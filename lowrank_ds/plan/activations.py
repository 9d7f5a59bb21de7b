"""What autograd keeps of a LLaMA, and what comes and goes in its backward: formulas.

Read off transformers 5.23 (models/llama/modeling_llama.py, loss/loss_utils.py, integrations/sdpa_attention.py) and the
backward formulas of torch 2.13 (derivatives.yaml). With T = micro-batch x sequence tokens, h hidden, i intermediate,
q and k the widths of queries and keys, V the vocabulary, e bytes of an activation (bf16 2, fp32 4), a layer keeps

    each of two RMSNorms    4Th input in fp32, 4T its scale, eTh normalised, eTh output (what the linear layers keep)
                            (in fp32 the input is the residual stream itself, in bf16 a copy of it)
    attention (sdpa)        eT (2q + 2k) queries, keys, values, output; 4T heads, log-sum-exp
    MLP                     4eTi gate, SiLU of it, up, their product

and with activation checkpointing its input only, eTh. The loss keeps the log-probabilities, 4TV; around it live the
logits (eTV), their fp32 copy (4TV, bf16 only) and, in the backward, two gradients more: 12TV at worst.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lowrank_ds.plan.settings import Settings


@dataclass(frozen=True)
class Sizes:
    """Bytes of the activations of one rank's micro-batch."""

    settings: Settings

    @property
    def tokens(self) -> int:
        """T."""
        return self.settings.seq * self.settings.micro_batch

    def _bytes(self, width: int) -> int:
        return self.tokens * width * self.settings.itemsize

    @property
    def narrow(self) -> bool:
        """Whether activations are narrower than fp32, so that norms and the loss work on copies."""
        return self.settings.itemsize < 4

    @cached_property
    def hidden(self) -> int:
        """eTh: the residual stream."""
        return self._bytes(self.settings.config["hidden_size"])

    @cached_property
    def exact(self) -> int:
        """4Th: the same in fp32."""
        return 4 * self.tokens * self.settings.config["hidden_size"]

    @cached_property
    def inner(self) -> int:
        """eTi."""
        return self._bytes(self.settings.config["intermediate_size"])

    @cached_property
    def queries(self) -> int:
        """eTq."""
        return self._bytes(self.settings.shapes["model.layers.0.self_attn.q_proj.weight"][0])

    @cached_property
    def keys(self) -> int:
        """eTk; values are as many."""
        return self._bytes(self.settings.shapes["model.layers.0.self_attn.k_proj.weight"][0])

    @cached_property
    def sums(self) -> int:
        """4T heads: sdpa's log-sum-exp."""
        return 4 * self.tokens * self.settings.config["num_attention_heads"]

    @cached_property
    def norm(self) -> int:
        """What an RMSNorm keeps beside its output and, in fp32, its input."""
        return (self.exact if self.narrow else 0) + 4 * self.tokens + self.hidden

    @cached_property
    def stream(self) -> int:
        """What a layer's input costs: in bf16 nothing keeps it but a checkpoint."""
        return 0 if self.narrow and not self.settings.checkpointing else self.hidden

    @cached_property
    def attention(self) -> int:
        """Queries, keys, values, output and the log-sum-exp."""
        return 2 * self.queries + 2 * self.keys + self.sums

    @cached_property
    def layer(self) -> int:
        """What a layer keeps beside its input, without checkpointing; in fp32 also the stream between its halves."""
        return 2 * (self.norm + self.hidden) + self.attention + 4 * self.inner + (0 if self.narrow else self.hidden)

    @cached_property
    def logits(self) -> int:
        """eTV."""
        return self._bytes(self.settings.config["vocab_size"])

    @cached_property
    def probabilities(self) -> int:
        """4TV."""
        return 4 * self.tokens * self.settings.config["vocab_size"]

    @cached_property
    def tables(self) -> int:
        """Tokens, labels and positions (64 bits each), and the rotary cosines and sines."""
        config = self.settings.config
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return 8 * 3 * self.tokens + 8 * self.settings.seq + 2 * self.settings.seq * width * self.settings.itemsize
