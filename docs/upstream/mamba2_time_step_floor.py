"""Nemotron-H and Zamba2 in Transformers 5.24: a pass over several tokens has a floor under the time step, a step none.

`mamba2_chunk_scan` is called with `dt_limit=(time_step_min, inf)`, `mamba2_selective_state_update` without limits. So
the same tokens leave another state when they are read together than when they are read one by one.

    python docs/upstream/mamba2_time_step_floor.py
"""

import torch
from transformers import NemotronHConfig, NemotronHForCausalLM


@torch.no_grad()
def main() -> None:
    """Print how far logits of tokens read together are from those of tokens read one by one."""
    for bias in (-9.0, 0.0):
        torch.manual_seed(0)
        config = NemotronHConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            layers_block_type=["mamba", "attention", "mamba", "mlp"],
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            mamba_num_heads=8,
            mamba_head_dim=8,
            n_groups=2,
            ssm_state_size=8,
            initializer_range=0.4,
        )
        model = NemotronHForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("dt_bias"):
                parameter.fill_(bias)
        ids = torch.randint(2, 64, (1, 20))
        cache = model(ids[:, :4], use_cache=True).cache
        together = model(ids[:, 4:], cache=cache).logits
        cache = model(ids[:, :4], use_cache=True).cache
        steps = torch.cat([model(ids[:, t : t + 1], cache=cache).logits for t in range(4, 20)], dim=1)
        off, size = (together - steps).abs().max(), steps.abs().max()
        print(f"dt_bias {bias}: logits of 16 tokens together and one by one differ by {off:.1e} of {size:.1f}")


if __name__ == "__main__":
    main()
