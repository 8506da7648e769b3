"""LoRA on a patched model: the losses of the model under the explicit mask, step by step, over frozen weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from models import Compiled, masked_model, padded, tiny_llama
from surgeon.runtime import fingerprint, patch
from surgeon.runtime.kernels.run import LayerKernels

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing` is deprecated:FutureWarning"),
]

STEPS = 10
TOLERANCE = 1e-4  # of losses that fall by more than 1 in these steps


@pytest.fixture
def models(compiled: dict[str, Compiled]) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """The patched model and the reference that it must equal."""
    model = tiny_llama()
    masked = masked_model(model, compiled["sparse"].topology)
    patch(model, compiled["sparse"].package, recall="pattern")
    return model, masked


def with_lora(model: LlamaForCausalLM) -> Any:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))


def batch(right: bool = False) -> dict[str, torch.Tensor]:
    """Two sequences, padded on the left, or on the right as most collators do."""
    ids, mask = padded((70, 41))
    if right:
        ids, mask = ids.flip(1), mask.flip(1)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)}


def losses(adapted: Any, right: bool) -> list[float]:
    """The losses of several steps on one batch."""
    adapted.train()
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=2e-2)
    found = []
    for _ in range(STEPS):
        loss = adapted(**batch(right)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("right", [False, True], ids=["padded left", "padded right"])
def test_ten_steps_of_lora(models: tuple[LlamaForCausalLM, LlamaForCausalLM], right: bool) -> None:
    patched, masked = models
    before, dense = fingerprint(patched), tiny_llama()
    adapted = with_lora(patched)
    found = losses(adapted, right)
    assert found[-1] < found[0] - 1
    assert found == pytest.approx(losses(with_lora(masked), right), abs=TOLERANCE)
    assert abs(found[0] - dense(**batch(right)).loss.item()) > 100 * TOLERANCE
    assert fingerprint(adapted.unload()) == before


class _Recorded(Trainer):
    """Keeps the loss of every step in full precision, since the log rounds it."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.losses: list[float] = []

    def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
        loss = super().training_step(*arguments, **named)
        self.losses.append(loss.item())
        return loss


def trained(model: LlamaForCausalLM, folder: Path, checkpointing: bool) -> list[float]:
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=2e-2,
        gradient_checkpointing=checkpointing,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to=[],
    )
    rows = [{name: tensor[row] for name, tensor in batch().items()} for row in range(2)]
    trainer = _Recorded(with_lora(model), settings, train_dataset=rows)
    trainer.train()
    return trainer.losses


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
def test_trainer(
    models: tuple[LlamaForCausalLM, LlamaForCausalLM],
    tmp_path: Path,
    checkpointing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    run = LayerKernels.run

    def counted(kernels: LayerKernels, layer: int, *arguments: Any) -> torch.Tensor:
        calls.append(layer)
        return run(kernels, layer, *arguments)

    monkeypatch.setattr(LayerKernels, "run", counted)
    monkeypatch.setattr(LayerKernels, "direct", lambda *_: None)  # which would not be seen
    patched, masked = models
    found = trained(patched, tmp_path, checkpointing)
    assert len(calls) == STEPS * 3 * (2 if checkpointing else 1)  # checkpointed layers are computed twice
    assert found[-1] < found[0] - 1
    assert found == pytest.approx(trained(masked, tmp_path, checkpointing), abs=TOLERANCE)
