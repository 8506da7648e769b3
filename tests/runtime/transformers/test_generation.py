"""Every way to generate gives, token for token, the output of the model under the explicit mask."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast, StaticCache, pipeline, set_seed
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from models import VOCABULARY, Compiled, masked_model, padded, tiny_config, tiny_llama, tokens
from surgeon.runtime import patch
from surgeon.runtime.errors import PatchError

pytestmark = pytest.mark.usefixtures("no_gradients")

LENGTHS = (50, 33, 3)  # with the new tokens: beyond the topology's 64, and from the middle of a block


@pytest.fixture
def expected(compiled: dict[str, Compiled]) -> LlamaForCausalLM:
    """The model under the explicit mask."""
    return masked_model(tiny_llama(), compiled["sparse"].topology)


@pytest.fixture
def patched(compiled: dict[str, Compiled]) -> LlamaForCausalLM:
    """The same model on the kernels."""
    model = tiny_llama()
    patch(model, compiled["sparse"].package, recall="pattern")
    return model


def generated(model: LlamaForCausalLM, ids: torch.Tensor, mask: torch.Tensor | None = None, **how: Any) -> torch.Tensor:
    set_seed(7)
    mask = torch.ones_like(ids) if mask is None else mask
    output = model.generate(ids, attention_mask=mask, **({"max_new_tokens": 24, "do_sample": False} | how))
    return output if isinstance(output, torch.Tensor) else output.sequences


class _NoStream:
    """A stand-in for the GPU streams that an offloaded cache uses, so that it copies on the CPU."""

    def wait_stream(self, _other: object) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"use_cache": False, "max_new_tokens": 8},
        {"do_sample": True, "temperature": 2.0, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
        {"prefill_chunk_size": 16},
        {"prefill_chunk_size": 7, "cache_implementation": "static"},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 2},
        {"cache_implementation": "offloaded"},
        {"cache_implementation": "offloaded_static"},
    ],
    ids=str,
)
def test_a_batch_with_left_padding(
    patched: LlamaForCausalLM, expected: LlamaForCausalLM, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "offloaded" in how.get("cache_implementation", ""):
        monkeypatch.setattr("torch.Stream", _NoStream)
        monkeypatch.setattr("torch.cuda.default_stream", lambda _device: _NoStream())
    ids, mask = padded(LENGTHS)
    assert torch.equal(generated(patched, ids, mask, **how), generated(expected, ids, mask, **how))


def test_a_batch_whose_sequences_end_at_different_lengths(
    patched: LlamaForCausalLM, expected: LlamaForCausalLM
) -> None:
    ids, mask = padded(LENGTHS)
    end = int(generated(expected, ids, mask)[1, ids.shape[1] + 5])
    found, wanted = (generated(model, ids, mask, eos_token_id=end) for model in (patched, expected))
    assert torch.equal(found, wanted)
    assert (wanted[1, ids.shape[1] + 6 :] == 0).all()  # padding, while others go on


@contextlib.contextmanager
def counted(model: torch.nn.Module) -> Iterator[list[int]]:
    """The number of queries in every call of the model."""
    lengths: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: lengths.append(inputs[0].shape[1])
    )
    yield lengths
    handle.remove()


@pytest.mark.parametrize("assistant", ["the same model", "another model", "an unpatched one"])
def test_assisted_decoding(
    patched: LlamaForCausalLM, expected: LlamaForCausalLM, compiled: dict[str, Compiled], assistant: str
) -> None:
    helper = tiny_llama(tiny_config(), seed=0 if assistant != "another model" else 3)
    if assistant != "an unpatched one":
        patch(helper, compiled["sparse"].package, recall="pattern")
    ids = tokens(1, 50)
    with counted(patched) as lengths:
        # The assistant's mask would have a hole where the padding token was generated, which is refused.
        found = generated(patched, ids, assistant_model=helper, suppress_tokens=[0])
    assert torch.equal(found, generated(expected, ids, suppress_tokens=[0]))
    assert max(lengths[1:]) > 1  # candidates were checked, several per call
    if assistant == "the same model":
        assert len(lengths) < 24  # and accepted


def test_prompt_lookup(patched: LlamaForCausalLM, expected: LlamaForCausalLM) -> None:
    ids = tokens(1, 11).repeat(1, 5)
    with counted(patched) as lengths:
        found = generated(patched, ids, prompt_lookup_num_tokens=3)
    assert torch.equal(found, generated(expected, ids))
    assert max(lengths[1:]) > 1


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("lengths", [(40,), (40, 9)], ids=str)
def test_a_conversation_goes_on_with_the_old_cache(
    patched: LlamaForCausalLM, expected: LlamaForCausalLM, kind: str, lengths: tuple[int, ...]
) -> None:
    ids, mask = padded(lengths)
    config = patched.config
    cache: Cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=128)
    for turn in range(3):
        found = generated(patched, ids, mask, past_key_values=cache, max_new_tokens=6)
        assert torch.equal(found, generated(expected, ids, mask, max_new_tokens=6))
        said = tokens(len(lengths), 11, seed=turn)
        mask = torch.cat((mask, torch.ones(len(lengths), 6 + 11, dtype=mask.dtype)), dim=1)
        ids = torch.cat((found, said), dim=1)


def test_from_embeddings(patched: LlamaForCausalLM, expected: LlamaForCausalLM) -> None:
    ids, mask = padded(LENGTHS)
    found = patched.generate(
        inputs_embeds=patched.get_input_embeddings()(ids), attention_mask=mask, max_new_tokens=24, do_sample=False
    )
    assert torch.equal(found, generated(expected, ids, mask)[:, ids.shape[1] :])


def test_scores(patched: LlamaForCausalLM, expected: LlamaForCausalLM) -> None:
    ids, mask = padded(LENGTHS)
    how = {"attention_mask": mask, "max_new_tokens": 9, "return_dict_in_generate": True, "output_logits": True}
    found, wanted = (torch.stack(model.generate(ids, **how).logits) for model in (patched, expected))
    torch.testing.assert_close(found, wanted, atol=5e-5, rtol=0)


class _Kept(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None: ...


def test_streaming(patched: LlamaForCausalLM, expected: LlamaForCausalLM) -> None:
    ids, streamer = tokens(1, 50), _Kept()
    generated(patched, ids, streamer=streamer)
    assert streamer.tokens == generated(expected, ids)[0].tolist()


def words() -> PreTrainedTokenizerFast:
    """A tokenizer whose words are token numbers."""
    tokenizer = Tokenizer(WordLevel({str(token): token for token in range(VOCABULARY)}, unk_token="1"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0", padding_side="left")


def test_a_pipeline(patched: LlamaForCausalLM, expected: LlamaForCausalLM) -> None:
    texts = [" ".join(map(str, tokens(1, length, seed=length)[0].tolist())) for length in LENGTHS]
    found, wanted = (
        pipeline("text-generation", model=model, tokenizer=words(), device="cpu")(
            texts, batch_size=3, max_new_tokens=12, do_sample=False
        )
        for model in (patched, expected)
    )
    assert found == wanted


# Refusals


def test_attention_weights_are_refused(patched: LlamaForCausalLM) -> None:
    with pytest.raises(PatchError, match="expected plain causal attention, got output_attentions=True"):
        generated(patched, tokens(1, 9), output_attentions=True, return_dict_in_generate=True)


def test_right_padding_is_refused(patched: LlamaForCausalLM) -> None:
    ids, mask = padded((20, 12))
    with pytest.raises(PatchError, match="masked keys between valid ones; pad on the left"):
        generated(patched, ids.flip(1), mask.flip(1))


@pytest.mark.parametrize("flash", [False, True])
def test_continuous_batching_is_refused(
    patched: LlamaForCausalLM, flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers itself refuses, and must not replace our attention by FlashAttention where that is installed."""
    module = "transformers.generation.continuous_batching.continuous_api"
    monkeypatch.setattr(f"{module}.is_flash_attn_2_available", lambda **_: flash)
    with pytest.raises(ValueError, match="surgeon is not supported for continuous batching"):
        patched.generate_batch([[1, 2, 3]])


def test_a_sliding_cache_is_refused(patched: LlamaForCausalLM) -> None:
    config = copy.deepcopy(patched.config)
    config.sliding_window = 8
    with pytest.raises(PatchError, match="expected a cache that holds every token since the first"):
        generated(patched, tokens(1, 20), past_key_values=DynamicCache(config=config))
