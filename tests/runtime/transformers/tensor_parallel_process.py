"""The script of test_tensor_parallel.py's processes: patches tensor-parallel models and saves their results.

Arguments: a folder with models and packages, and one for the results. A model in "refused" is loaded with each of the
plans there and must not be patched.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from models import padded
from surgeon.runtime import fingerprint, load, patch, trace, unpatch, weights_id
from surgeon.runtime.errors import PatchError

WHOLE_KEYS = {f"model.layers.*.self_attn.{name}": "replicate" for name in ("k_proj", "v_proj")}
"""A plan that splits the queries and leaves keys and values whole in every process."""


def split_model(folder: Path, plan: str | dict[str, str] = "auto") -> Any:
    config = DistributedConfig(tp_size=int(os.environ["WORLD_SIZE"]), tp_plan=plan)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=config).eval()


def answers(folder: Path) -> dict[str, Any]:
    """Logits and greedy tokens of a patched model, and whether unpatching restores it."""
    ids, mask = padded((70, 41, 5))
    prompt, prompt_mask = padded((50, 33, 3))
    model = split_model(folder / "model")
    before = model(ids, attention_mask=mask).logits
    package = load(folder / "package", strict=True)
    patch(model, package, recall="pattern")
    found = {
        "heads": [module._surgeon_site.package.kv_heads for module in attentions(model)],
        "logits": model(ids, attention_mask=mask).logits,
        "fingerprint": fingerprint(model),
        "weights_id": weights_id(model),
        "trace": refusal(lambda: trace(model, package, recall="pattern")),
    }
    for cache in (None, "static"):
        found[f"generated {cache}"] = model.generate(
            prompt, attention_mask=prompt_mask, max_new_tokens=24, do_sample=False, cache_implementation=cache
        )
    unpatch(model)
    return found | {"same again": torch.equal(model(ids, attention_mask=mask).logits, before)}


def fused(folder: Path) -> dict[str, Any]:
    """The results of a patched model whose queries, keys and values come from one projection."""
    model = split_model(folder / "fused")
    patch(model, load(folder / "fused-package"), recall="pattern")
    ids, mask = padded((70, 41, 5))
    heads = [module._surgeon_site.package.kv_heads for module in attentions(model)]
    return {"fused heads": heads, "fused logits": model(ids, attention_mask=mask).logits}


def attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def refusal(action: Any) -> str:
    try:
        action()
    except PatchError as error:
        return str(error)
    return "nothing was refused"


def refused(folder: Path, model: str, plan: str | dict[str, str]) -> str:
    split = split_model(folder / model, plan)
    config = split.config
    text = refusal(lambda: patch(split, load(folder / f"{model}-package"), recall="pattern"))
    untouched = split.config is config and not any(hasattr(module, "_surgeon_site") for module in attentions(split))
    return text if untouched else f"{text}, but something was touched"


@torch.no_grad()
def main(folder: Path, out: Path) -> None:
    found = answers(folder) | fused(folder)
    found["one head"] = refused(folder, "one-head", "auto")
    found["three heads"] = refused(folder, "three-heads", "auto")
    found["replicated"] = refused(folder, "three-heads", WHOLE_KEYS)
    torch.save(found, out / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
