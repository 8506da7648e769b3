"""OpenVINO GenAI on a GGUF file, as it comes: its precisions and its quantisation of activations and cache."""

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino
import openvino_genai

from workers.engine import OnToken


class _Streamer(openvino_genai.StreamerBase):
    def __init__(self, on_token: OnToken) -> None:
        super().__init__()
        self._on_token = on_token

    def write(self, token: Any) -> Any:
        for each in token if isinstance(token, (list, tuple)) else (token,):
            self._on_token(int(each))
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


class OpenVinoPipeline:
    """A pipeline that keeps nothing of earlier prompts."""

    def __init__(self, gguf: str, threads: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = 2**31 - 1  # a prompt at once, as its default for one user does
        self._pipeline = openvino_genai.LLMPipeline(
            gguf, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads
        )
        names = ("openvino", "openvino-genai")
        self.versions: Mapping[str, str] = {name: importlib.metadata.version(name) for name in names}

    def generate(self, prompt: list[int], new_tokens: int, on_token: OnToken) -> None:
        """Continues a prompt."""
        ids = np.array([prompt], dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False
        self._pipeline.generate(inputs, config, _Streamer(on_token))


def load(gguf: str, threads: int) -> OpenVinoPipeline:
    """Reads a GGUF file."""
    return OpenVinoPipeline(gguf, threads)
