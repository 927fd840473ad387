"""lm-evaluation-harness with a drafter: its model `hf`, whose generated answers come sooner and are the same.

B batch, P prompt width, L length so far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from dspark_hf.generation.call.names import find_assistant
from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.wrappers import unwrap

# what a stop may be written in beyond the tokens that its own text has
_FURTHER_TOKENS = 2


class DSparkLM(HFLM):
    """The harness's `hf` model, assisted by a drafter where it writes; likelihoods are computed as there.

    Every answer ends at its own stop, as with `batch_size=1`, and its row then leaves the batch.

    Args:
        pretrained: folder or hub name of the target, or the target itself.
        drafter: folder or hub name of its drafter, `"auto"` for the one that is known for the target, or a drafter.
        scheduler: how far to draft.
        num_assistant_tokens: how many drafts a round at most.
        drafts: who drafts.
        sampling: how samples are accepted.
        draft_tree: whether drafts may branch.
        others: what the model `hf` takes.

    The five before the last are those of `generate`; None is its default.

    Raises:
        ValueError: if there is no such drafter, or it does not fit the target.

    Example:

        >>> import dspark_hf, lm_eval  # doctest: +SKIP
        >>> lm_eval.simple_evaluate("dspark-hf", "pretrained=TARGET,drafter=auto", ["gsm8k"])  # doctest: +SKIP
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        drafter: str | Drafter = "auto",
        scheduler: str | None = None,
        num_assistant_tokens: int | None = None,
        drafts: str | None = None,
        sampling: str | None = None,
        draft_tree: int | str | None = None,
        **others: Any,
    ):
        super().__init__(pretrained, **others)
        options = {
            "scheduler": scheduler,
            "num_assistant_tokens": num_assistant_tokens,
            "drafts": drafts,
            "sampling": sampling,
            "draft_tree": draft_tree,
        }
        self._options = {name: value for name, value in options.items() if value is not None}
        self._name = drafter if isinstance(drafter, str) else type(drafter).__name__
        self._drafter = _find_drafter(drafter, self.model)
        self._num_committed = self._num_rounds = 0

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness notes of the model, and of the drafter: tau is that of the answers so far."""
        tau = self._num_committed / self._num_rounds if self._num_rounds else math.nan
        return {**super().get_model_info(), "drafter": self._name, "tau": tau, **self._options}

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        # the harness's own criteria end a batch as a whole, when its last answer has stopped
        stops = _Stops(self.tokenizer, stop, context.shape[1])
        # as in the model `hf`: a temperature of 0, which is the default, is greedy
        if generation_kwargs.setdefault("temperature", 0.0) == 0.0 and not generation_kwargs.get("do_sample"):
            generation_kwargs["do_sample"] = False
            del generation_kwargs["temperature"]
        dtype = self.mixed_precision_dtype
        with torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None):
            output = self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=StoppingCriteriaList([stops]),
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                assistant_model=self._drafter,
                **self._options,
                **generation_kwargs,
            )
        statistics = self._drafter.last_statistics
        if statistics is not None:
            self._num_committed += statistics.num_committed
            self._num_rounds += statistics.num_rounds
        return output


def _find_drafter(drafter: str | Drafter, model: Any) -> Drafter:
    found = find_assistant(drafter, model, only_drafters=True) if isinstance(drafter, str) else unwrap(drafter)
    if not isinstance(found, Drafter):
        raise ValueError(
            f"`drafter` must be a DSpark drafter, got {drafter!r}. Name the folder or hub name of one, or `auto`; for "
            "other assistants use the model `hf`."
        )
    # before hundreds of prompts are read
    found.check_target(TargetAdapter(unwrap(model)))
    return found


class _Stops(StoppingCriteria):
    """Stop each row whose newest tokens hold one of the texts."""

    depends_on_prefix_alone = True

    def __init__(self, tokenizer: Any, texts: Sequence[str], prompt_length: int):
        self._tokenizer, self._texts, self._prompt_length = tokenizer, texts, prompt_length
        lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        self._window = max(lengths, default=0) + _FURTHER_TOKENS

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return which rows of `input_ids` `(B, L)` stop, `(B,)`; the prompt is not looked at."""
        start = max(self._prompt_length, input_ids.shape[1] - self._window)
        newest = self._tokenizer.batch_decode(input_ids[:, start:])
        is_over = [any(text in answer for text in self._texts) for answer in newest]
        return torch.tensor(is_over, device=input_ids.device)
