"""Mamba-1 in Transformers 5.24: a pass over several tokens starts from an empty state, whatever the cache holds.

`mamba_selective_scan` takes no initial state, so the second chunk of a prompt, or a second turn over a kept cache, is
read as if it were the first. The one-token step, run token by token from the cache's state, gives the logits of a pass
over the whole text. Mamba, Falcon-Mamba, Jamba and Zamba share this code.

    python docs/upstream/mamba1_scan_forgets.py
"""

import torch
from transformers import AutoModelForCausalLM, JambaConfig, MambaConfig

CONFIGS = {
    "mamba": MambaConfig(vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=2, initializer_range=0.4),
    "jamba": JambaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_period=3,
        attn_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        initializer_range=0.4,
    ),
}


@torch.no_grad()
def main() -> None:
    """Print how far logits over a filled cache are from those of a pass over the whole text."""
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        ids = torch.randint(2, 64, (1, 20))
        whole = model(ids).logits[:, 12:]
        at_once = model(ids[:, 12:], cache=model(ids[:, :12], use_cache=True).cache).logits
        cache = model(ids[:, :12], use_cache=True).cache
        steps = torch.cat([model(ids[:, t : t + 1], cache=cache).logits for t in range(12, 20)], dim=1)
        for way, logits in (("8 tokens at once", at_once), ("one by one", steps)):
            print(f"{name}, {way}: logits off by {(logits - whole).abs().max():.1e} of {whole.abs().max():.1f}")


if __name__ == "__main__":
    main()
