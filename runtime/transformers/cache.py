"""A Transformers cache that drops, for every KV head, the blocks that no later token reads.

Where blocks begin depends on the padding, which Transformers tells the attention function and not the cache. So a
layer's `update` only wraps the new keys and values up; the attention function hands them back to `PagedLayer.attend`,
which stores them and attends over what is held. Whoever else takes the wrapped ones for keys and values is told so.

Source: `transformers.cache_utils`, Cache and CacheLayerMixin.
"""

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from surgeon.runtime.cache.liveness import Liveness
from surgeon.runtime.cache.pages import Pages
from surgeon.runtime.errors import PatchError
from surgeon.runtime.loading import Package
from surgeon.runtime.operands import Operands
from surgeon.runtime.ops import attention as ops
from surgeon.runtime.transformers import attention as sites
from surgeon.runtime.transformers.paged_states import PagedStates


class SurgeonCache(Cache):
    """A cache for a model that is patched with the package, on the CPU; give it to `generate` as `past_key_values`.

    What a patched model computes with it is, bit for bit, what it computes with a DynamicCache. Layers that no kernel
    runs are kept as there; `config`, the model's, is needed where some are of another kind than full attention. A cache
    that blocks have left cannot be cropped to before a row that reads them, unless `activate_past_recording` was called
    first, as assisted generation does.

    Raises:
        PatchError: the config is another model's.
        TargetError: the package has no kernels for the CPU.
        PackageError: the package does not say when blocks may be dropped.
    """

    def __init__(self, package: Package, config: PreTrainedConfig | None = None) -> None:
        package.prepare("cpu")
        number = package.manifest.model.num_hidden_layers
        layers: list[Any] = DynamicCache(config=config).layers if config else [DynamicLayer() for _ in range(number)]
        if len(layers) != number:
            raise PatchError(
                "SurgeonCache: config", f"{number} layers", str(len(layers)), "pass the model's own config"
            )
        for layer, liveness in package.liveness().items():
            if config is None or sites.layer_type(config, layer) == sites.FULL:
                layers[layer] = PagedLayer(package, layer, liveness)
        super().__init__(layers=layers)

    def kept_bytes(self) -> int:
        """Bytes that keys and values take, slots made ahead and page tables included."""
        return sum(layer.kept_bytes() if isinstance(layer, PagedLayer) else _whole(layer) for layer in self.layers)

    def full_bytes(self) -> int:
        """Bytes that keys and values would take in a DynamicCache."""
        return sum(layer.full_bytes() if isinstance(layer, PagedLayer) else _whole(layer) for layer in self.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes so many of the last tokens, a number that is not positive; all layers or none.

        Raises:
            PatchError: the number is positive, or a block that the next token reads has been dropped.
        """
        for layer in self.layers:
            if isinstance(layer, PagedLayer):
                layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)


def _whole(layer: object) -> int:
    """Bytes of a layer that is kept whole."""
    tensors = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(int(tensor.nbytes) for tensor in tensors if isinstance(tensor, torch.Tensor))


class PagedLayer(CacheLayerMixin):
    """One layer of a SurgeonCache.

    `keys` and `values` of other layers are None here: what is held has another form. While `record_past` is true,
    nothing is dropped until `crop` says from where on the model goes on.
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
        self._liveness = liveness
        self._kv_heads = package.kv_heads  # those that are cached; of a tensor-parallel model, the process's own
        self._block_size = package.manifest.block_size
        self._length = 0  # tokens so far, padding included
        self._first_key: list[int] = []  # of each sequence
        self._rows: list[int] = []  # of the next token of each sequence, when blocks were last dropped
        self._pages: Pages | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[PagedStates, PagedStates]:
        """The new keys and values `[batch, KV heads, tokens, head_dim]`, for our attention function only.

        Raises:
            PatchError: they are not on the CPU.
        """
        if key_states.device.type != "cpu":
            raise PatchError(
                f"SurgeonCache: layer {self.layer}",
                "keys and values on the CPU",
                f"those on {key_states.device}",
                "use a DynamicCache there",
            )
        if torch.is_autocast_enabled("cpu"):  # one dtype for both, as attention sees them there
            dtype = torch.get_autocast_dtype("cpu")
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        states = PagedStates(self, key_states, value_states)
        return states, states

    def attend(self, operands: Operands, package: Package) -> torch.Tensor:
        """Attention over the held blocks and the new tokens, which are stored; then drops what no later row reads.

        k and v are those of the new tokens, and places are given; the result is as `Package.attention`.

        Raises:
            PatchError: the tokens are not those that follow, or the padding is another than before.
        """
        query, keys, values, position, first_key, _ = operands
        assert position is not None
        assert first_key is not None
        first = self._begin(keys, position, first_key, package)
        operands = operands._replace(q=query.to(keys.dtype))
        new_keys, new_values = keys.detach(), values.detach()
        length = self._length + keys.shape[2]
        if self._pages is None:
            attended = ops.attention(package, self.layer, operands)
            self._pages = Pages(self._block_size, keys, values)
            wanted = None if self.record_past else self._live(length)
            self._pages.write(first, new_keys, new_values, wanted)
        else:
            self._pages.write(first, new_keys, new_values)
            operands = operands._replace(k=self._pages.keys, v=self._pages.values)
            attended = ops.attention_paged(package, self.layer, operands, self._pages.table)
        self._length = length
        if not self.record_past:
            self._drop()
        return attended

    def _begin(
        self, keys: torch.Tensor, position: torch.Tensor, first_key: torch.Tensor, package: Package
    ) -> torch.Tensor:
        """Where the first new token of each sequence stands, counted from its first valid key."""
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
        given = first_key.tolist()
        if self._pages is not None:
            if len(given) != len(self._first_key):
                raise PatchError(where, f"{len(self._first_key)} sequences", str(len(given)), "keep the batch")
            for before, now in zip(self._first_key, given, strict=True):
                if now != before and min(now, before) < self._length:  # of tokens that are stored, or never were
                    raise PatchError(
                        where,
                        f"the padding of the first call, {self._first_key} tokens",
                        f"{given}",
                        "pass the attention_mask of all tokens, grown by ones",
                    )
            if keys.dtype != self._pages.keys.dtype:
                raise PatchError(where, f"{self._pages.keys.dtype}, as before", str(keys.dtype), "keep the dtype")
        self._first_key = given
        return position - first_key

    def check_crop(self, tokens_to_remove: int) -> None:
        """Whether `crop` would leave all that the next token reads.

        Raises:
            PatchError: it would not, or the number is positive.
        """
        where = "SurgeonCache.crop"
        if tokens_to_remove > 0:
            raise PatchError(
                where, "minus the number of tokens to remove", f"{tokens_to_remove}", "pass it as negative"
            )
        if self._pages is None or tokens_to_remove == 0:
            return
        length = self._length + tokens_to_remove
        live = self._live(length)
        if bool((live & (self._pages.table[:, :, : live.shape[2]] < 0)).any()):
            raise PatchError(
                where,
                f"to go back to a token that reads no block that layer {self.layer} has dropped",
                f"token {max(0, length)} of {self._length}",
                "call activate_past_recording() before the tokens that may be removed, or reset() and start again",
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Removes so many of the last tokens, and what no later row reads, also where it was recorded.

        Raises:
            PatchError: as `check_crop`.
        """
        self.check_crop(tokens_to_remove)
        self._length = max(0, self._length + tokens_to_remove)
        if self._length == 0:
            self.reset()
        elif self._pages is not None:
            self._pages.keep(self._live(self._length))
            self._rows = self._rows_at(self._length)

    def reset(self) -> None:
        """Forgets all tokens."""
        self._length, self._first_key, self._rows, self._pages = 0, [], [], None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the first call of `attend` makes the pages."""

    def get_seq_length(self) -> int:
        """Tokens so far, dropped ones and padding included."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys a mask is for, and the first of them: all, as the kernel knows which it reads."""
        return self._length + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def activate_past_recording(self) -> None:
        """Drops nothing from now on, except in `crop`."""
        self.record_past = True

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Makes sequence i what sequence `beam_idx[i]` was."""
        if self._pages is not None and beam_idx.tolist() != list(range(len(self._first_key))):
            self._pages.select(beam_idx)
            self._first_key = [self._first_key[index] for index in beam_idx.tolist()]
            self._rows = []

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these sequences."""
        self.reorder_cache(torch.arange(len(self._first_key))[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence so many times."""
        self.reorder_cache(torch.arange(len(self._first_key)).repeat_interleave(repeats))

    def offload(self) -> None:
        """Nothing: the pages are on the CPU."""

    def prefetch(self) -> None:
        """Nothing: the pages are on the CPU."""

    def kept_bytes(self) -> int:
        """See `SurgeonCache.kept_bytes`."""
        return 0 if self._pages is None else self._pages.nbytes

    def full_bytes(self) -> int:
        """See `SurgeonCache.full_bytes`."""
        if self._pages is None:
            return 0
        batch, kv_heads, _ = self._pages.table.shape
        slots = (self._pages.keys, self._pages.values)
        return sum(batch * kv_heads * self._length * held.shape[2] * held.itemsize for held in slots)

    def _drop(self) -> None:
        rows = self._rows_at(self._length)
        if self._pages is not None and rows != self._rows:
            self._pages.keep(self._live(self._length))
            self._rows = rows

    def _rows_at(self, length: int) -> list[int]:
        """The row of the next token of each sequence, after so many tokens."""
        return [max(0, length - first) // self._block_size for first in self._first_key]

    def _live(self, length: int) -> torch.Tensor:
        """Of the blocks with a token among the first `length`, those that a later token reads.

        Bool `[batch, KV heads, blocks]`, as many blocks as the longest sequence has.
        """
        ends = torch.tensor([max(0, -(-(length - first) // self._block_size)) for first in self._first_key])
        blocks = int(ends.max())
        live = self._liveness.live(torch.tensor(self._rows_at(length)), blocks)
        return live[:, self._kv_heads.start : self._kv_heads.stop] & (torch.arange(blocks) < ends[:, None, None])
