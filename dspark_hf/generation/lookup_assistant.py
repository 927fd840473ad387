"""An assistant without a model: what it drafts stood in prompt or text before."""

from __future__ import annotations

from typing import Any

from dspark_hf.generation.compat import is_installed
from dspark_hf.generation.custom_generate import NOT_INSTALLED, CustomGenerate
from dspark_hf.generation.drafting.interface import DraftContext, Drafter
from dspark_hf.generation.drafting.lookup import NoContext
from dspark_hf.generation.targets.adapter import TargetAdapter


class _Any:
    """Equals whatever it is compared with."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


class _FittingConfig:
    """What Transformers compares with the target's configuration, to see whether both share a vocabulary: always."""

    is_encoder_decoder = False
    vocab_size = eos_token_id = pad_token_id = bos_token_id = _Any()

    def get_text_config(self, *args: Any, **kwargs: Any) -> _FittingConfig:
        """Return itself."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return no fields: none shapes a pass."""
        return {}


class LookupAssistant(CustomGenerate):
    """Draft what followed the latest tokens where they stood before in prompt or text.

    It needs no training, no weights and no pass of any model, and fits every target: pass it as `assistant_model` to
    `target.generate(...)`, or as `drafter` to `generate_stream`. It pays where text is repeated: editing, code,
    summaries, questions about a text. Of a target that cannot take so many tokens back it drafts fewer.

    Args:
        max_drafts: most drafts of a row and round.
        min_match: tokens that must have stood before.

    Raises:
        TypeError: if either is no whole number.
        ValueError: if either is less than 1.

    Example:

        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from dspark_hf import LookupAssistant
        >>> target = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, eos_token_id=None))
        >>> prompt = torch.tensor([[5, 6, 7, 8, 5, 6, 7]])
        >>> plain = target.generate(prompt, max_new_tokens=8, do_sample=False)
        >>> assisted = target.generate(prompt, max_new_tokens=8, do_sample=False, assistant_model=LookupAssistant())
        >>> torch.equal(plain, assisted)
        True
    """

    drafts = "lookup"
    sources = ("lookup",)

    def __init__(self, *, max_drafts: int = Drafter.longest_lookup, min_match: int = Drafter.min_match):
        for name, value in (("max_drafts", max_drafts), ("min_match", min_match)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"`{name}` must be a whole number of at least 1, got {value!r}. Pass an int.")
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}. Generate without `assistant_model`.")
        self.config = _FittingConfig()
        self.longest_lookup = max_drafts
        self.min_match = min_match

    @property
    def device(self) -> Any:
        """None there is: Transformers' own loop asks for it before anything else.

        Raises:
            AttributeError: always; while dspark_hf is not installed into Transformers, it says so.
        """
        raise AttributeError("a LookupAssistant is on no device" if is_installed() else NOT_INSTALLED)

    @property
    def block_size(self) -> int:
        """Most drafts of a row and round."""
        return self.longest_lookup

    @property
    def target_layer_ids(self) -> list[int]:
        """None: it reads text alone."""
        return []

    def check_target(self, target: TargetAdapter) -> None:
        """Any target will do."""

    def start(self, target: TargetAdapter, batch_size: int) -> DraftContext:
        """Return a context that reads nothing: the decoding loop itself looks up."""
        return NoContext()
