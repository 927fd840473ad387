"""What a drafter's file may mean: the same weights under another slot convention, tap, position, rotation or mask."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dspark_hf.modeling.backbone import BlockAttention
from dspark_hf.modeling.configuration_dspark import DSparkConfig
from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel


@dataclass(frozen=True)
class Reading:
    """One way of reading a drafter.

    Args:
        sample_from_anchor: as in `DSparkConfig`; the number of slots stays, a draft more or less comes of it.
        tap_shift: what is added to every tapped layer.
        mask_token_id: as in `DSparkConfig`.
        is_interleaved: `DSparkConfig.rope_interleaved`.
        position_shift: what is added to the positions of a block, but not to those of its context.
    """

    sample_from_anchor: bool
    mask_token_id: int
    is_interleaved: bool
    tap_shift: int = 0
    position_shift: int = 0

    @classmethod
    def configured(cls, config: DSparkConfig) -> Reading:
        """Return the reading that a configuration says."""
        return cls(config.sample_from_anchor, config.mask_token_id, config.rope_interleaved)

    def layer_ids(self, config: DSparkConfig) -> list[int]:
        """Return the layers that are read, -1 for the embedding."""
        return [layer_id + self.tap_shift for layer_id in config.target_layer_ids]

    def block_size(self, config: DSparkConfig) -> int:
        """Return the drafts of a block of as many slots as the configuration has."""
        return config.num_slots if self.sample_from_anchor else config.num_slots - 1

    def settings(self, config: DSparkConfig) -> dict[str, Any]:
        """Return the fields of the configuration that would have to be others, by cause first."""
        return {name: value for values in self.changes(config).values() for name, value in values.items()}

    def changes(self, config: DSparkConfig) -> dict[str, dict[str, Any]]:
        """Return what differs from the configuration, by the key of `EXIT_STATUS` that it is the cause of."""
        found: dict[str, dict[str, Any]] = {}
        if self.sample_from_anchor != config.sample_from_anchor:
            found["slots"] = {"sample_from_anchor": self.sample_from_anchor, "block_size": self.block_size(config)}
        if self.tap_shift:
            found["taps"] = {"target_layer_ids": self.layer_ids(config)}
        if self.mask_token_id != config.mask_token_id:
            found["mask"] = {"mask_token_id": self.mask_token_id}
        if self.is_interleaved != config.rope_interleaved:
            found["rotation"] = {"rope_interleaved": self.is_interleaved}
        if self.position_shift:
            # no field says so: a drafter that needs it has to be trained or written anew
            found["positions"] = {"position_shift": self.position_shift}
        return found

    def describe(self, config: DSparkConfig) -> str:
        """Return the reading in words."""
        words = [f"{name}={value}" for name, value in self.settings(config).items()]
        return ", ".join(words) or "as configured"


def neighbours(reading: Reading, config: DSparkConfig, num_layers: int, mask_ids: Sequence[int]) -> Iterator[Reading]:
    """Give the readings that differ in one thing, the likeliest mistake first."""
    if config.num_slots > 1:
        yield replace(reading, sample_from_anchor=not reading.sample_from_anchor)
    for shift in (-1, 1):
        shifted = replace(reading, tap_shift=reading.tap_shift + shift)
        ids = shifted.layer_ids(config)
        if abs(shifted.tap_shift) <= 1 and ids[0] >= -1 and ids[-1] < num_layers:
            yield shifted
    # without masks there is nothing to be mistaken in
    if config.num_slots > 1:
        yield from (replace(reading, mask_token_id=token) for token in mask_ids if token != reading.mask_token_id)
    if config.deepseek_v4 is None:
        yield replace(reading, is_interleaved=not reading.is_interleaved)
    for shift in (-1, 1):
        if abs(reading.position_shift + shift) <= 1:
            yield replace(reading, position_shift=reading.position_shift + shift)


def read_as(drafter: DSparkAssistantModel, reading: Reading) -> DSparkAssistantModel:
    """Return a drafter with the same weights, not copied, that is read in another way but for taps and positions."""
    shared = {id(tensor): tensor for tensor in (*drafter.parameters(), *drafter.buffers())}
    other = copy.deepcopy(drafter, shared)
    config = other.config
    size = reading.block_size(config)
    if size != config.block_size:
        # temperatures are those of the block's drafts
        config.sts_temperatures = None
    config.sample_from_anchor, config.block_size = reading.sample_from_anchor, size
    config.mask_token_id, config.rope_interleaved = reading.mask_token_id, reading.is_interleaved
    for module in other.modules():
        if isinstance(module, BlockAttention):
            module.is_interleaved = reading.is_interleaved
    return other
