"""Oracle of a DSpark drafter's forward pass: one token, one head, one slot at a time, in fp64 (arXiv 2607.05147).

Takes the tensors of a DeepSpec checkpoint by name and its `config.json` as a dictionary; knows nothing of `dspark_hf`.
A vector is a 1-D tensor. D hidden, E head_dim, K block_size, M tapped layers, R markov rank, V vocab.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN


@dataclass
class OracleBlock:
    """One block: the drafts and, per slot, the logits `(K, V)` they are drawn from, confidence and hidden states."""

    token_ids: list[int]
    logits: Tensor
    confidence_logits: Tensor | None
    hidden_states: Tensor


def rms_norm(vector: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return `vector` over its root mean square, times `weight`."""
    normed = vector / math.sqrt(sum(float(x) ** 2 for x in vector) / len(vector) + eps)
    return normed if weight is None else normed * weight


def rotate(vector: Tensor, position: int, theta: float, rotated_share: float, is_interleaved: bool = False) -> Tensor:
    """Return one head's `vector` turned by its position: entry i pairs with entry i + E / 2, or 2 i with 2 i + 1."""
    half = len(vector) // 2
    turned = vector.clone()
    for i in range(half):
        if i >= int(rotated_share * half):
            continue
        angle = position * theta ** (-i / half)
        a, b = (2 * i, 2 * i + 1) if is_interleaved else (i, i + half)
        turned[a] = vector[a] * math.cos(angle) - vector[b] * math.sin(angle)
        turned[b] = vector[b] * math.cos(angle) + vector[a] * math.sin(angle)
    return turned


