"""Wrong calls of the command line, one a line, and the files that they name.

A line is what stands after `surgeon`; words before the command set variables of the environment. To add a command, add
its lines below, and its name to those of `BAD_INPUTS` that it takes.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import packages
import topologies

ROOT = Path(__file__).parents[2]
PILOT = ROOT / "benchmarks" / "results" / "pilot-smollm2-135m-25-answers.json"

TOPOLOGIES = {
    "missing.json": None,
    "empty.json": b"",
    "brace.json": b"{",
    "list.json": b"[]",
    "null.json": b"null",
    "latin.json": b"\xff\xfe{}",
    "deep.json": b"[" * 100_000,
    "long.json": b'{"format": ' + b"9" * 10_000 + b"}",
    "nan.json": b'{"format": NaN}',
    "twice.json": b'{"format": 1, "format": 1}',
    "escape.json": b'{"\\u001b]0;owned\\u0007": 1}',
    "surrogate.json": b'{"\\ud800": 1}',
    "keys.json": b'{"format": "surgeon.topology"}',
}
"""Files that are no topology, no pilot and no table of tiles."""

PLACES = ("folder", "pipe", "loop", "nowhere", "nothing/below", "text.txt/below", "/dev/null", "/dev/zero", "n" * 300)
"""Names that are no file of any of ours."""

PACKAGES = (
    "folder",
    "text.txt",
    "pipe",
    "loop",
    "missing",
    "/dev",
    "damaged",
    "unlisted",
    "linked",
    "waiting",
    "numbers",
)
"""Names that are no package, or a wrong one."""

MODELS = (
    "folder",
    "text.txt",
    "pipe",
    "loop",
    "model/missing/no",
    "model-cut",
    "model-pointer",
    "model-renamed",
    "no.gguf",
)
"""Names that are no model, or a damaged one."""

TEXTS = ("missing.txt", "folder", "pipe", "empty.txt", "latin.txt", "null.txt", "short.txt", "/dev/null", "loop")
"""Names that are no text, or too little of one."""

BAD_INPUTS = {
    (*TOPOLOGIES, *PLACES): (
        "compile {} --out new",
        "inspect {}",
        "report pilot.json {} --out new.html",
        "report {} topology.json --out new.html",
    ),
    (*TOPOLOGIES, *PLACES[:3]): ("compile topology.json --out new --tiles {}",),
    PACKAGES: (
        "inspect {}",
        "export --format hf-kernels {} --out new",
        "pilot model {} --text text.txt --out new.json",
    ),
    MODELS: (
        "assess {} --text text.txt --length 64 --block 16",
        "learn {} --text text.txt --length 64 --block 16 --density 0.8 --out new.json",
    ),
    TEXTS: ("assess model --text {} --length 64 --block 16",),
}
"""Every name is put into every line beside it."""

LINES = """
assemble
--no-such-option
compile
compile topology.json
compile --out new
compile topology.json --out ''
compile topology.json --out new --jobs 0
compile topology.json --out new --jobs -1
compile topology.json --out new --jobs 1e3
compile topology.json --out new --jobs two
compile topology.json --out new --dtype fp8
compile topology.json --out new --target ''
compile topology.json --out new --target tpu
compile topology.json --out new --target cuda
compile topology.json --out new --target cuda:61
compile topology.json --out new --target cuda:90:1
compile topology.json --out new --target hip:gfx1
compile topology.json --out new --target cuda:90 --dtype fp32
compile topology.json --out new --target 'cuda:90\x1b[31m'
compile topology.json --out new --tiles tiles.json --target cuda:80
compile topology.json --out .
compile topology.json --out ..
compile topology.json --out /
compile topology.json --out folder/
compile topology.json --out text.txt
compile topology.json --out text.txt/new
compile topology.json --out pipe
compile topology.json --out loop
compile topology.json --out loop/new
compile topology.json --out nowhere
compile topology.json --out /proc/new
compile topology.json --out /dev/null/new
compile topology.json --out new --dump text.txt
compile topology.json --out new --dump /dev/null/below
compile topology.json --out new --jo 2
compile topology.json topology.json --out new
compile bomb.json --out new
compile head.json --out new
compile block.json --out new --target cuda:90
SURGEON_CACHE_SIZE=lots compile topology.json --out new
CXX=no-such-compiler compile topology.json --out new
CXX=false compile topology.json --out new
inspect
inspect ''
inspect topology.json topology.json
inspect bomb.json
inspect topology.json --json=1
export
export damaged --out new
export kernels --format zip --out new
export kernels --format hf-kernels --out kernels
export kernels --format hf-kernels --out text.txt
export kernels --format hf-kernels --out .
export kernels --format hf-kernels --out loop/new
report
report pilot.json
report pilot.json topology.json
report pilot.json topology.json --beside missing.json
report pilot.json topology.json --beside pilot.json
report pilot.json topology.json --out ''
tune
tune topology.json
tune missing.json --out new.json
tune topology.json --out missing/new.json
tune topology.json --out new.json --layer -1
tune topology.json --out new.json --layer 99
tune topology.json --out new.json --head-dim 7
tune topology.json --out new.json --tiles list.json
plan
plan folder
plan pipe
plan loop
plan text.txt
plan no.gguf
plan model-pointer
plan model --length 0
plan model --length 100 --block 16
plan model --length 64 --block 16 --density 2
plan model --length 64 --block 16 --density 0.01
plan model --length 64 --block 16 --recall everything
assess
assess model
assess model --text
assess model --text ''
assess model --text text.txt --length 0
assess model --text text.txt --length 100 --block 16
assess model --text text.txt --length 64 --block 16 --density 0
assess model --text text.txt --length 64 --block 16 --density 2
assess model --text text.txt --length 64 --block 16 --density nan
assess model --text text.txt --length 64 --block 16 --density 0.01
assess model --text text.txt --length 64 --block 16 --seed -1
assess model --text text.txt --length 64 --block 16 --work text.txt
assess model --text text.txt --length 64 --block 16 --device-map nowhere
assess model --text text.txt --length 64 --block 16 --device-map cuda:99
assess model --text text.txt --length 64 --block 16 --device-map '{}'
assess model --text text.txt --length 64 --block 16 --device-map '{"": "nowhere"}'
assess model --text text.txt --length 64 --block 16 --device-map '{"": -7}'
learn
learn model --text text.txt --out new.json
learn model --text text.txt --density 0.8
learn model --text text.txt --density much --out new.json
learn model --text text.txt --density 0.8 --out folder
learn model --text text.txt --density 0.8 --out text.txt/new.json
learn model --text text.txt --density 0.8 --out ''
learn model --text text.txt --density 0.8 --out new.json --method magic
learn model --text text.txt --density 0.8 --out new.json --for questions
learn model --text text.txt --density 0.8 --out new.json --for answers --method window
learn model --text text.txt --density 0.8 --out new.json --arity 4
learn model --text text.txt --density 0.8 --out new.json --steps 0
learn model --text text.txt --density 0.8 --out new.json --batch -1
learn model --text text.txt --density 0.8 --out new.json --length 60 --block 16
learn model --text text.txt --density 0.8 --out new.json --length 64 --block 16 --measured-length 100
learn model --text text.txt --density 0.8 --out new.json --length 64 --block 16 --work text.txt
pilot
pilot model
pilot model kernels
pilot model kernels --text text.txt --length 0
pilot model kernels --text text.txt --sequences 0
pilot model kernels --text text.txt --tasks -1
pilot model kernels --text text.txt --ask riddles
pilot model kernels --text text.txt --recall some
pilot model kernels --text text.txt --dense-rows -1
pilot model kernels --text text.txt --dense-rows 1.5
pilot model kernels --text text.txt --min-retrieval -1
pilot model kernels --text text.txt --max-divergence 0
pilot model kernels --text text.txt --rounds 0
pilot model kernels --text text.txt --max-ppl-ratio 0
pilot model kernels --text text.txt --min-speedup inf
pilot model kernels --text text.txt --out missing/new.json
pilot model kernels --text text.txt --device-map '{'
"""


def wrong_calls() -> list[str]:
    """All lines, each once."""
    return list(dict.fromkeys([line for line in LINES.splitlines() if line] + list(_combined())))


def _combined() -> Iterator[str]:
    for names, lines in BAD_INPUTS.items():
        for line in lines:
            yield from (line.format(name) for name in names)


def make_files(folder: Path, model: Path) -> None:
    """Makes the files that the calls name; `model` is a tiny model's folder, which is copied and damaged."""
    topology = topologies.window_topology([1, 2], num_layers=2, num_blocks=4)
    document = topologies.document(
        [[topologies.DENSE, topologies.head()]], [{"linkage": [[0, 1, 1.0, 2]]}], num_blocks=2
    )
    for name, data in TOPOLOGIES.items():
        if data is not None:
            (folder / name).write_bytes(data)
    _write(folder / "topology.json", document)
    _write(folder / "head.json", topologies.document([[topologies.DENSE]], head_dim=33))
    _write(folder / "block.json", topologies.document([[topologies.DENSE]], block_size=48))
    _write(folder / "bomb.json", _bomb())
    shutil.copy(PILOT, folder / "pilot.json")
    (folder / "tiles.json").write_text('{"format": "surgeon.tiles", "version": 1, "source": "", "targets": {}}')
    texts = {"empty": b"", "latin": b"\xff", "null": b"a\0b", "short": b"1 2 3", "text": b"1 2 3 " * 2000}
    for name, data in texts.items():
        (folder / f"{name}.txt").write_bytes(data)
    (folder / "folder").mkdir()
    (folder / "folder" / "file").write_text("")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "nowhere").symlink_to("nothing")
    _make_packages(folder, packages.write(folder / "kernels", topology))
    _make_models(folder, model)


