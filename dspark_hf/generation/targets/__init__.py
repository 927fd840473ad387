"""Who checks tokens: the target over its cache, one file per way of rolling back."""
