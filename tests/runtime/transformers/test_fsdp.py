"""A patched model under FSDP2 gives the logits, tokens and gradients that it gives whole, whichever is done first.

One process stands for all: what FSDP2 does to modules and weights, it does there too.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from models import Compiled, padded, tiny_llama
from surgeon.runtime import fingerprint, load, patch, unpatch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded(model: LlamaForCausalLM, precision: MixedPrecisionPolicy | None = None) -> LlamaForCausalLM:
    mesh = init_device_mesh("cpu", (1,))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=precision or MixedPrecisionPolicy())
    return model


@pytest.mark.parametrize("first", ["patch", "shard"])
def test_logits_tokens_and_gradients(compiled: dict[str, Compiled], first: str) -> None:
    package = compiled["sparse"].package
    whole, model = tiny_llama(), tiny_llama()
    patch(whole, package, recall="pattern")
    for step in ("patch", "shard") if first == "patch" else ("shard", "patch"):
        patch(model, package, recall="pattern") if step == "patch" else sharded(model)
    assert isinstance(model.model.layers[0].self_attn.q_proj.weight, DTensor)
    assert fingerprint(model) == fingerprint(whole)
    ids, mask = padded((50, 33))
    losses = []
    for each in (whole, model):
        output = each(ids, attention_mask=mask, labels=ids)
        output.loss.backward()
        losses.append(output.loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for expected, found in zip(whole.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found.grad.full_tensor(), expected.grad, atol=1e-6, rtol=0)
    how = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(model.generate(ids, **how), whole.generate(ids, **how))
    unpatch(model)


@torch.no_grad()
def test_mixed_precision(tmp_path: Path, compiled: dict[str, Compiled]) -> None:
    """Stored in fp32 and computed in bf16, here in fp32 kernels, as a package that is not strict allows."""
    package = load(compiled["sparse"].package._files.folder)
    whole, model = tiny_llama().bfloat16(), tiny_llama()
    for each in (whole, sharded(model, MixedPrecisionPolicy(param_dtype=torch.bfloat16))):
        patch(each, package, recall="pattern")
    ids, mask = padded((50, 33))
    found, expected = (each(ids, attention_mask=mask).logits[mask.bool()] for each in (model, whole))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.3, rtol=0)