def _bomb() -> dict[str, object]:
    """A topology whose heads have a piece a block each."""
    tree = {"paths": [[block % 2] for block in range(16_384)], "arity": 2}
    heads = [topologies.head(0, 0.0, sink, 1) for sink in range(256)]
    return topologies.document([heads], [tree], num_blocks=16_384)


def _make_packages(folder: Path, package: Path) -> None:
    made = {name: Path(shutil.copytree(package, folder / name)) for name in PACKAGES[6:]}
    (made["damaged"] / "topology.json").write_text("{}")
    (made["unlisted"] / "new.py").write_text("")
    (made["linked"] / "topology.json").unlink()
    (made["linked"] / "topology.json").symlink_to(package / "topology.json")
    (made["waiting"] / "manifest.json").unlink()
    os.mkfifo(made["waiting"] / "manifest.json")
    manifest = json.loads((package / "manifest.json").read_text())
    _write(made["numbers"] / "manifest.json", manifest | {"num_blocks": 10**9})


def _make_models(folder: Path, model: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = "model.safetensors"
    made = {name: Path(shutil.copytree(model, folder / name)) for name in ("model", *MODELS[5:8])}
    os.truncate(made["model-cut"] / weights, 5000)
    (made["model-pointer"] / weights).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    renamed = {f"module.{name}": weight for name, weight in load_file(model / weights).items()}
    save_file(renamed, made["model-renamed"] / weights, {"format": "pt"})
    (folder / "no.gguf").write_bytes(b"GGUF" + bytes(64))


def _write(file: Path, document: object) -> None:
    file.write_text(json.dumps(document))
