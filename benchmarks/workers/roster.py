"""Who is timed: the worker of each, its settings, and what its linear layers and its attention compute with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from measure.vllm_server import SETTINGS as VLLM_SETTINGS
from surgeon.compiler import compile_package, read_topology
from surgeon.compiler.system.cache import cache_folder

TOPOLOGIES = Path(__file__).parents[1] / "topologies"
FOR_ANSWERS = {
    2048: "smollm2-135m-25-answers",
    4096: "smollm2-135m-24-answers-4096",
    8192: "smollm2-135m-23-answers-8192",
}
"""The topology of about a quarter of the blocks by the length that it is for."""

_VLLM = VLLM_SETTINGS | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}


@dataclass(frozen=True)
class Peer:
    """An engine with its settings. `title` and `linear` (the numbers in linear layers) are for tables."""

    title: str
    linear: str
    module: str
    settings: Mapping[str, object]
    in_vllm: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


def roster(folder: Path, gguf: Path, threads: int, longest: int) -> dict[str, Peer]:
    """All of them by name, over one model: its folder and its GGUF, from which the folder was made.

    The first is the one that the others' answers are compared with.
    """
    packages = {
        str(length): str(compile_package(read_topology(TOPOLOGIES / f"{name}.json"), cache_folder() / "kernels" / name))
        for length, name in FOR_ANSWERS.items()
    }
    model: dict[str, object] = {"folder": str(folder), "threads": threads, "longest": longest}
    ours: dict[str, object] = model | {"packages": packages}
    from_gguf: dict[str, object] = {"gguf": str(gguf), "threads": threads}

    def transformers(title: str, settings: dict[str, object], dtype: str, linear: str = "", **more: object) -> Peer:
        named = settings | {"dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype]} | more
        return Peer(title, linear or dtype, "workers.transformers_model", named)

    def vllm(dtype: str, linear: str) -> Peer:
        settings: dict[str, object] = {"folder": str(folder), "dtype": dtype, "longest": longest}
        return Peer("vLLM", linear, "workers.vllm_engine", settings, in_vllm=True, environment=_VLLM)

    dense, compiled = "Transformers, SDPA", "Transformers, SDPA, compiled"
    int8 = "int8, inputs int8 (torchao)"
    return {
        "sdpa-fp32": transformers(dense, model, "fp32"),
        "sdpa-fp32-compiled": transformers(compiled, model, "fp32", compiled=True),
        "sdpa-bf16": transformers(dense, model, "bf16"),
        "sdpa-bf16-compiled": transformers(compiled, model, "bf16", compiled=True),
        "vllm-fp32": vllm("float32", "fp32"),
        "vllm-bf16": vllm("bfloat16", "bf16"),
        "openvino": Peer("OpenVINO GenAI", "4 bit (GGUF Q4_1)", "workers.openvino_pipeline", from_gguf),
        "llama-cpp": Peer(
            "llama.cpp", "4 bit (GGUF Q4_1)", "workers.llama_cpp_model", from_gguf | {"longest": longest}
        ),
        "surgeon-fp32": transformers("Surgeon", ours, "fp32"),
        "surgeon-bf16": transformers("Surgeon", ours, "bf16"),
        "surgeon-bf16-compiled": transformers("Surgeon, compiled", ours, "bf16", compiled=True),
        "surgeon-int8": transformers("Surgeon", ours, "bf16", int8, int8=True),
        "surgeon-int8-compiled": transformers("Surgeon, compiled", ours, "bf16", int8, compiled=True, int8=True),
    }
