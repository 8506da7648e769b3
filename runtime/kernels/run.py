"""Runs one layer of a package on its operands' device, after checks, and in a wider dtype where necessary."""

import copy
import logging
from dataclasses import replace
from functools import cached_property

import torch

from surgeon.runtime.errors import PatchError, short_repr
from surgeon.runtime.kernels import backward
from surgeon.runtime.kernels.cpu.direct import DirectCall
from surgeon.runtime.kernels.devices import DeviceKernels
from surgeon.runtime.operands import (
    WITHOUT_GRADIENTS,
    Gradients,
    Nodes,
    Operands,
    check,
    check_packed,
    check_paged,
    check_pages,
    check_rotary,
    check_write,
)
from surgeon.runtime.package.reader import PackageFiles
from surgeon.runtime.package.schedule import NODE
from surgeon.runtime.package.topology_facts import FILE as TOPOLOGY
from surgeon.runtime.package.topology_facts import PackagedRouter, read_router
from surgeon.runtime.packed_batch import DeviceBatch, PackedBatch

_LOG = logging.getLogger("surgeon")
_PART = ":kv_heads="


class LayerKernels:
    """The kernels of a package's layers, for all of their KV heads or for some; safe to call from several threads.

    The torch ops find them by `id`: two loads of a package that could answer a call differently have different ids.
    """

    def __init__(self, files: PackageFiles, strict: bool, cpu_variant: str | None) -> None:
        options = (*(("strict",) if strict else ()), *((cpu_variant,) if cpu_variant else ()))
        self.id: str = ":".join((files.id, *options))
        self.kv_heads = range(files.manifest.model.num_key_value_heads)
        self.devices = DeviceKernels(files, strict, cpu_variant)
        self._manifest = files.manifest
        self._shape = files.manifest.model
        self._files = files
        self.strict = strict
        self._warned: set[torch.dtype] = set()

    def part(self, kv_heads: range) -> "LayerKernels":
        """The same kernels for only some consecutive KV heads of each layer and their query heads."""
        model = self._manifest.model
        part = copy.copy(self)
        part.kv_heads = kv_heads
        heads = model.num_attention_heads // model.num_key_value_heads * len(kv_heads)
        part._shape = replace(model, num_attention_heads=heads, num_key_value_heads=len(kv_heads))
        part.id = f"{self.id.partition(_PART)[0]}{_PART}{kv_heads.start}-{kv_heads.stop}"
        return part

    def direct(self, layer: int) -> DirectCall | None:
        """A layer's call without Python, for as long as these kernels are held; None if there is none, or none yet.

        It takes what `Operands` holds, and returns None for calls that are left to `run`: those that may need
        gradients, a wider dtype, a choice or an error.
        """
        cpu = self.devices.cpu_if_loaded
        return None if cpu is None or layer not in self._manifest.layers else cpu.direct(layer, self.kv_heads)

    def run(self, layer: int, operands: Operands, lse: torch.Tensor | None = None) -> torch.Tensor:
        """Attention of one layer, with the result of `Package.attention`.

        `lse`, fp32 `[B,Hq,Sq]`, is filled if it is given.

        Raises:
            PatchError: shapes, dtypes or devices do not fit the package.
            PackageError, TargetError: on the first call on the device, as `Package.prepare`.
        """
        check(operands, self._shape)
        self.check_layer(layer)
        kernels = self.devices.on(operands.q.device)
        taken = self._in_one_of(kernels.dtypes, operands)
        out = kernels.attend(layer, taken, lse, self.kv_heads.start)
        return out if taken is operands else out.to(operands.q.dtype)

    def run_paged(
        self,
        layer: int,
        operands: Operands,
        block_table: torch.Tensor,
        *,
        nodes: Nodes | None = None,
    ) -> torch.Tensor:
        """Attention of one layer on the CPU over a cache that holds only some of the blocks; otherwise like `run`.

        k and v are pools of blocks `[slots, block_size, D]`. `block_table`, int32 `[B, Hkv, blocks]`, gives the slot
        of each block of each KV head, counted from the first valid key; -1 stands for a block that is not held, which
        no query may read; routed heads may read any. Without `nodes`, routed heads make theirs in every call.

        Raises:
            PatchError: shapes, dtypes or devices do not fit, or a query reads a block that is not held.
        """
        self.check_layer(layer)
        check_paged(operands, block_table, self._shape, self._manifest.block_size)
        kernels = self.devices.cpu
        taken = self._in_one_of(kernels.dtypes, operands)
        found = kernels.attend_paged(layer, taken, block_table, self.kv_heads.start, nodes=nodes)
        return found if taken is operands else found.to(operands.q.dtype)

    def run_packed(
        self,
        layer: int,
        batch: PackedBatch,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        out: torch.Tensor,
        nodes: torch.Tensor | None = None,
    ) -> None:
        """Attention of one layer on the CPU over a batch's queries, of any number a sequence, into `out`.

        q and out are `[tokens, Hq, D]`, out contiguous: the batch's queries and then any number of others, which are
        neither read nor written. k and v are pools of blocks as in `run_paged`. Sequences of few queries are decoded
        together, and the others prefilled together.

        `nodes`, int8 `[slots, block_size // 8, D]`, are those that routed heads choose by, kept from call to call: the
        nodes of the tokens before a sequence's first query are there, of whichever call, and this one writes those that
        its keys complete. Without them, routed heads make theirs in every call.

        Raises:
            PatchError: shapes, dtypes or devices do not fit, or a query reads a block that a table with holes lacks.
            TopologyError: a position is outside the block table, or beyond what the topology covers.
        """
        self.check_layer(layer)
        check_packed(batch, q, k, v, out, self._shape, self._manifest.block_size, nodes)
        kernels = self.devices.cpu
        operands = Operands(q[None].transpose(1, 2), k, v, batch.position, None, scale)
        taken = self._in_one_of(kernels.dtypes, operands)
        found = out if taken is operands else torch.empty_like(out, dtype=torch.float32)
        kept = None if nodes is None else Nodes(nodes, batch.position // NODE)
        kernels.attend_packed(layer, taken, batch, found, self.kv_heads.start, kept)
        if found is not out:
            out[: batch.tokens].copy_(found[: batch.tokens])

    def write_pages(self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, pages: torch.Tensor) -> None:
        """Writes new keys and values on the CPU into the pages of a cache, which `run_packed` reads as pools.

        `pages`, contiguous `[pages, Hkv, page tokens, 2 * D]`, hold a head's keys and then its values. k and v are
        `[tokens, Hkv, D]`; `slots`, int64 `[tokens]` or fewer, is page times page tokens plus the place in the page, or
        negative for tokens that go nowhere.

        Raises:
            PatchError: shapes, dtypes or devices do not fit, or a slot lies behind the pages; then nothing is written.
        """
        check_write(k, v, slots, pages, self._shape)
        self.devices.cpu.write_pages(k, v, slots, pages)

    def run_pages(
        self,
        layer: int,
        batch: DeviceBatch,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """Attention of one layer on a GPU over a batch's queries, of any number a sequence, into `out`.

        q and out are `[tokens, Hq, D]`, out contiguous; tokens of no sequence are neither read nor written. k and v are
        `[pages, Hkv, page_tokens, D]` with the same aligned strides. Nothing waits for the device: a graph can capture
        calls with one query a sequence. Positions are not checked.

        Raises:
            PatchError: shapes, dtypes or devices do not fit the package, or addresses or strides the kernels.
            TargetError: the package has no kernels for pages on the device.
        """
        self.check_layer(layer)
        check_pages(batch, q, k, v, out, self._shape, self._manifest.block_size)
        self.devices.gpu(q.device).attend_pages(layer, batch, q, k, v, scale, out, self.kv_heads.start)

    def run_rotary(self, layer: int, operands: Operands, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Attention of one layer on the CPU over whole sequences, whose q and k the kernel rotates; else like `run`.

        cos and sin are `[B or 1, length, D]`; x becomes x * cos + rotate_half(x) * sin, as in Llama.

        Raises:
            PatchError: shapes, dtypes or devices do not fit the package or each other.
        """
        check_rotary(operands, cos, sin, self._shape)
        self.check_layer(layer)
        kernels = self.devices.cpu
        taken = self._in_one_of(kernels.dtypes, operands)
        # Both in one layout: the kernel takes a single pair of strides.
        cos, sin = (table.to(taken.q.dtype).contiguous().expand(taken.q.shape[0], -1, -1) for table in (cos, sin))
        return kernels.attend(layer, taken, None, self.kv_heads.start, (cos, sin)).to(operands.q.dtype)

    def run_backward(
        self, layer: int, grad_out: torch.Tensor, grad_lse: torch.Tensor | None, operands: Operands
    ) -> Gradients:
        """The gradients of q, k and v in a call of `run` on the CPU, from those of its results.

        Raises:
            PatchError: shapes or dtypes do not fit the package, or tensors are not on the CPU.
        """
        check(operands, self._shape)
        self.check_layer(layer)
        if operands.q.device.type != "cpu":
            raise PatchError(
                "surgeon.attention",
                "tensors on the CPU in a backward pass",
                str(operands.q.device),
                WITHOUT_GRADIENTS,
            )
        heads = self._shape.num_attention_heads
        first = self.kv_heads.start * heads // len(self.kv_heads)
        schedules = self._files.schedules[layer].heads[first : first + heads]
        router = self._routers.get(layer)
        if router is not None:
            router = PackagedRouter(*(each[self.kv_heads.start : self.kv_heads.stop] for each in router))
        return backward.gradients(schedules, self._manifest.block_size, grad_out, grad_lse, operands, router)

    @cached_property
    def _routers(self) -> dict[int, PackagedRouter]:
        """The routers of the routed layers, for all KV heads."""
        return read_router(self._files.files[TOPOLOGY], self._manifest, f"{self._files.folder}/{TOPOLOGY}")

    def check_layer(self, layer: int) -> None:
        """Refuses a layer that the package does not cover.

        Raises:
            PatchError: the package does not cover the layer.
        """
        if layer not in self._manifest.layers:
            raise PatchError(
                "attention: layer",
                f"one of the layers {short_repr(self._manifest.layers)} that the package covers",
                str(layer),
                "correct the index",
            )

    def _in_one_of(self, dtypes: tuple[torch.dtype, ...], operands: Operands) -> Operands:
        """The operands, converted without loss to a wider dtype if there is no kernel for theirs."""
        dtype = operands.q.dtype
        if dtype in dtypes:
            return operands
        if self.strict or dtype not in (torch.bfloat16, torch.float16) or torch.float32 not in dtypes:
            raise PatchError(
                "attention: q",
                "one of " + ", ".join(map(str, dtypes)),
                str(dtype),
                "convert the tensors, or compile the package with that --dtype",
            )
        if dtype not in self._warned:
            self._warned.add(dtype)
            _LOG.warning("package %s has no %s kernels: calls run in float32", self.id[:12], dtype)
        return operands.to(torch.float32)
