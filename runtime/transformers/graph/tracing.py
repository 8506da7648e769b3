"""Turns a frozen model into one graph in which every attention is a compiled kernel for its layer."""

import copy
import os
from collections.abc import Iterator
from typing import cast

import torch
from transformers import PreTrainedModel

from surgeon.runtime.errors import PatchError, short_repr
from surgeon.runtime.loading import Package, loaded
from surgeon.runtime.ops.input_checks import valid_keys
from surgeon.runtime.transformers.graph.export import exported
from surgeon.runtime.transformers.graph.fuse_rotary import fuse_rotary
from surgeon.runtime.transformers.patching import is_patched, patch, unpatch
from surgeon.runtime.transformers.recall import DENSE_ROWS
from surgeon.runtime.transformers.tensor_parallel import is_sharded

_SITES = (torch.ops.surgeon.attention.default, torch.ops.surgeon.attention_rotary.default)
_OTHER_ATTENTION = ("scaled_dot_product", "softmax", "flex_attention")


class _Logits(torch.nn.Module):
    """The model as a function of plain tensors, which torch.export requires."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        mask = valid_keys(input_ids, attention_mask)
        return cast(torch.Tensor, self.model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits)


def trace(
    model: PreTrainedModel,
    package: Package | str | os.PathLike[str],
    recall: str | None = None,
    dense_rows: int = DENSE_ROWS,
) -> torch.fx.GraphModule:
    """Traces the model as a graph `(input_ids, attention_mask=None) -> logits` on the package's kernels, for inference.

    `input_ids` is int64 `[batch, length]` for any batch and length, `attention_mask` of the same shape is 0 for padding
    on the left and 1 for tokens, and the logits are `[batch, length, vocabulary]`; there is no cache. Layers that
    `patch` would leave alone keep their attention. The graph stays on the model's device. Its parameters have the
    model's names and share the model's memory, without gradients. The model, patched or not, is left unchanged.
    `recall` and `dense_rows` are those of `patch`.

    Raises:
        PatchError: the package does not fit the model, torch.export cannot trace it, or one of its attention calls
            would not run on the kernels.
    """
    package = loaded(package)
    if is_sharded(model):
        raise PatchError(
            type(model).__name__,
            "a model that is whole in this process",
            "one whose weights processes share",
            "use patch(model, package), which takes such a model",
        )
    shadow = _shadow(model)
    if is_patched(shadow):
        unpatch(shadow)
    left = patch(shadow, package, recall, dense_rows)
    graph = _export(shadow.eval())
    if model.device.type == "cpu":
        fuse_rotary(graph.graph, package.manifest.model.head_dim)
        graph.recompile()
    _check_sites(graph, package, {layer.layer for layer in left})
    _share_frozen_weights(graph, model)
    graph.meta["package"] = package  # ops find a package only while it is referenced; copies keep `meta`
    return graph


def _shadow(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model's modules and config that shares the weights and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _export(model: PreTrainedModel) -> torch.fx.GraphModule:
    # Each input has its own sizes, so that the graph takes no size from a mask, which is optional.
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    example = torch.zeros((2, 3), dtype=torch.int64, device=model.device)
    program = exported(
        _Logits(model),
        (example, torch.ones_like(example)),
        {"input_ids": dynamic, "attention_mask": dynamic},
        "a model that can be traced with any batch and length",
        "use patch(model, package), which needs no trace",
    )
    whole = program.module()
    graph = whole.graph
    for node in reversed(graph.nodes):
        # valid_keys checks the inputs, with better messages; the other metadata follows from them.
        if node.target in ("_guards_fn", torch.ops.aten._assert_tensor_metadata.default):
            graph.erase_node(node)
        elif node.op == "placeholder" and node.name == "attention_mask":
            node.args = (None,)  # its default
        elif node.op == "output":
            node.args = tuple(node.args[0])
    (check,) = graph.find_nodes(op="call_function", target=torch.ops.surgeon.valid_keys.default)
    graph.find_nodes(op="placeholder")[-1].append(check)  # before sizes are taken of an input that may not be a batch
    graph.eliminate_dead_code()
    graph.set_codegen(torch.fx.graph.CodeGen())  # a plain signature, in place of export's nested inputs and outputs
    for node in graph.find_nodes(op="get_attr"):
        node.target = node.target.removeprefix("model.")  # the wrapper's name
    return torch.fx.GraphModule(whole.get_submodule("model"), graph, class_name=type(model).__name__)


def _check_sites(graph: torch.fx.GraphModule, package: Package, left: set[int]) -> None:
    layers, allowed = [], len(left)
    for node in _calls(graph):
        if node.target in _SITES and node.args[-2] == package.id:
            layers.append(node.args[-1])
        elif any(name in str(node.target) for name in _OTHER_ATTENTION):
            allowed -= 1
            if allowed >= 0:
                continue
            raise PatchError(
                f"traced graph: {node.name}",
                "no attention but the package's",
                str(node.target),
                "use patch(model, package), or a model without attention of its own",
            )
    expected = [layer for layer in package.manifest.layers if layer not in left]
    if layers != expected:
        raise PatchError(
            "traced graph",
            f"one attention for each of the layers {short_repr(expected)}",
            f"those of the layers {short_repr(layers)}",
            "use patch(model, package)",
        )


def _calls(graph: torch.fx.GraphModule) -> Iterator[torch.fx.Node]:
    for module in graph.modules():
        if isinstance(module, torch.fx.GraphModule):
            yield from (node for node in module.graph.nodes if node.op == "call_function")


def _share_frozen_weights(graph: torch.fx.GraphModule, model: PreTrainedModel) -> None:
    """Gives the graph the model's own parameters and buffers, under their names and without gradients."""
    frozen: dict[int, torch.nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in frozen:
            frozen[id(parameter)] = torch.nn.Parameter(parameter.detach(), requires_grad=False)
        owner, last = _owner(graph, name)
        owner.register_parameter(last, frozen[id(parameter)])
    saved = model.state_dict()
    for name, buffer in model.named_buffers(remove_duplicate=False):
        owner, last = _owner(graph, name)
        owner.register_buffer(last, buffer, persistent=name in saved)


def _owner(root: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """The module that holds the tensor of a dotted name, created if export dropped it (one of two tied names)."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, torch.nn.Module())
        root = root.get_submodule(part)
    return root, last
