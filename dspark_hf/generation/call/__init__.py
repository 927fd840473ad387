"""What a call of `generate` promises, kept at the exact token: checks, processors, criteria, streamers, outputs."""
