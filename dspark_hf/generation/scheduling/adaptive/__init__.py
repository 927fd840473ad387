"""The default scheduler, which is never slower than plain decoding for long: plans, parking, memory."""
