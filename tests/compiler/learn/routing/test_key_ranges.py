"""The quantisation of keys, against keys that the model's own cache shows."""

import torch

from models import tiny_llama, tokens
from surgeon.compiler.learn.routing.key_ranges import measure_routers


def test_a_channel_lies_within_three_deviations_of_its_mean() -> None:
    model, sequences = tiny_llama(), [tokens(1, 64, seed) for seed in (0, 1)]
    routers = measure_routers(model, sequences)
    caches = [model(sequence, use_cache=True).past_key_values for sequence in sequences]
    assert len(routers) == model.config.num_hidden_layers
    for layer, router in enumerate(routers):
        keys = torch.cat([cache.layers[layer].keys[0] for cache in caches], dim=1)  # [KV heads, tokens, head_dim]
        centre, scale = (torch.tensor(part) for part in (router.centre, router.scale))
        torch.testing.assert_close(centre, keys.mean(1), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(scale, 3 * keys.std(1, correction=0), rtol=1e-3, atol=1e-5)
