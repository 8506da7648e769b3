"""Engines of vLLM in this process, on a random model and its packages."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from models import tiny_config, tiny_llama, tokens
from surgeon.compiler import compile_package
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime import load, patch, unpatch, weights_id
from topologies import balanced_tree, build, head, window_head

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""vLLM's settings, read while it is imported: all in one process, on its threads, with a small cache, unwatched."""

LONGEST = 1024
NEW_TOKENS = 20


@dataclass
class World:
    """The model's folder, the model, and packages for it by name."""

    folder: Path
    model: LlamaForCausalLM
    packages: dict[str, Path] = field(default_factory=dict)

    def expected(
        self, prompts: Sequence[list[int]], package: str | None, recall: str = "dense", new_tokens: int = NEW_TOKENS
    ) -> list[list[int]]:
        """The tokens that the model generates greedily, patched with a package, one prompt at a time."""
        if package is not None:
            patch(self.model, load(self.packages[package], strict=True), recall=recall)
        try:
            return [self._generated(prompt, new_tokens) for prompt in prompts]
        finally:
            if package is not None:
                unpatch(self.model)

    def _generated(self, prompt: list[int], new_tokens: int) -> list[int]:
        with torch.no_grad():
            ids = self.model.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False)
        return list(map(int, ids[0, len(prompt) :]))


def make_world(folder: Path) -> World:
    """A random model of four layers in a folder, and packages of several topologies for it."""
    model = tiny_llama(tiny_config(num_hidden_layers=4, max_position_embeddings=LONGEST, pad_token_id=None))
    model.save_pretrained(folder / "model")
    made = World(folder / "model", model)
    learned = mixed_topology()
    topologies = {
        "mixed": mixed_topology(),
        "some": mixed_topology(uncovered=(1, 2)),
        "learned": replace(learned, model=replace(learned.model, weights_sha256=weights_id(model))),
        "routed": routed_topology(),
        **{beyond: mixed_topology(num_blocks=16, beyond=beyond) for beyond in ("window", "dense", "error")},
    }
    for name, topology in topologies.items():
        made.packages[name] = compile_package(topology, folder / name, dtypes=("fp32",))
    return made


def mixed_topology(uncovered: Sequence[int] = (), **changes: Any) -> Topology:
    """Clusters, windows and a dense head in four layers, of blocks of 32 over 1,024 tokens."""
    layer = [head(window=2), head(sink=1), head(0, 2.0, 1, 1), head(window=4)]
    last = [{"dense": True}, head(0, 1.0), head(window=3), head()]
    layers = [[] if index in uncovered else heads for index, heads in enumerate([layer, layer[::-1], layer, last])]
    shape: Any = {"num_kv_heads": 2, "head_dim": 32, "block_size": 32, "num_blocks": 32}
    shape |= changes
    return build(layers, [{"linkage": balanced_tree(shape["num_blocks"])}], **shape)


def routed_topology() -> Topology:
    """Heads that choose blocks by content in three of four layers."""
    choosing = [window_head(1, 2, route=3), window_head(1, 1), window_head(0, 2, route=5), window_head(1, 2, route=1)]
    layers = [choosing, [window_head(1, 2)] * 4, choosing[::-1], choosing]
    return build(layers, num_kv_heads=2, head_dim=32, block_size=32, num_blocks=32)


class Engine:
    """An engine of vLLM on the world's model."""

    def __init__(self, world: World, package: str | None, recall: str | None = None, **options: Any) -> None:
        from vllm import LLM

        config = {} if package is None else {"surgeon_package": str(world.packages[package])}
        settings = {
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": LONGEST,
            "block_size": 64,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
            "additional_config": config | ({} if recall is None else {"surgeon_recall": recall}),
        }
        self.llm: Any = LLM(str(world.folder), **(settings | options))
        self.cached: list[int] = []

    def generate(self, prompts: Sequence[list[int]], new_tokens: int = NEW_TOKENS) -> list[list[int]]:
        """The tokens that the engine generates greedily for prompts that arrive together."""
        from vllm import SamplingParams

        settings = SamplingParams(temperature=0, max_tokens=new_tokens, detokenize=False, ignore_eos=True)
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        done = self.llm.generate(given, settings, use_tqdm=False)
        self.cached = [request.num_cached_tokens for request in done]
        return [list(request.outputs[0].token_ids) for request in done]

    @property
    def free_pages(self) -> int:
        """The pages that no request holds."""
        core = self.llm.llm_engine.engine_core.engine_core
        return int(core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def count(self, metric: str) -> int:
        return int(sum(each.value for each in self.llm.get_metrics() if each.name == metric))

    @property
    def layers(self) -> dict[str, Any]:
        """The engine's attention layers, by name."""
        runner = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        return dict(runner.compilation_config.static_forward_context)


def prompts_of(*lengths: int) -> list[list[int]]:
    return [list(map(int, tokens(1, length, seed=length)[0])) for length in lengths]
