"""The frozen target's hidden states: computed online, and kept on disk up to a stated size.

B sequences, T tokens, D hidden, M tapped layers, V vocab.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from dspark_hf.files import remove_stale, whole_file
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.training.losses import cooled

logger = logging.get_logger(__name__)


@dataclass
class TargetStates:
    """What a drafter learns from sequences.

    `context` `(B, T, M * D)` are the tapped hidden states, `last` `(B, T, D)` the states that enter the output head,
    both bf16; `lse` `(B, T)`, fp32, is the log-sum-exp of the logits over the whole vocabulary, at the temperature
    that the drafter is trained for.
    """

    context: Tensor
    last: Tensor
    lse: Tensor


class StateSource:
    """Return sequences' states, from the cache or from the target.

    Args:
        target: the frozen target, on a device of its own.
        dtype: what the target computes in; autocast where it differs from the weights.
        cache: remembers states on disk; None computes every sequence anew.
        temperature: what logits are divided by before their log-sum-exp is taken.
    """

    def __init__(
        self,
        target: TargetAdapter,
        *,
        dtype: torch.dtype,
        cache: StateCache | None = None,
        temperature: float = 1.0,
    ):
        self._target = target
        self._dtype = dtype
        self._cache = cache
        self._temperature = temperature

    def get(self, sequences: list[Tensor]) -> TargetStates:
        """Return the states of `sequences`, token ids `(T_b,)` each, padded on the right to the longest."""
        cache = self._cache
        found = [None if cache is None else cache.get(ids) for ids in sequences]
        missing = [index for index, states in enumerate(found) if states is None]
        for index, states in zip(missing, self._compute([sequences[index] for index in missing]), strict=True):
            found[index] = states
            if cache is not None:
                cache.put(sequences[index], states)
        return TargetStates(*(pad_sequence(list(part), batch_first=True) for part in zip(*found, strict=True)))

    @torch.no_grad()
    def _compute(self, sequences: list[Tensor], chunk_size: int = 256) -> list[tuple[Tensor, Tensor, Tensor]]:
        if not sequences:
            return []
        model, width = self._target.model, self._target.hidden_size
        input_ids = pad_sequence(sequences, batch_first=True).to(self._target.device)
        with self._target, torch.autocast(self._target.device.type, self._dtype, enabled=self._dtype != model.dtype):
            output = model.get_decoder()(input_ids=input_ids, use_cache=False)
            context = self._target.pop_context_hidden_states().to(torch.bfloat16)
            # rounded first: probabilities taken from the stored states sum to one with a sum over the same states
            last = output.last_hidden_state.to(torch.bfloat16)
            # the whole vocabulary only ever exists for one chunk of positions
            parts = last.reshape(-1, width).split(chunk_size)
            lse = torch.cat([logsumexp(self._target.head(part), temperature=self._temperature) for part in parts])
            lse = lse.view(last.shape[:2])
        return [
            (context[row, : len(ids)], last[row, : len(ids)], lse[row, : len(ids)])
            for row, ids in enumerate(sequences)
        ]


class StateCache:
    """States on disk, one file a sequence, at most `max_bytes` in all; what does not fit is not kept.

    Files are whole or absent, so processes and runs may share a folder. Its subfolder is named after the target, the
    tapped layers, the dtype and the temperature: states of another target are never found. A file that is damaged all
    the same is named in a warning and counts as absent: the states are computed again, and replace it.

    Args:
        folder: where the files lie.
        target: whose states they are.
        dtype: what the target computes in.
        max_bytes: size of all files.
        temperature: what the logits of the states' log-sum-exps were divided by.
    """

    def __init__(
        self,
        folder: str | Path,
        target: TargetAdapter,
        *,
        dtype: torch.dtype,
        max_bytes: int,
        temperature: float = 1.0,
    ):
        self._folder = Path(folder) / _fingerprint(target, dtype, temperature)
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_stale(self._folder)
        self._max_bytes = max_bytes
        self._width = target.hidden_size
        self._num_layers = len(target.layer_ids)
        self._num_bytes = sum(path.stat().st_size for path in self._folder.glob("*.safetensors"))

    def get(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the states of a sequence `(T,)`, or None if they are not kept."""
        path = self._path(input_ids)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as tensors:
                states = tensors.get_tensor("context"), tensors.get_tensor("last"), tensors.get_tensor("lse")
            self._check(states, len(input_ids))
        except (SafetensorError, OSError, ValueError) as error:
            logger.warning(f"Computing the states in {path} again, which cannot be used ({error}).")
            return None
        return states

    def put(self, input_ids: Tensor, states: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep the states of a sequence, if there is room."""
        path = self._path(input_ids)
        size = sum(tensor.numel() * tensor.element_size() for tensor in states)
        # what a damaged file held is free again
        size -= path.stat().st_size if path.is_file() else 0
        if self._num_bytes + size > self._max_bytes:
            return
        self._num_bytes += size
        tensors = dict(zip(("context", "last", "lse"), (x.contiguous().cpu() for x in states), strict=True))
        with whole_file(path) as partial:
            save_file(tensors, partial)

    def _check(self, states: Sequence[Tensor], length: int) -> None:
        widths = [self._num_layers * self._width, self._width]
        shapes = [(length, widths[0]), (length, widths[1]), (length,)]
        dtypes = [torch.bfloat16, torch.bfloat16, torch.float32]
        for tensor, shape, dtype in zip(states, shapes, dtypes, strict=True):
            if tensor.shape != shape or tensor.dtype != dtype:
                raise ValueError(f"{tuple(tensor.shape)} in {tensor.dtype}, where {shape} in {dtype} belong")
            if not tensor.isfinite().all():
                raise ValueError("numbers that are not finite")

    def _path(self, input_ids: Tensor) -> Path:
        digest = hashlib.sha256(input_ids.cpu().numpy().astype("<i8").tobytes()).hexdigest()
        return self._folder / f"{digest[:32]}.safetensors"


def logsumexp(logits: Tensor, size: int = 4096, *, temperature: float = 1.0) -> Tensor:
    """Return the fp32 logarithm of the sum of the exponentials of logits `(T, V)` over a temperature, `(T,)`."""

    def of(part: Tensor) -> Tensor:
        return cooled(part.float(), temperature).logsumexp(-1)

    if logits.device.type != "cpu":
        return of(logits)
    # parts that stay in a processor's cache: gigabytes of fp32 copies went in and out of memory otherwise
    parts = [of(part) for part in logits.split(size, dim=-1)]
    return torch.stack(parts, dim=-1).logsumexp(-1)


def _fingerprint(target: TargetAdapter, dtype: torch.dtype, temperature: float) -> str:
    """Return a name for what determines the states; of the weights, a sample of every tensor."""
    digest = hashlib.sha256()
    description = [target.config.to_dict(), target.layer_ids, str(dtype), str(target.model.dtype)]
    # states that were kept before there was a choice stay what they are
    description += [] if temperature == 1.0 else [temperature]
    digest.update(json.dumps(description, sort_keys=True, default=str).encode())
    for name, parameter in target.model.named_parameters():
        digest.update(name.encode())
        if not parameter.is_meta:
            values = parameter.detach()
            # of what tensor parallelism divided, the part of this process
            values = values.to_local() if hasattr(values, "to_local") else values
            sample = values.flatten()[:: max(values.numel() // 64, 1)]
            digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
