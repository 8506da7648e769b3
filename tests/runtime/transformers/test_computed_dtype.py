"""Quantised models: judged by the dtype of their queries, keys and values, and right on the kernels.

The layers here store what the usual libraries store: bitsandbytes int8 and pairs of 4-bit numbers, Transformers and
torchao eight-bit floats, GPTQ and AWQ buffers in place of weights.
"""

import copy
from typing import Any, TypeVar

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import LlamaForCausalLM

from models import Compiled, attributes, masked_model, padded, sparse_topology, tiny_llama, tokens
from surgeon.compiler import compile_package
from surgeon.runtime import Package, load, patch, serving_program, trace, unpatch
from surgeon.runtime.errors import PatchError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing` is deprecated:FutureWarning"),
]

TOLERANCE = 5e-5  # of fp32 logits whose largest are about 10
Model = TypeVar("Model", bound=torch.nn.Module)


class Int8(torch.nn.Module):
    """int8 weights with one scale; computes in the dtype of its input."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.scale = layer.weight.abs().amax().item() / 127
        self.weight = torch.nn.Parameter((layer.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


class Float8(torch.nn.Linear):
    """Eight-bit floats in a torch.nn.Linear of the library's own."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = torch.nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype))


class Packed(torch.nn.Linear):
    """Two 4-bit numbers a byte, in one column, as bitsandbytes packs them."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.scale = layer.weight.abs().amax().item() / 7
        levels = (layer.weight.detach() / self.scale).round().to(torch.int16).flatten() + 8
        self.weight = torch.nn.Parameter((levels[::2] * 16 + levels[1::2]).to(torch.uint8)[:, None], False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        levels = torch.stack((self.weight // 16, self.weight % 16), dim=-1).to(x.dtype) - 8
        return torch.nn.functional.linear(x, levels.view(self.out_features, self.in_features) * self.scale)


class Buffers(torch.nn.Module):
    """Weights in a buffer, and a dtype of its own, bf16, in which it computes whatever it is given."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features = layer.in_features
        self.register_buffer("qweight", (layer.weight.detach() * 64).round().to(torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x.bfloat16(), self.get_buffer("qweight").bfloat16() / 64)


class Broken(Int8):
    """A layer whose library does not run on this machine."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel image\nfor this device")


def quantised(model: Model, kind: Any) -> Model:
    """The model with every linear layer but the last replaced."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and name != "lm_head":
                setattr(module, name, kind(child))
    return model


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """The package "sparse" in bf16."""
    folder = tmp_path_factory.mktemp("half") / "kernels"
    return load(compile_package(sparse_topology(), folder, dtypes=("bf16",)), strict=True)


@pytest.mark.parametrize("kind", [Int8, Float8, Packed])
@torch.no_grad()
def test_a_quantised_model_is_patched(compiled: dict[str, Compiled], kind: Any) -> None:
    model = quantised(tiny_llama(), kind)
    masked = masked_model(model, compiled["sparse"].topology)
    graph = trace(model, compiled["sparse"].package, recall="pattern")
    patch(model, compiled["sparse"].package, recall="pattern")
    ids, mask = padded((70, 41))
    real = mask.bool()
    expected = masked(ids, attention_mask=mask).logits[real]
    for found in (model(ids, attention_mask=mask).logits, graph(ids, mask)):
        torch.testing.assert_close(found[real], expected, atol=TOLERANCE, rtol=0)
    unpatch(model)
    dense = model(ids, attention_mask=mask).logits[real]
    assert (dense - expected).abs().max() > 1000 * TOLERANCE


@torch.no_grad()
def test_quantised_before_or_after_is_the_same(compiled: dict[str, Compiled]) -> None:
    before, after = quantised(tiny_llama(), Int8), tiny_llama()
    for model in (before, after):
        patch(model, compiled["sparse"].package, recall="pattern")
    quantised(after, Int8)
    assert torch.equal(before(tokens(1, 70)).logits, after(tokens(1, 70)).logits)


def test_a_cache_of_a_served_program_has_the_computed_dtype(compiled: dict[str, Compiled]) -> None:
    model = quantised(tiny_llama(), Float8)
    model.model.embed_tokens.weight.requires_grad_(False)
    patch(model, compiled["sparse"].package, recall="pattern")
    program = serving_program(model)
    floats = {value.dtype for value in map(_example, program.graph.find_nodes(op="placeholder")) if value.ndim == 4}
    assert floats == {torch.float32}


def _example(node: torch.fx.Node) -> torch.Tensor:
    value: torch.Tensor = node.meta["val"]
    return value


@pytest.mark.parametrize("kind", [Int8, Float8, Packed, Buffers])
def test_the_dtype_is_that_of_keys_and_values(compiled: dict[str, Compiled], kind: Any) -> None:
    """bf16 activations over any store are refused by a package for fp32, which names an option that exists."""
    model = quantised(tiny_llama().bfloat16(), kind)
    before = attributes(model)
    state = torch.random.get_rng_state()
    message = (
        r"layers.0.self_attn.q_proj: expected queries, keys and values in torch.float32, .* got torch.bfloat16; .*"
    )
    with pytest.raises(PatchError, match=f"{message}--dtype bf16$"):
        patch(model, compiled["sparse"].package, recall="pattern")
    assert attributes(model) == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_norm_or_an_embedding_decides_where_layers_keep_their_inputs_dtype(compiled: dict[str, Compiled]) -> None:
    model = quantised(tiny_llama().bfloat16(), Int8)
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            module.float()  # as peft.prepare_model_for_kbit_training does
    patch(model, compiled["sparse"].package, recall="pattern")
    unpatch(model)
    embedding = model.get_input_embeddings()
    model.bfloat16()
    model.set_input_embeddings(torch.nn.Sequential(embedding))
    with pytest.raises(PatchError, match=r"got torch.bfloat16"):
        patch(model, compiled["sparse"].package, recall="pattern")


def test_a_layer_that_cannot_run_is_named(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    quantised(model, Broken)
    with pytest.raises(PatchError) as caught:
        patch(model, compiled["sparse"].package, recall="pattern")
    assert "self_attn.q_proj: expected a layer that takes torch.float32 on cpu, got RuntimeError: " in str(caught.value)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_eight_bit_weights_under_bf16_differ_by_rounding_alone(half: Package, compiled: dict[str, Compiled]) -> None:
    """Logits of up to 7 that differ by 0.3 from the explicit mask's: is that the kernel, or bf16?

    The same eight-bit weights are used in fp32 arithmetic, which both ways of attending must agree on closely. Each
    token's logits in bf16 are then as far from these under the explicit mask as they are on the kernels.
    """
    model = quantised(tiny_llama().bfloat16(), Float8)
    ids, mask = padded((130, 61))
    real = mask.bool()

    def logits(model: LlamaForCausalLM, package: Package) -> tuple[torch.Tensor, torch.Tensor]:
        """Those on the kernels and those under the explicit mask, one row a token."""
        masked = masked_model(model, sparse_topology())
        patch(model, package, recall="pattern")
        found, expected = (run(ids, attention_mask=mask).logits[real].float() for run in (model, masked))
        return found, expected

    exact_model = copy.deepcopy(model).float()
    found, masked = logits(model, half)
    exact_found, exact = logits(exact_model, compiled["sparse"].package)
    torch.testing.assert_close(exact_found, exact, atol=TOLERANCE, rtol=0)

    def away(logits: torch.Tensor) -> torch.Tensor:
        """The greatest error of each token."""
        return (logits - exact).abs().amax(dim=1)

    assert 0.1 < (found - masked).abs().max() < 0.6  # what was seen
    assert away(found).mean() < 1.2 * away(masked).mean()
    for share in (0.5, 0.9, 1.0):
        assert away(found).quantile(share) < 1.6 * away(masked).quantile(share)


def test_qlora(compiled: dict[str, Compiled]) -> None:
    """Adapters over 4-bit weights: the losses of the model under the explicit mask, patched before or after PEFT."""
    ids, mask = padded((70, 41))
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)}

    def adapted(model: LlamaForCausalLM) -> Any:
        torch.manual_seed(0)
        ready = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        return get_peft_model(ready, LoraConfig(r=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]))

    def losses(adapted: Any) -> list[float]:
        optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=2e-2)
        found = []
        for _ in range(4):
            loss = adapted(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    first, wrapped_first = (quantised(tiny_llama(), Packed) for _ in range(2))
    expected = losses(adapted(masked_model(first, compiled["sparse"].topology)))
    patch(first, compiled["sparse"].package, recall="pattern")
    assert losses(adapted(first)) == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0] - 0.3
    wrapper = adapted(wrapped_first)
    patch(wrapper.get_base_model(), compiled["sparse"].package, recall="pattern")
    assert losses(wrapper) == pytest.approx(expected, abs=1e-4)


def linears(model: torch.nn.Module) -> list[str]:
    return [
        name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and "lm_head" not in name
    ]


@torch.no_grad()
def test_torchao(half: Package) -> None:
    """Torchao's own float8 weights, where it is installed."""
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny_llama().bfloat16()
    torchao.quantize_(model, torchao.Float8WeightOnlyConfig(), filter_fn=lambda _, name: name in linears(model))
    masked = masked_model(model, sparse_topology())
    patch(model, half, recall="pattern")
    ids = tokens(1, 130)
    found, expected = (run(ids).logits.float() for run in (model, masked))
    assert (found - expected).abs().mean() < 0.15


@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_bitsandbytes(compiled: dict[str, Compiled], bits: int) -> None:
    """Bitsandbytes' own layers on the CPU, where it is installed."""
    nn = pytest.importorskip("bitsandbytes").nn

    def layer(linear: torch.nn.Linear) -> Any:
        kind = nn.Linear4bit if bits == 4 else nn.Linear8bitLt
        options = {"compute_dtype": torch.float32} if bits == 4 else {"has_fp16_weights": False}
        made = kind(linear.in_features, linear.out_features, bias=False, **options)
        made.load_state_dict(linear.state_dict())
        return made.to("cpu")

    model = quantised(tiny_llama(), layer)
    masked = masked_model(model, compiled["sparse"].topology)
    patch(model, compiled["sparse"].package, recall="pattern")
    torch.testing.assert_close(model(tokens(1, 70)).logits, masked(tokens(1, 70)).logits, atol=TOLERANCE, rtol=0)
