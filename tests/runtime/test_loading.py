"""Loading of packages: refusals, fallbacks, and the tools that a serving machine does not need."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from packages import replace_file
from surgeon.compiler import compile_package
from surgeon.runtime import load
from surgeon.runtime.errors import PackageError, PatchError, TargetError, TopologyError
from surgeon.runtime.package.manifest import Manifest
from topologies import window_topology

TOPOLOGY = window_topology([1, 2], head_dim=32, num_layers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_package(TOPOLOGY, tmp_path_factory.mktemp("package") / "kernels")


@pytest.fixture(scope="module")
def fp32_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_package(TOPOLOGY, tmp_path_factory.mktemp("package") / "kernels", dtypes=["fp32"])


def tensors(dtype: torch.dtype = torch.float32, length: int = 100) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, length, 32, generator=generator).to(dtype)
    k, v = torch.randn(2, 1, 1, length, 32, generator=generator).to(dtype)
    return q, k, v


def test_a_package_says_what_it_is(folder: Path) -> None:
    package = load(folder)
    seen = (1 + 2 * 7 + 1 + 2 + 3 * 6) / (2 * 36)  # sink and window of 1 and of 2 blocks, of 8
    assert (
        repr(package)
        == str(package)
        == (
            f"<Package for llama: 2 of 2 layers, {seen:.1%} of the blocks at 512 tokens, cpu (fp32 bf16 fp16), "
            f"id {package.id[:12]}>"
        )
    )


def test_a_part_of_a_package_says_so(tmp_path: Path) -> None:
    topology = window_topology([1, 2], num_kv_heads=2, head_dim=32)
    package = load(compile_package(topology, tmp_path / "kernels", dtypes=["fp32"]))
    assert "1 of 1 layers, KV heads range(1, 2), " in repr(package.part(range(1, 2)))


SERVING = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jinja2", "networkx", "triton"):
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Missing())
import time, torch
from surgeon.runtime import load
begin = time.perf_counter()
package = load(sys.argv[1], strict=True)
seconds = time.perf_counter() - begin
q, k, v = torch.randn(1, 2, 80, 32), torch.randn(1, 1, 80, 32), torch.randn(1, 1, 80, 32)
assert package.attention(0, q, k, v).isfinite().all()
assert not [name for name in sys.modules if name.startswith("surgeon.compiler")]
print(seconds)
"""


def test_a_serving_machine_needs_no_compiler(folder: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SERVING, str(folder)],
        env={"PATH": str(tmp_path), "HOME": str(tmp_path)},  # no g++, no ld, no ldconfig
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    print(f"loaded in {float(result.stdout):.3f} s")


def test_an_absent_target_names_those_there_are(folder: Path, tmp_path: Path) -> None:
    manifest = Manifest.from_json((folder / "manifest.json").read_text())
    only = compile_package(TOPOLOGY, tmp_path / "kernels")
    root = json.loads(manifest.to_json())
    for kernel in root["kernels"]:
        kernel["target"] = "cuda:90"
    (only / "manifest.json").write_text(json.dumps(root))
    with pytest.raises(TargetError, match=r"expected kernels for cpu, got only cuda:90; compile the package again"):
        load(only)


def test_an_unknown_variant(folder: Path) -> None:
    with pytest.raises(TargetError, match=r"variant z80: expected one of .*portable, got one that the library lacks"):
        load(folder, cpu_variant="z80")


def test_a_library_of_another_kind(folder: Path, tmp_path: Path) -> None:
    package = compile_package(TOPOLOGY, tmp_path / "kernels")
    replace_file(package, "cpu/attention.so", b"\x7fELF, or so it says")
    with pytest.raises(PackageError, match=r"attention\.so: expected a library for this machine"):
        load(package)


def test_a_library_that_is_not_ours(tmp_path: Path) -> None:
    package = compile_package(TOPOLOGY, tmp_path / "kernels")
    foreign = next(Path(torch.__file__).parent.glob("lib/libgomp*")).read_bytes()
    replace_file(package, "cpu/attention.so", foreign)
    with pytest.raises(PackageError, match=r"attention\.so: expected a library made by surgeon"):
        load(package)


def test_a_symbol_that_is_not_there(tmp_path: Path) -> None:
    package = compile_package(TOPOLOGY, tmp_path / "kernels")
    root = json.loads((package / "manifest.json").read_text())
    root["kernels"][0]["symbol"] = "system"
    (package / "manifest.json").write_text(json.dumps(root))
    with pytest.raises(PackageError, match=r"kernels\[0\]\.symbol: expected 'surgeon_attention_000', got 'system'"):
        load(package)


def test_a_package_is_loaded_by_its_identity(folder: Path) -> None:
    package = load(folder)
    for identity in (package.id, package.id.upper()):
        assert load(folder, sha256=identity).id == package.id
    for other in ("0" * 64, "", package.id[:-1]):
        with pytest.raises(PackageError, match=f"expected the package '{other}', got {package.id}; use the package"):
            load(folder, sha256=other)


def test_two_packages_are_not_mixed_up(folder: Path, tmp_path: Path) -> None:
    other = compile_package(window_topology([3, 3], sink=0, head_dim=64, num_layers=1), tmp_path / "kernels")
    first, second = load(folder), load(other)
    q, k, v = tensors()
    before = first.attention(0, q, k, v)
    second.attention(0, torch.randn(1, 2, 50, 64), torch.randn(1, 1, 50, 64), torch.randn(1, 1, 50, 64))
    assert torch.equal(load(folder).attention(0, q, k, v), before)
    assert first.id != second.id


