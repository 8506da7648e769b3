"""vLLM's cache without the pages that no later row reads: a spec for the layers of a group, and its manager.

Source: `vllm.v1.kv_cache_spec_registry`; `vllm.v1.core.single_type_kv_cache_manager`, FullAttentionManager.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from surgeon.runtime.vllm.pages.needs import Readers, unread_pages
from surgeon.runtime.vllm.serving import serving


@dataclass(frozen=True, kw_only=True)
class PatternSpec(FullAttentionSpec):
    """The cache of a layer whose last readers are known, in blocks of `pattern_block` tokens; equal within a group."""

    readers: Readers
    pattern_block: int

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """Merges equal specs, and no others, so that vLLM makes the groups that the specs are for.

        Raises:
            AssertionError: they are not equal, which is how vLLM asks.
        """
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("layers of different groups")
        return specs[0]

    def is_uniform_with_collection(self, kv_cache_specs: Mapping[str, Any]) -> bool:
        """True if all specs are of this one's group."""
        return all(spec == self for spec in kv_cache_specs.values())


class PatternManager(FullAttentionManager):
    """Manages the pages of a group, and frees those that no later row reads."""

    def __init__(self, kv_cache_spec: PatternSpec, **options: Any) -> None:
        super().__init__(kv_cache_spec, **options)
        self._rows: dict[str, int] = {}  # of each request's next token, when pages were last freed

    def remove_skipped_blocks(self, request_id: str, processed_computed_tokens: int, *_: Any, **__: Any) -> None:
        """Frees a request's pages that no row reads from the one of its next token on."""
        spec, blocks = self.kv_cache_spec, self.req_to_blocks.get(request_id)
        row = processed_computed_tokens // spec.pattern_block
        if not blocks or self._rows.get(request_id) == row:
            return
        if len(self._rows) > 2 * len(self.req_to_blocks) + 16:
            self._rows = {known: self._rows[known] for known in self._rows if known in self.req_to_blocks}
        self._rows[request_id] = row
        computed = min(len(blocks), processed_computed_tokens // self.block_size)
        unread = unread_pages(spec.readers, spec.block_size // spec.pattern_block, row, computed)
        freed = [blocks[page] for page in unread if not blocks[page].is_null]
        for page in unread:
            blocks[page] = self._null_block
        if freed:
            self.block_pool.free_blocks(reversed(freed))


def register_spec() -> None:
    """Makes the spec known to vLLM in this process."""
    KVCacheSpecRegistry._ensure_registered()  # it registers vLLM's own only where nothing is registered yet
    KVCacheSpecRegistry.register(PatternSpec, PatternManager, uniform_type_base_spec=PatternSpec)


def by_need(get_kv_cache_spec: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's `Attention.get_kv_cache_spec`, with the specs of pages that may go where a server frees any."""

    def spec_of(layer: Any, config: Any) -> Any:
        spec = get_kv_cache_spec(layer, config)
        found = serving(config)
        group = None if found is None else found.group_of(extract_layer_index(layer.layer_name), config)
        if found is None or group is None or type(spec) is not FullAttentionSpec:
            return spec
        known = {field.name: getattr(spec, field.name) for field in fields(FullAttentionSpec)}
        return PatternSpec(**known, readers=group.readers, pattern_block=found.package.manifest.block_size)

    return spec_of
