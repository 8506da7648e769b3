"""A patched model's config: what others write to it persists, and models made from it are not patched."""

import copy
import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from models import Compiled, padded, tiny_config, tiny_llama
from surgeon.runtime import SurgeonCache, patch, unpatch
from surgeon.runtime.errors import PatchError
from surgeon.runtime.transformers.config_view import close_view, is_view, open_view

pytestmark = pytest.mark.usefixtures("no_gradients")


def test_a_view_says_what_its_config_says_but_for_the_attention() -> None:
    config = tiny_config()
    config._attn_implementation = "eager"
    view = open_view(config, "surgeon")
    assert isinstance(view, LlamaConfig)
    assert type(view).__name__ == "LlamaConfig"
    assert (view._attn_implementation, config._attn_implementation) == ("surgeon", "eager")
    assert view.to_dict() == config.to_dict()
    view.vocab_size = 105
    config.pad_token_id = 104
    assert (config.vocab_size, view.pad_token_id) == (105, 104)
    close_view(view)
    assert view._attn_implementation == "eager"
    view._attn_implementation = "sdpa"
    assert config._attn_implementation == "sdpa"
    assert (is_view(view), is_view(config), is_view(None)) == (True, False, False)


def test_copies_of_a_view() -> None:
    config = tiny_config()
    view = open_view(config, "surgeon")
    deep = copy.deepcopy(view)
    deep.vocab_size = 7
    close_view(view)
    assert (deep._attn_implementation, config.vocab_size) == ("surgeon", tiny_config().vocab_size)
    for plain in (copy.copy(open_view(config, "surgeon")), pickle.loads(pickle.dumps(open_view(config, "surgeon")))):
        assert type(plain) is LlamaConfig
        assert plain._attn_implementation == config._attn_implementation
    assert type(copy.deepcopy(view)) is LlamaConfig  # which is closed


def test_a_fresh_config_of_a_views_type_is_a_plain_one() -> None:
    config = tiny_config()
    view = open_view(config, "surgeon")
    fresh = type(view)(vocab_size=7)
    fresh._attn_implementation = "eager"
    assert (type(fresh), fresh._attn_implementation, fresh.vocab_size) == (LlamaConfig, "eager", 7)
    assert (view._attn_implementation, view.vocab_size) == ("surgeon", config.vocab_size)


def test_another_attention_for_a_patched_model_is_refused(
    model: LlamaForCausalLM, compiled: dict[str, Compiled]
) -> None:
    patch(model, compiled["sparse"].package, recall="pattern")
    with pytest.raises(
        PatchError, match=r"attn_implementation: expected 'surgeon'.*got 'eager'; call unpatch\(model\) first"
    ):
        model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "surgeon"


def test_what_is_written_while_patched_stays(
    model: LlamaForCausalLM, compiled: dict[str, Compiled], tmp_path: Path
) -> None:
    patch(model, compiled["sparse"].package, recall="pattern")
    model.resize_token_embeddings(105, mean_resizing=False)
    model.config.pad_token_id = 104
    model.save_pretrained(tmp_path / "patched")
    assert "surgeon" not in (tmp_path / "patched" / "config.json").read_text()
    unpatch(model)
    assert (model.config.vocab_size, model.config.pad_token_id) == (105, 104)
    model.save_pretrained(tmp_path / "unpatched")
    for name in ("patched", "unpatched"):
        assert json.loads((tmp_path / name / "config.json").read_text())["vocab_size"] == 105
        again = LlamaForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [LlamaForCausalLM, AutoModelForCausalLM.from_config], ids=["class", "auto"])
def test_a_model_made_from_the_config_has_an_attention_of_its_own(
    make: type[LlamaForCausalLM], implementation: str, compiled: dict[str, Compiled]
) -> None:
    model = tiny_llama()
    model.set_attn_implementation(implementation)
    ids, mask = padded((70, 41, 5))
    dense = model(ids, attention_mask=mask).logits[mask.bool()]
    patch(model, compiled["sparse"].package, recall="pattern")
    other = make(model.config).eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(ids, attention_mask=mask).logits[mask.bool()], dense, atol=2e-5, rtol=0)
    unpatch(model)
    assert model.config._attn_implementation == implementation
    torch.testing.assert_close(other(ids, attention_mask=mask).logits[mask.bool()], dense, atol=2e-5, rtol=0)


@pytest.mark.parametrize("inner", [False, True], ids=["the wrapper", "the model in it"])
def test_a_model_that_was_wrapped_while_patched_is_unpatched(compiled: dict[str, Compiled], inner: bool) -> None:
    model = tiny_llama()
    ids, mask = padded((70, 41, 5))
    dense = model(ids, attention_mask=mask).logits
    config = model.config
    patch(model, compiled["sparse"].package, recall="pattern")
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    unpatch(model if inner else wrapped)
    assert model.config is config
    assert torch.equal(wrapped(ids, attention_mask=mask).logits, dense)
    with pytest.raises(PatchError, match="expected a patched model, got one that is not"):
        unpatch(wrapped)
    patch(model, compiled["sparse"].package, recall="pattern")
    assert not torch.allclose(wrapped(ids, attention_mask=mask).logits, dense, atol=0.1)


def test_what_holds_kernels_says_that_it_cannot_be_pickled(
    model: LlamaForCausalLM, compiled: dict[str, Compiled]
) -> None:
    package = compiled["sparse"].package
    patch(model, package, recall="pattern")
    for held in (model, SurgeonCache(package), package):
        for save in (pickle.dumps, lambda thing: torch.save(thing, io.BytesIO())):
            with pytest.raises(PatchError, match=r"pickle: expected .* no loaded kernels.*after unpatch\(model\)"):
                save(held)
    unpatch(model)
    again: LlamaForCausalLM = pickle.loads(pickle.dumps(model))
    ids, mask = padded((9, 4))
    assert torch.equal(again(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
