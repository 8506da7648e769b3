"""A layer of a SurgeonCache, and the stand-in that it hands the attention function for keys and values.

The places of blocks depend on the padding, which Transformers tells the attention function but not the cache. So a
layer's `update` only wraps the new keys and values; the attention function hands them back to `PagedLayer.attend`,
which stores them and attends over what is held. Any other use of the wrapped states as keys and values is an error.

Source: `transformers.cache_utils`, CacheLayerMixin.
"""

import logging
from functools import cache
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from surgeon.runtime.cache.block_pool import BlockPool
from surgeon.runtime.cache.liveness import Liveness
from surgeon.runtime.errors import PatchError
from surgeon.runtime.loading import Package
from surgeon.runtime.operands import Operands
from surgeon.runtime.ops import attention as ops
from surgeon.runtime.ops.plain_inference import is_transformed

_NO_GRAPH = "a SurgeonCache drops blocks as it goes: give a DynamicCache or a StaticCache for one graph"
"""The reason for a break in the graph at each layer of a compiled model."""

_LOG = logging.getLogger("surgeon")


class PagedStates(torch.Tensor):
    """New keys and values on their way to `layer.attend`, with the shape that all keys so far would have.

    As a tensor it is empty: every torch function that receives it raises a PatchError, so that no other attention can
    take it for keys.
    """

    layer: "PagedLayer"
    new_keys: torch.Tensor
    new_values: torch.Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(cls, layer: "PagedLayer", keys: torch.Tensor, values: torch.Tensor) -> "PagedStates":
        """Wraps new keys and values `[batch, KV heads, new tokens, head_dim]` of a layer."""
        batch, kv_heads, new_tokens, head_dim = keys.shape
        shape = (batch, kv_heads, layer.get_seq_length() + new_tokens, head_dim)
        states: PagedStates = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=keys.dtype, device=keys.device)
        states.layer, states.new_keys, states.new_values = layer, keys, values
        return states

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PagedStates(layer {self.layer.layer}, {list(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, function: object, *_: Any) -> Any:
        """Refuses every torch function.

        Raises:
            PatchError: always.
        """
        raise PatchError(
            "past_key_values",
            "a SurgeonCache in a model that is patched with its package",
            f"one whose keys and values another attention reads ({function})",
            "call surgeon.runtime.patch(model, package) first, or use a DynamicCache",
        )


class PagedLayer(CacheLayerMixin):
    """One layer of a SurgeonCache.

    Unlike in other cache layers, `keys` and `values` are None, since a pool of blocks holds the states. While
    `record_past` is true, nothing is dropped until `crop` tells from which token the model goes on; under a model's
    dense recall nothing is dropped at all.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, package: Package, layer: int, liveness: Liveness) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.package = package
        self.layer = layer
        self.record_past = False
        self._keeps_all = False  # from the first call on whose rows ask for everything
        self._liveness = liveness
        self._kv_heads = package.kv_heads  # those that are cached; in a tensor-parallel model, this process's own
        self._block_size = package.manifest.block_size
        self._length = 0  # tokens so far, padding included
        self._cache_leftpad: list[int] = []  # per sequence
        self._rows: list[int] = []  # of each sequence's next token, when blocks were last dropped
        self._pool: BlockPool | None = None

    @torch.compiler.disable(reason=_NO_GRAPH)  # type: ignore[untyped-decorator]
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[PagedStates, PagedStates]:
        """Wraps the new keys and values `[batch, KV heads, tokens, head_dim]`, for our attention function only.

        Raises:
            PatchError: keys and values are not on the CPU, or a transform of torch.func is active.
        """
        if is_transformed():  # what the transform wraps would outlive it in the pool
            raise PatchError(
                f"SurgeonCache: layer {self.layer}",
                "a call outside of torch.func's transforms",
                "one inside of grad or vmap",
                "use a DynamicCache there, or none",
            )
        if key_states.device.type != "cpu":
            raise PatchError(
                f"SurgeonCache: layer {self.layer}",
                "keys and values on the CPU",
                f"those on {key_states.device}",
                "use a DynamicCache there",
            )
        if torch.is_autocast_enabled("cpu"):  # one dtype for both, as attention sees them under autocast
            dtype = torch.get_autocast_dtype("cpu")
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        states = PagedStates(self, key_states, value_states)
        return states, states

    @torch.compiler.disable(reason=_NO_GRAPH)  # type: ignore[untyped-decorator]
    def attend(self, operands: Operands, package: Package) -> torch.Tensor:
        """Stores the new tokens, attends over them and the held blocks, and drops the blocks that no later row reads.

        k and v are those of the new tokens, and `position` and `cache_leftpad` are given; the result is that of
        `Package.attention`.

        Raises:
            PatchError: the tokens are not the next ones, or the padding has changed.
        """
        query, keys, values, position, cache_leftpad, *_ = operands
        assert position is not None
        assert cache_leftpad is not None
        first = self._begin(keys, position, cache_leftpad, package)
        if operands.dense_rows and not self._keeps_all:
            self._keeps_all = True
            _say_once(package.id)
        operands = operands._replace(q=query.to(keys.dtype))
        new_keys, new_values = keys.detach(), values.detach()
        length = self._length + keys.shape[2]
        if self._pool is None:
            attended = ops.attention(package.kernels, self.layer, operands)
            routed = self.layer in package.manifest.routed
            self._pool = BlockPool(self._block_size, keys, values, routed)
            wanted = None if self.record_past else self._live(length)
            self._pool.write(first, new_keys, new_values, wanted)
        else:
            self._pool.write(first, new_keys, new_values)
            operands = operands._replace(k=self._pool.keys, v=self._pool.values)
            attended = ops.attention_paged(package.kernels, self.layer, operands, self._pool.table, self._pool.nodes)
        self._length = length
        if not (self.record_past or self._keeps_all):
            self._drop()
        return attended

    def _begin(
        self, keys: torch.Tensor, position: torch.Tensor, cache_leftpad: torch.Tensor, package: Package
    ) -> torch.Tensor:
        """The place of each sequence's first new token, counted from its first valid key."""
        where = f"SurgeonCache: layer {self.layer}"
        self._kv_heads = package.kv_heads
        if package.manifest.topology_sha256 != self.package.manifest.topology_sha256:
            raise PatchError(
                where,
                f"a model patched with its package, of topology {self.package.manifest.topology_sha256[:12]}",
                f"topology {package.manifest.topology_sha256[:12]}",
                "make the cache from the package that the model is patched with",
            )
        if set(position.tolist()) != {self._length}:
            raise PatchError(
                where,
                f"tokens from position {self._length} on, as many as the cache has",
                f"positions {position.tolist()}",
                "pass each token once, in order",
            )
        given = cache_leftpad.tolist()
        if self._pool is not None:
            if len(given) != len(self._cache_leftpad):
                raise PatchError(where, f"{len(self._cache_leftpad)} sequences", str(len(given)), "keep the batch")
            for before, now in zip(self._cache_leftpad, given, strict=True):
                if now != before and min(now, before) < self._length:  # a stored token would be padding, or the reverse
                    raise PatchError(
                        where,
                        f"the padding of the first call, {self._cache_leftpad} tokens",
                        f"{given}",
                        "pass the attention_mask of all tokens, grown by ones",
                    )
            if keys.dtype != self._pool.keys.dtype:
                raise PatchError(where, f"{self._pool.keys.dtype}, as before", str(keys.dtype), "keep the dtype")
        self._cache_leftpad = given
        return position - cache_leftpad

    def check_crop(self, tokens_to_remove: int) -> None:
        """Checks that `crop` would leave everything that the next token reads.

        Raises:
            PatchError: a block that the next token reads has been dropped, or the number is positive.
        """
        where = "SurgeonCache.crop"
        if tokens_to_remove > 0:
            raise PatchError(
                where, "minus the number of tokens to remove", f"{tokens_to_remove}", "pass it as negative"
            )
        if self._pool is None or tokens_to_remove == 0:
            return
        length = self._length + tokens_to_remove
        live = self._live(length)
        if bool((live & (self._pool.table[:, :, : live.shape[2]] < 0)).any()):
            raise PatchError(
                where,
                f"to go back to a token that reads no block that layer {self.layer} has dropped",
                f"token {max(0, length)} of {self._length}",
                "call activate_past_recording() before the tokens that may be removed, or reset() and start again",
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens, and all blocks that no later row reads, including recorded ones.

        Raises:
            PatchError: as `check_crop`.
        """
        self.check_crop(tokens_to_remove)
        self._length = max(0, self._length + tokens_to_remove)
        if self._length == 0:
            self.reset()
        elif self._pool is not None:
            self._pool.keep(self._live(self._length))
            self._pool.crop_nodes(self._length - torch.tensor(self._cache_leftpad, device="cpu"))
            self._rows = self._rows_at(self._length)

    def reset(self) -> None:
        """Forgets all tokens."""
        self._length, self._cache_leftpad, self._rows, self._pool, self._keeps_all = 0, [], [], None, False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Does nothing: the first call of `attend` makes the pool."""

    def get_seq_length(self) -> int:
        """The number of tokens so far, including dropped ones and padding."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of keys that a mask is for, and the first of them: all keys, since the kernel knows its own."""
        return self._length + query_length, 0

    def get_max_length(self) -> int:
        """Returns -1: there is no limit."""
        return -1

    def activate_past_recording(self) -> None:
        """Stops dropping blocks from now on, except in `crop`."""
        self.record_past = True

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Replaces sequence i by the former sequence `beam_idx[i]`."""
        if self._pool is not None and beam_idx.tolist() != list(range(len(self._cache_leftpad))):
            self._pool.select(beam_idx)
            self._cache_leftpad = [self._cache_leftpad[index] for index in beam_idx.tolist()]
            self._rows = []

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps only these sequences."""
        self.reorder_cache(torch.arange(len(self._cache_leftpad), device="cpu")[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence this many times."""
        self.reorder_cache(torch.arange(len(self._cache_leftpad), device="cpu").repeat_interleave(repeats))

    def offload(self) -> None:
        """Does nothing: the pool is on the CPU."""

    def prefetch(self) -> None:
        """Does nothing: the pool is on the CPU."""

    def kept_bytes(self) -> int:
        """See `SurgeonCache.kept_bytes`."""
        return 0 if self._pool is None else self._pool.nbytes

    def full_bytes(self) -> int:
        """See `SurgeonCache.full_bytes`."""
        if self._pool is None:
            return 0
        batch, kv_heads, _ = self._pool.table.shape
        slots = (self._pool.keys, self._pool.values)
        return sum(batch * kv_heads * self._length * held.shape[2] * held.itemsize for held in slots)

    def _drop(self) -> None:
        rows = self._rows_at(self._length)
        if self._pool is not None and rows != self._rows:
            self._pool.keep(self._live(self._length))
            self._rows = rows

    def _rows_at(self, length: int) -> list[int]:
        """The row of each sequence's next token after `length` tokens."""
        return [max(0, length - first) // self._block_size for first in self._cache_leftpad]

    def _live(self, length: int) -> torch.Tensor:
        """Marks the blocks with a token among the first `length` that a later token reads.

        The result is bool `[batch, KV heads, blocks]`, with as many blocks as the longest sequence has.
        """
        blocks_of = [max(0, -(-(length - first) // self._block_size)) for first in self._cache_leftpad]
        ends = torch.tensor(blocks_of, device="cpu")
        blocks = int(ends.max())
        exist = torch.arange(blocks, device="cpu") < ends[:, None, None]
        if self._keeps_all:
            return exist.expand(-1, len(self._kv_heads), -1)
        live = self._liveness.live(torch.tensor(self._rows_at(length), device="cpu"), blocks)
        return live[:, self._kv_heads.start : self._kv_heads.stop] & exist


@cache
def _say_once(_package: str) -> None:
    """Says, once for each package, that its caches drop nothing."""
    _LOG.warning(
        'recall is dense, so a SurgeonCache keeps every block; patch(model, package, recall="pattern") lets it drop '
        "those that the topology's later rows do not read"
    )
