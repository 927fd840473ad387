"""Bamba in Transformers 5.24: without `position_ids`, a pass over a filled cache counts its tokens from 0 again.

`BambaModel.forward` makes positions without the length of the cache, which other models add; rotary embeddings of a
second chunk or turn are then those of the first tokens. `generate` passes positions and is right.

    python docs/upstream/bamba_positions.py
"""

import torch
from transformers import BambaConfig, BambaForCausalLM


@torch.no_grad()
def main() -> None:
    """Print how far logits over a filled cache are from those of a pass over the whole text."""
    torch.manual_seed(0)
    config = BambaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_n_groups=2,
        mamba_d_state=8,
        initializer_range=0.4,
    )
    model = BambaForCausalLM(config).eval()
    ids = torch.randint(2, 64, (1, 20))
    whole = model(ids).logits[:, 12:]
    for way, positions in (("default", {}), ("given", {"position_ids": torch.arange(12, 20)[None]})):
        logits = model(ids[:, 12:], cache=model(ids[:, :12], use_cache=True).cache, **positions).logits
        print(f"positions {way}: logits off by {(logits - whole).abs().max():.1e} of {whole.abs().max():.1f}")


if __name__ == "__main__":
    main()
