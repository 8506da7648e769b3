"""Recall: the rows that ask, at a prompt's end and in decoding, read every block whatever the topology says.

A call of attention does not show whether the prompt goes on after its tokens. Transformers' generate() knows it also
when it prefills in chunks, so a patched model's `_prefill` notes the prompt's end for the calls within it.

Source: `transformers.generation.utils`, GenerationMixin._prefill.
"""

from collections.abc import Callable
from contextvars import ContextVar
from types import MethodType
from typing import Any, cast

import torch
from transformers import GenerationConfig

from surgeon.runtime.errors import PatchError, short_repr
from surgeon.runtime.operands import number_of_tokens
from surgeon.runtime.package.manifest import Manifest
from surgeon.runtime.transformers.cache import CACHE_NAME

DENSE = "dense"
PATTERN = "pattern"

DENSE_ROWS = 128
"""The tokens at a prompt's end that ask, unless the caller says otherwise."""

_PREFILL = "_prefill"
_PROMPT_END: ContextVar[int | None] = ContextVar("surgeon_prompt_end", default=None)


def recall_of(recall: str | None, manifest: Manifest) -> str:
    """The recall that a user asked for or, if None, "pattern" for a package with routed heads, else "dense"."""
    return (PATTERN if manifest.routed else DENSE) if recall is None else recall


def rows_that_ask(recall: str, dense_rows: int) -> int:
    """The `dense_rows` of a model's attention calls under a recall: 0 where every row reads what the topology says.

    Raises:
        PatchError: the recall is unknown, or `dense_rows` is not a whole number from 1 on.
    """
    if recall not in (DENSE, PATTERN):
        raise PatchError(
            "recall", f'"{DENSE}" or "{PATTERN}"', short_repr(recall), f'leave it out for "{DENSE}", which forgets less'
        )
    rows = number_of_tokens("dense_rows", dense_rows, least=1)
    return rows if recall == DENSE else 0


def tokens_ahead(position: torch.Tensor, queries: int) -> int:
    """The prompt's tokens that come after a call of so many `queries` from `position` `[batch]` on; 0 if unknown."""
    end = None if torch.compiler.is_compiling() else _PROMPT_END.get()
    return 0 if end is None else max(0, end - int(position[0]) - queries)


def note_prompt_ends(model: torch.nn.Module) -> None:
    """Makes a model that generates note the end of each prompt that it prefills in chunks."""
    if hasattr(type(model), _PREFILL):
        setattr(model, _PREFILL, MethodType(_prefill, model))  # a bound method, which a copy of the model binds anew


def forget_prompt_ends(model: torch.nn.Module) -> None:
    """Undoes `note_prompt_ends`."""
    vars(model).pop(_PREFILL, None)


def _prefill(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    *rest: Any,
    **more: Any,
) -> Any:
    in_chunks = generation_config.prefill_chunk_size is not None
    before = _PROMPT_END.set(_prompt_end(input_ids, generation_config, model_kwargs) if in_chunks else None)
    try:
        prefill = cast(Callable[..., Any], getattr(type(model), _PREFILL))
        return prefill(model, input_ids, generation_config, model_kwargs, *rest, **more)
    finally:
        _PROMPT_END.reset(before)


def _prompt_end(
    input_ids: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> int | None:
    """The number of tokens in the cache after the prompt, by the rules of `_prefill`; None without a cache."""
    cache, mask = model_kwargs.get(CACHE_NAME), model_kwargs.get("attention_mask")
    if cache is None:
        return None
    tokens = input_ids.shape[1]
    so_far = mask.shape[1] if isinstance(mask, torch.Tensor) else getattr(generation_config, "_mask_length", -1)
    # The ids are either those of all tokens so far or of the new ones only.
    return tokens if so_far == tokens else int(cache.get_seq_length()) + tokens
