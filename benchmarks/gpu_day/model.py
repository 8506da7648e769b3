"""The last stage: a model of a few random layers, patched beside dense: first token, decoding, a captured step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from gpu_day.calls import milliseconds
from gpu_day.day import Day, Tell
from surgeon.runtime import load, patch
from surgeon.runtime.evaluate.pilot.run import twin

ROOM = 128


@torch.inference_mode()
def model_speed(day: Day, packages: Path, tell: Tell) -> None:
    """Tells the milliseconds of the first token and of a decoded one, dense and patched, with one static cache each."""
    dense = random_model(day)
    patched = twin(dense)
    patch(patched, load(packages / "model", strict=True, device=day.device), recall="pattern")
    models = {"dense": dense, "patched": patched}
    tokens = torch.randint(day.vocabulary, (1, day.model_length), device=day.device)
    prompt = milliseconds(day, {name: prefill(each, tokens) for name, each in models.items()}, False, 3)
    tell({"what": "first token", "length": day.model_length, **_beside(prompt)})
    steps = {name: step(each, tokens) for name, each in models.items()}
    tell({"what": "decoded token", "length": day.model_length, **_beside(milliseconds(day, steps, False, 10))})
    if day.device == "cuda":
        captured = milliseconds(day, steps, True, 10)
        tell({"what": "decoded token, captured as a CUDA graph", "length": day.model_length, **_beside(captured)})


def random_model(day: Day) -> LlamaForCausalLM:
    """A Llama of the day's shape with random weights."""
    shape = day.shape
    config = LlamaConfig(
        vocab_size=day.vocabulary,
        hidden_size=shape.heads * shape.head_dim,
        intermediate_size=7 * shape.heads * shape.head_dim // 2,
        num_hidden_layers=day.model_layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=2 * day.model_length,
        dtype=day.torch_dtype,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(day.torch_dtype)
    try:
        with torch.device(day.device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.eval()
    return model


def prefill(of: Any, tokens: torch.Tensor) -> Callable[[], object]:
    """A call that reads the tokens and computes the last one's logits."""
    return lambda: of(input_ids=tokens, logits_to_keep=1)


def step(of: Any, tokens: torch.Tensor) -> Callable[[], object]:
    """A call that decodes one more token after a filled static cache, which has room for `ROOM` calls."""
    cache = StaticCache(config=of.config, max_cache_len=tokens.shape[1] + ROOM)
    of(input_ids=tokens, past_key_values=cache, logits_to_keep=1)
    return lambda: of(input_ids=tokens[:, -1:], past_key_values=cache)


def _beside(found: dict[str, float]) -> dict[str, float]:
    times = {f"{name}_ms": value for name, value in found.items()}
    return times | {"times_dense": found["dense"] / found["patched"]}
