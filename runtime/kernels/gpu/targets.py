"""The target of a GPU, and which of a package's targets runs on it."""

import torch

from surgeon.runtime.errors import TargetError
from surgeon.runtime.package.manifest import Manifest
from surgeon.runtime.package.target import Target


def target_of(device: torch.device) -> Target:
    """The target that code for a device is compiled for."""
    if torch.version.hip:
        # The name may carry features that do not matter here: gfx90a:sramecc+:xnack-.
        return Target("hip", torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return Target("cuda", f"{major}{minor}")


def choose_target(manifest: Manifest, own: Target, where: str) -> Target:
    """The packaged target to run on a device: its own, or for compute capability 8.x the nearest lower 8.x.

    Code for compute capability 9.0 or later, or for HIP, runs only on the target that it was compiled for.

    Raises:
        TargetError: the package has no such target; the message names those that it has.
    """
    there = [Target.parse(name) for name in manifest.targets]
    if own in there:
        return own
    if own.backend == "cuda" and own.arch.startswith("8"):
        lower = [target for target in there if target.backend == "cuda" and "80" <= target.arch < own.arch]
        if lower:
            return max(lower)
    raise TargetError(
        where,
        f"kernels for {own}, this device's target",
        "only " + ", ".join(manifest.targets) if manifest.targets else "none",
        f"compile the package again with --target {own}",
    )
