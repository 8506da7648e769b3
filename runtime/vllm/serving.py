"""The package that a server runs on: read and checked in its first process, loaded again in the others."""

import os
import sys
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from surgeon.runtime.errors import PatchError, SurgeonError, printable, short_repr
from surgeon.runtime.loading import Package, open_package
from surgeon.runtime.package.target import Target
from surgeon.runtime.transformers.recall import recall_of
from surgeon.runtime.vllm.checkpoint import check_weights
from surgeon.runtime.vllm.compatibility import check_server, check_version, covered_layers
from surgeon.runtime.vllm.options import Options, options_of
from surgeon.runtime.vllm.pages.needs import Group, groups_of
from surgeon.runtime.vllm.selection import select_backend

_TRACEBACK = "SURGEON_TRACEBACK"


@dataclass(frozen=True)
class Serving:
    """A server's package, all of its heads, and the server's options."""

    package: Package
    options: Options

    def group_of(self, layer: int, config: Any) -> Group | None:
        """The group of layers with which a layer shares its pages, or None if the server frees none.

        It frees pages under recall "pattern", in a model whose layers are all covered, without pipeline parallelism.
        """
        manifest, parallel = self.package.manifest, config.parallel_config
        covered = covered_layers(config.model_config.hf_config, manifest)
        whole = len(covered) == manifest.model.num_hidden_layers and parallel.pipeline_parallel_size == 1
        if self.options.asking or not whole:
            return None
        return next(group for group in _groups(self.package) if layer in group.layers)


@cache
def _groups(package: Package) -> tuple[Group, ...]:
    return groups_of(package.liveness(), package.manifest.num_blocks)


def check_start(config: Any) -> None:
    """Ends the start of a server whose package cannot be used; `config` is its VllmConfig.

    The options are written into the config as they were understood, with the package's identity, so that every other
    process loads the very package that was checked; on a GPU, the config is made to choose the plugin's backend. An
    uncaught error is shown as one line.

    Raises:
        SurgeonError: the package or an option cannot be used.
    """
    if config.model_config is None:
        return
    try:
        found = serving(config)
        if found is None:
            return
        shape = found.package.manifest.model
        if shape.weights_sha256 is not None:
            check_weights(config.model_config, config.load_config, shape.weights_sha256)
        if own_target().backend != "cpu":
            select_backend(config, found.package.manifest.block_size)
    except SurgeonError:
        _show_in_one_line()
        raise
    config.additional_config = config.additional_config | found.options.to_config()


def serving(config: Any) -> Serving | None:
    """Loads and checks the package that a VllmConfig names; None if it names none.

    Raises:
        PackageError, TargetError, PatchError: the package cannot be used, or not for this server.
    """
    options = options_of(config.additional_config)
    if options is None:
        return None
    if not isinstance(config.additional_config, dict):
        raise PatchError(
            "--additional-config", "an object", short_repr(config.additional_config), "pass the options as JSON"
        )
    from vllm import __version__

    check_version(__version__)
    options = replace(options, package=os.path.realpath(options.package))
    package = _loaded(options.package, options.sha256)
    check_server(config, package, own_target())
    recall = recall_of(options.recall, package.manifest)
    return Serving(package, replace(options, recall=recall, sha256=package.id.partition(":")[0]))


def own_target() -> Target:
    """The target of this process's device, found without a use of the device itself: other processes are still to come.

    Raises:
        PatchError: the plugin has no part for the device.
    """
    from vllm.platforms import current_platform

    if current_platform.device_type == "cpu":
        return Target("cpu")
    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    if capability is None:
        expected = "a CPU or an NVIDIA GPU: the plugin knows no others yet"
        raise PatchError("vLLM's device", expected, current_platform.device_name, "serve without a package")
    return Target("cuda", f"{capability.major}{capability.minor}")


@cache
def _known(folder: str, sha256: str) -> Package:
    return open_package(folder, strict=True, sha256=sha256)


def _loaded(folder: str, sha256: str | None) -> Package:
    """The package of a folder; one whose identity is known is loaded once in a process."""
    return open_package(folder, strict=True) if sha256 is None else _known(folder, sha256)


def _show_in_one_line() -> None:
    """Makes the interpreter show an error of Surgeon's that nobody catches as one line, without a traceback."""
    before = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if isinstance(error, SurgeonError) and not os.environ.get(_TRACEBACK):
            print(f"surgeon: {printable(str(error))}", file=sys.stderr, flush=True)
        else:
            before(kind, error, trace)

    sys.excepthook = show
