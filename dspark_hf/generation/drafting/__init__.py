"""Who proposes tokens: the interface of drafters, the chain of drafts (Eq. 4), and what a drafter has read."""
