"""Parameters and bytes of weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from dspark_hf.modeling.deepseek_v4.estimation.formats import WeightFormat, stored_bytes
from dspark_hf.modeling.deepseek_v4.estimation.shapes import Quantization
from dspark_hf.modeling.deepseek_v4.estimation.tensors import Tensor


@dataclass(frozen=True)
class PartWeights:
    """One part of a model: its parameters, those a token passes, and its bytes."""

    num_parameters: int
    num_active_parameters: int
    num_bytes: int


@dataclass(frozen=True)
class Weights:
    """The weights of a model by part, the largest first."""

    parts: dict[str, PartWeights]

    @property
    def num_parameters(self) -> int:
        """All parameters."""
        return sum(part.num_parameters for part in self.parts.values())

    @property
    def num_active_parameters(self) -> int:
        """Parameters that a token passes, without the input embedding, of which it reads one row."""
        return sum(part.num_active_parameters for part in self.parts.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, buffers and scales included."""
        return sum(part.num_bytes for part in self.parts.values())


def count_weights(tensors: Iterable[Tensor], quantization: Quantization, weight_format: WeightFormat) -> Weights:
    """Return what the tensors take in a format.

    Example:

        >>> from dspark_hf.modeling.deepseek_v4.estimation.reading import read_model
        >>> from dspark_hf.modeling.deepseek_v4.estimation.tensors import target_tensors
        >>> model = read_model("deepseek-ai/DeepSeek-V4-Flash")
        >>> weights = count_weights(target_tensors(model.shape), model.quantization, WeightFormat.released)
        >>> round(weights.num_parameters / 1e9)
        284
    """
    parts: dict[str, PartWeights] = {}
    for tensor in tensors:
        known = parts.get(tensor.part, PartWeights(0, 0, 0))
        parts[tensor.part] = PartWeights(
            known.num_parameters + tensor.num_parameters,
            known.num_active_parameters + tensor.num_active_parameters,
            known.num_bytes + tensor_bytes(tensor, quantization, weight_format),
        )
    return Weights(dict(sorted(parts.items(), key=lambda item: -item[1].num_bytes)))


def tensor_bytes(tensor: Tensor, quantization: Quantization, weight_format: WeightFormat) -> int:
    """Return the bytes of all tensors of one kind and shape."""
    storage = _storage(tensor.kind, quantization, weight_format)
    rows, columns = tensor.shape[0], prod(tensor.shape[1:])
    return tensor.count * stored_bytes(storage, rows, columns, quantization.fp8_scale_bytes)


def _storage(kind: str, quantization: Quantization, weight_format: WeightFormat) -> str:
    if kind == "ids":
        return "int64"
    if weight_format is WeightFormat.fp32 or kind == "fp32":
        return "fp32"
    if kind == "kept":
        return "bf16"
    if weight_format is WeightFormat.released:
        return quantization.expert if kind == "expert" else quantization.linear
    return weight_format.value