class DrafterOracle:
    """A DSpark drafter in the DeepSpec layout.

    What other layouts may say is set on it: `num_dead_slots` at the start of a block that draft nothing, `windows` and
    `causal_layers` by layer, `is_interleaved`.
    """

    num_dead_slots = 0
    windows: dict[str, int] = {}
    causal_layers: tuple[str, ...] = ()
    is_interleaved = False

    def __init__(self, weights: dict[str, Tensor], fields: dict[str, Any]):
        self.weights = {name: tensor.double() for name, tensor in weights.items()}
        self.is_gemma = fields["architectures"] == ["Gemma4DSparkModel"]
        self.eps = fields["rms_norm_eps"]
        self.block_size = fields["block_size"]
        self.mask_token_id = fields["mask_token_id"]
        self.num_layers = fields["num_hidden_layers"]
        self.head_dim = len(weights["layers.0.self_attn.q_norm.weight"])
        self.act = ACT2FN[fields["hidden_activation" if self.is_gemma else "hidden_act"]]
        rope = fields["rope_parameters"]
        rope = rope["full_attention"] if self.is_gemma else rope
        self.theta = rope["rope_theta"]
        self.rotated_share = rope["partial_rotary_factor"] if self.is_gemma else 1.0
        self.cap = fields.get("final_logit_softcapping") if self.is_gemma else None

    def block(
        self,
        context: Tensor,
        context_positions: list[int],
        anchor_id: int,
        anchor_position: int,
        true_ids: list[int] | None = None,
    ) -> OracleBlock:
        """Return the block after an anchor: greedy, or teacher-forced on `true_ids`, the tokens after the anchor.

        `context` `(C, M * D)` holds the tapped hidden states of the positions before the anchor.
        """
        features = [self._normed("hidden_norm", self._linear("fc", states)) for states in context.double()]
        slots = [self._embed(anchor_id)] + [self._embed(self.mask_token_id) for _ in range(self.block_size - 1)]
        positions = [anchor_position + k for k in range(self.block_size)]
        for layer in range(self.num_layers):
            slots = self._layer(f"layers.{layer}", features, context_positions, slots, positions)
        hidden = [self._normed("norm", slot) for slot in slots]

        logits, confidences, drafted = [], [], []
        previous = anchor_id
        state: Tensor | None = None
        for k in range(self.num_dead_slots):
            _, state = self._markov_bias(anchor_id, hidden[k], state)
        hidden = hidden[self.num_dead_slots :]
        for k in range(len(hidden)):
            bias, state = self._markov_bias(previous, hidden[k], state)
            logits.append(self._head(hidden[k]) + bias)
            confidences.append(self._confidence(previous, hidden[k]))
            drafted.append(int(logits[k].argmax()))
            previous = drafted[k] if true_ids is None else true_ids[k]
        confidence = None if confidences[0] is None else torch.stack([c for c in confidences if c is not None])
        return OracleBlock(drafted, torch.stack(logits), confidence, torch.stack(hidden))

    def _linear(self, name: str, vector: Tensor) -> Tensor:
        product = self.weights[f"{name}.weight"] @ vector
        bias = self.weights.get(f"{name}.bias")
        return product if bias is None else product + bias

    def _normed(self, name: str, vector: Tensor) -> Tensor:
        return rms_norm(vector, self.weights[f"{name}.weight"], self.eps)

    def _embed(self, token_id: int) -> Tensor:
        embedding = self.weights["embed_tokens.weight"][token_id]
        return embedding * math.sqrt(len(embedding)) if self.is_gemma else embedding

    def _head(self, hidden: Tensor) -> Tensor:
        logits = self._linear("lm_head", hidden)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def _layer(
        self,
        name: str,
        features: list[Tensor],
        context_positions: list[int],
        slots: list[Tensor],
        positions: list[int],
    ) -> list[Tensor]:
        normed = [self._normed(f"{name}.input_layernorm", slot) for slot in slots]
        # context and block alike are projected by the layer's own matrices; the block sees both, in both directions
        seen = list(zip(features + normed, context_positions + positions, strict=True))
        keys = [self._key_heads(name, state, position) for state, position in seen]
        values = [self._value_heads(name, state) for state, _ in seen]
        outputs = []
        for slot, states, position in zip(slots, normed, positions, strict=True):
            chosen = [i for i, (_, at) in enumerate(seen) if self._sees(name, positions[0], position, at)]
            attended = self._attend(name, states, position, [keys[i] for i in chosen], [values[i] for i in chosen])
            attended = self._linear(f"{name}.self_attn.o_proj", attended)
            if self.is_gemma:
                slot = slot + self._normed(f"{name}.post_attention_layernorm", attended)
                fed = self._mlp(name, self._normed(f"{name}.pre_feedforward_layernorm", slot))
                slot = slot + self._normed(f"{name}.post_feedforward_layernorm", fed)
                slot = slot * self.weights[f"{name}.layer_scalar"]
            else:
                slot = slot + attended
                slot = slot + self._mlp(name, self._normed(f"{name}.post_attention_layernorm", slot))
            outputs.append(slot)
        return outputs

    def _sees(self, name: str, anchor: int, position: int, other: int) -> bool:
        if other < anchor:
            return name not in self.windows or other >= anchor - self.windows[name]
        return name not in self.causal_layers or other <= position

    def _attend(
        self, name: str, states: Tensor, position: int, keys: list[list[Tensor]], values: list[list[Tensor]]
    ) -> Tensor:
        queries = self._linear(f"{name}.self_attn.q_proj", states).split(self.head_dim)
        group = len(queries) // len(keys[0])
        scale = 1.0 if self.is_gemma else 1 / math.sqrt(self.head_dim)
        heads = []
        for h, raw_query in enumerate(queries):
            query = self._turned(self._normed(f"{name}.self_attn.q_norm", raw_query), position)
            weights = torch.stack([scale * (query @ key[h // group]) for key in keys]).softmax(0)
            heads.append(sum(weight * value[h // group] for weight, value in zip(weights, values, strict=True)))
        return torch.cat(heads)

    def _key_heads(self, name: str, states: Tensor, position: int) -> list[Tensor]:
        heads = self._linear(f"{name}.self_attn.k_proj", states).split(self.head_dim)
        return [self._turned(self._normed(f"{name}.self_attn.k_norm", head), position) for head in heads]

    def _value_heads(self, name: str, states: Tensor) -> list[Tensor]:
        has_values = f"{name}.self_attn.v_proj.weight" in self.weights
        heads = self._linear(f"{name}.self_attn.{'v_proj' if has_values else 'k_proj'}", states).split(self.head_dim)
        return [rms_norm(head, None, self.eps) if self.is_gemma else head for head in heads]

    def _turned(self, head: Tensor, position: int) -> Tensor:
        return rotate(head, position, self.theta, self.rotated_share, self.is_interleaved)

    def _mlp(self, name: str, states: Tensor) -> Tensor:
        gate = self.act(self._linear(f"{name}.mlp.gate_proj", states))
        return self._linear(f"{name}.mlp.down_proj", gate * self._linear(f"{name}.mlp.up_proj", states))

    def _markov_bias(self, previous: int, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if "markov_head.markov_w1.weight" not in self.weights:
            return hidden.new_zeros(len(self.weights["lm_head.weight"])), None
        embedding = self.weights["markov_head.markov_w1.weight"][previous]
        latent = embedding
        if "markov_head.gate_proj.weight" in self.weights:
            gate = self._linear("markov_head.gate_proj", torch.cat([hidden, embedding])).sigmoid()
            latent = gate * embedding
        if "markov_head.joint_proj.weight" in self.weights:
            state = torch.zeros_like(embedding) if state is None else state
            joint = self._linear("markov_head.joint_proj", torch.cat([state, embedding, hidden]))
            gate, candidate, output = joint.split(len(embedding))
            latent = output.tanh()
            state = gate.sigmoid() * state + (1 - gate.sigmoid()) * candidate.tanh()
        return self._linear("markov_head.markov_w2", latent), state

    def _confidence(self, previous: int, hidden: Tensor) -> Tensor | None:
        weight = self.weights.get("confidence_head.proj.weight")
        if weight is None:
            return None
        features = hidden
        if weight.shape[1] > len(hidden):
            features = torch.cat([hidden, self.weights["markov_head.markov_w1.weight"][previous]])
        return self._linear("confidence_head.proj", features)[0]
