"""Who proposes tokens: the interface of drafters, the chain of drafts (Eq. 4), and what a drafter has read."""

from dspark_hf.generation.drafting.interface import DraftContext, DraftedBlock, Drafter, Sampler

__all__ = ["DraftContext", "DraftedBlock", "Drafter", "Sampler"]