def test_each_load_keeps_its_own_options(fp32_only: Path) -> None:
    relaxed, strict = load(fp32_only), load(fp32_only, strict=True)
    portable = load(fp32_only, cpu_variant="portable")
    arguments = tensors(torch.bfloat16)
    for package in (relaxed, portable):
        assert package.attention(0, *arguments).dtype == torch.bfloat16
    with pytest.raises(PatchError):
        strict.attention(0, *arguments)
    assert len({relaxed.id, strict.id, portable.id, load(fp32_only, strict=True, cpu_variant="portable").id}) == 4
    assert load(fp32_only).id == relaxed.id


def test_a_dtype_that_the_package_lacks_falls_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # A separate package: another load of the same one may have warned already.
    topology = window_topology([2, 1], head_dim=32, num_layers=2)
    package = load(compile_package(topology, tmp_path / "kernels", dtypes=["fp32"]))
    q, k, v = tensors(torch.bfloat16)
    with caplog.at_level("WARNING", logger="surgeon"):
        out = package.attention(0, q, k, v)
        package.attention(1, q, k, v)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, package.attention(0, q.float(), k.float(), v.float()).bfloat16())
    assert [record.message for record in caplog.records] == [
        f"package {package.id[:12]} has no torch.bfloat16 kernels: calls run in float32"
    ]


def test_strict_makes_the_fall_back_an_error(fp32_only: Path) -> None:
    with pytest.raises(PatchError, match=r"expected one of torch\.float32, got torch\.bfloat16"):
        load(fp32_only, strict=True).attention(0, *tensors(torch.bfloat16))


def test_fp64_is_refused(folder: Path) -> None:
    with pytest.raises(PatchError, match=r"got torch\.float64; convert the tensors"):
        load(folder).attention(0, *tensors(torch.float64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda q, k, v: (q[..., :16], k, v),
            r"attention: q: expected \[batch, 2, length, 32\], got \[1, 2, 100, 16\]",
        ),
        (lambda q, k, v: (q[:, :1], k, v), r"attention: q: expected \[batch, 2, length, 32\], got \[1, 1, 100, 32\]"),
        (lambda q, k, v: (q, q, q), r"attention: k: expected \[1, 1, length, 32\], got \[1, 2, 100, 32\]"),
        (lambda q, k, v: (q, k, v[:, :, :50]), r"attention: v: expected \[1, 1, 100, 32\], as k, got \[1, 1, 50, 32\]"),
        (
            lambda q, k, v: (q, k.bfloat16(), v),
            r"attention: k: expected torch.float32 on cpu, as q, got torch.bfloat16",
        ),
        (lambda q, k, v: (q[0], k, v), r"attention: q: expected \[batch, 2, length, 32\], got \[2, 100, 32\]"),
        (lambda q, k, v: (q, k[0], v), r"attention: k: expected \[1, 1, length, 32\], got \[1, 100, 32\]"),
    ],
)
def test_tensors_that_do_not_fit(folder: Path, change: object, message: str) -> None:
    with pytest.raises(PatchError, match=message):
        load(folder).attention(0, *change(*tensors()))  # type: ignore[operator]


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_is_not_there(folder: Path, layer: int) -> None:
    with pytest.raises(
        PatchError, match=rf"attention: layer: expected one of the layers \(0, 1\) that .*, got {layer}"
    ):
        load(folder).attention(layer, *tensors())


@pytest.mark.parametrize(
    ("position", "cache_leftpad"),
    [(-1, 0), (1, 0), (0, -1), (torch.tensor([10**12]), 0), (torch.tensor([-(10**12)]), 0)],
)
def test_a_position_outside_the_keys(folder: Path, position: int | torch.Tensor, cache_leftpad: int) -> None:
    with pytest.raises(TopologyError, match="attention: position, cache_leftpad: expected"):
        load(folder).attention(0, *tensors(), position=position, cache_leftpad=cache_leftpad)


@pytest.mark.parametrize("wrong", [torch.tensor([0, 0]), torch.tensor([0.0]), torch.tensor(0)])
def test_a_position_of_the_wrong_kind(folder: Path, wrong: torch.Tensor) -> None:
    with pytest.raises(PatchError, match=r"attention: position: expected an int or an integer tensor \[1\]"):
        load(folder).attention(0, *tensors(), position=wrong)
    with pytest.raises(PatchError, match=r"attention: cache_leftpad: expected an int or an integer tensor \[1\]"):
        load(folder).attention(0, *tensors(), cache_leftpad=wrong)


def test_a_sequence_beyond_the_topology(tmp_path: Path) -> None:
    topology = window_topology([1], head_dim=32, num_blocks=2, beyond="error")
    package = load(compile_package(topology, tmp_path / "kernels"))
    k = torch.randn(1, 1, 300, 32)
    assert package.attention(0, k[:, :, :128], k, k, position=0).shape == (1, 128, 1, 32)
    assert package.attention(0, k[:, :, :1], k, k, position=200, cache_leftpad=100).shape == (1, 1, 1, 32)
    for length, position in ((129, 0), (1, 128)):
        with pytest.raises(TopologyError, match=r"beyond: error\), got a longer one"):
            package.attention(0, k[:, :, :length], k, k, position=position)


def test_loading_again_is_quick(folder: Path) -> None:
    begin = time.perf_counter()
    assert load(folder).id == load(folder).id
    print(f"two loads in {time.perf_counter() - begin:.3f} s")


def test_no_queries_and_no_sequences(folder: Path) -> None:
    q, k, v = tensors()
    package = load(folder)
    assert package.attention(0, q[:, :, :0], k, v).shape == (1, 0, 2, 32)
    assert package.attention(0, q[:0], k[:0], v[:0]).shape == (0, 100, 2, 32)
