"""Changes to a package's manifest."""

import copy
import random
from collections.abc import Callable
from typing import Any

from fuzzing import json_mutations
from fuzzing.json_mutations import Raw

Json = dict[str, Any]
OTHER_GPUS = ("cuda:80", "hip:gfx90a")


def change_manifest(manifest: Json, rng: random.Random) -> None:
    kernels = manifest["kernels"]
    where = rng.randrange(10)
    if where < 4:
        rng.choice(CHANGES)(manifest, rng)
    else:
        of = (kernels, kernels, rng.choice(kernels), manifest["model"], manifest, manifest["files"])[where - 4]
        json_mutations.mutate(of, rng)


def _field_of_another(manifest: Json, rng: random.Random) -> None:
    one, other = rng.choice(manifest["kernels"]), rng.choice(manifest["kernels"])
    names = rng.sample(sorted(one), rng.choice((1, 1, 2, 3)))
    if rng.random() < 0.3:
        names = ["schedule", "symbol"]
    for name in names:
        if rng.random() < 0.7:
            one[name], other[name] = other[name], one[name]
        else:
            one[name] = copy.deepcopy(other[name])


def _layers(manifest: Json, rng: random.Random) -> None:
    kernels = manifest["kernels"]
    one, other = rng.choice(kernels), rng.choice(kernels)
    choice = rng.randrange(6)
    if choice == 0:
        one["layers"] = one["layers"] + other["layers"]
        kernels.remove(other)
    elif choice == 1:
        moved = one["layers"].pop(rng.randrange(len(one["layers"])))
        other["layers"].append(moved)
    elif choice == 2:
        layer = rng.choice((0, 1, 2, 3, 4, -1))
        manifest["layers"] = sorted({*manifest["layers"]} ^ {layer})
        for kernel in kernels:
            if rng.random() < 0.7:
                kernel["layers"] = sorted({*kernel["layers"]} ^ {layer})
    elif choice == 3:
        one["layers"] *= 2
    elif choice == 4:
        rng.choice((manifest, one))["layers"].reverse()
    else:
        for kernel in kernels:  # every layer takes another's place
            kernel["layers"] = [{0: 2, 2: 0}.get(layer, layer) for layer in kernel["layers"]]


def _kernels(manifest: Json, rng: random.Random) -> None:
    kernels = manifest["kernels"]
    choice = rng.randrange(5)
    if choice == 0:
        kernels.append(copy.deepcopy(rng.choice(kernels)))
    elif choice == 1:
        kernels.pop(rng.randrange(len(kernels)))
    elif choice == 2:
        rng.shuffle(kernels)
    elif choice == 3:  # every kernel once more, for another dtype or target
        name, values = rng.choice((("dtype", ("fp32", "bf16", "fp16", "fp8")), ("target", ("cpu", *OTHER_GPUS, "x"))))
        value = rng.choice(values)
        kernels += [kernel | {name: value} for kernel in copy.deepcopy(kernels) if kernel[name] != value]
    else:
        old, value = rng.choice(kernels), rng.choice(("fp32", "bf16", "fp16"))
        for kernel in kernels:
            if kernel["target"] == old["target"]:
                kernel["dtype"] = value


def _heads(manifest: Json, rng: random.Random) -> None:
    kernels, heads = manifest["kernels"], manifest["model"]["num_attention_heads"]
    one = rng.choice(kernels)
    middle = rng.choice((0, 1, 2, heads, heads + 1, -1))
    if rng.random() < 0.5:
        one["heads"] = rng.choice(([0, heads], [0, middle], [middle, heads], [middle, middle], [0, 1, 2]))
    else:
        kernels.append(copy.deepcopy(one) | {"heads": [middle, heads]})
        one["heads"] = [0, middle]


def _launch(manifest: Json, rng: random.Random) -> None:
    kernel = rng.choice(manifest["kernels"])
    if kernel["launch"] is None:
        kernel["launch"] = {
            "grid": ["one", "one", "one"],
            "tile_rows": 1,
            "threads": 1,
            "shared_bytes": 0,
            "scratch_bytes": 0,
            "program_heads": 1,
        }
        return
    name = rng.choice(("tile_rows", "threads", "shared_bytes", "scratch_bytes", "program_heads"))
    now = kernel["launch"][name]
    kernel["launch"][name] = rng.choice((0, 1, now * 2, now // 2, now + 1, -now, 32, 1024, 1025, 2**31, 2**40, 10**20))


def _number(manifest: Json, rng: random.Random) -> None:
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    name = rng.choice((*names, "num_blocks", "block_size", "beyond", "weights_sha256", "model_type", "topology_sha256"))
    fields = manifest["model"] if name in manifest["model"] else manifest
    now = fields[name]
    if isinstance(now, int):
        fields[name] = rng.choice((now + 1, now - 1, now * 2, now // 2, 0, -now, 10**9, float(now), 2**63, Raw("1e2")))
    else:
        fields[name] = rng.choice(
            ("window", "dense", "error", "llama", "qwen2", "0" * 64, None, "", (now or "x").upper())
        )


def _paths(manifest: Json, rng: random.Random) -> None:
    entry = rng.choice(manifest["files"])
    path = entry["path"]
    others = (
        f"./{path}",
        f"../{path}",
        f"/{path}",
        f"{path}/",
        path.upper(),
        f"a/../{path}",
        f"{path}\0",
        "",
        ".",
        "..",
    )
    changes: tuple[Json, ...] = (
        *(
            {"path": other}
            for other in (*others, path.replace("/", "\\"), path.replace("/", "//"), "\ud800", "manifest.json")
        ),
        *({"size": size} for size in (entry["size"] + 1, entry["size"] - 1, -1, 2**30, 2**30 + 1, 2**64)),
        *({"sha256": text} for text in (entry["sha256"].upper(), entry["sha256"][:-1], "", " " + entry["sha256"])),
    )
    entry |= rng.choice(changes)


def _everywhere(manifest: Json, rng: random.Random) -> None:
    """Two names exchanged in the whole manifest."""
    kernels = manifest["kernels"]
    name = rng.choice(("schedule", "symbol", "file", "dtype", "target"))
    one, other = rng.choice(kernels)[name], rng.choice(kernels)[name]
    for kernel in kernels:
        kernel[name] = {one: other, other: one}.get(kernel[name], kernel[name])
        if name == "schedule" and rng.random() < 0.9 and kernel["symbol"].startswith("surgeon_"):
            kernel["symbol"] = f"surgeon_{kernel['schedule']}"


CHANGES: tuple[Callable[[Json, random.Random], None], ...] = (
    *(_field_of_another, _field_of_another, _layers, _layers, _kernels, _heads, _launch, _number, _number, _paths),
    _everywhere,
)
