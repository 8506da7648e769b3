"""The direct op: the bits of the way through Python, or None; and packages whose library is missing or of no use."""

import gc
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from packages import replace_file
from surgeon.compiler import compile_package
from surgeon.compiler.kernels.cpu import direct as built
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime import Package, load
from surgeon.runtime.errors import PackageError, PatchError, TopologyError
from surgeon.runtime.kernels.cpu.direct import DirectOp
from surgeon.runtime.operands import Operands
from surgeon.runtime.package.manifest import CPU_ABI_VERSION, DIRECT_LIBRARY
from topologies import window_topology

Change = Callable[[Operands], Operands]
HEADS, HEAD_DIM, KEYS = 4, 32, 90
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def topology(beyond: str = "window") -> Topology:
    return window_topology([1, 2, 3, 1], num_kv_heads=2, head_dim=HEAD_DIM, num_layers=2, beyond=beyond)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_package(topology(), tmp_path_factory.mktemp("direct") / "kernels")


@pytest.fixture(scope="module")
def package(folder: Path) -> Package:
    return load(folder)


def operands(queries: int = 1, dtype: torch.dtype = torch.float32, keys: int = KEYS) -> Operands:
    generator = torch.Generator().manual_seed(queries)
    q = torch.randn(2, queries, HEADS, HEAD_DIM, generator=generator).to(dtype).transpose(1, 2)
    k, v = torch.randn(2, 2, 2, keys, HEAD_DIM, generator=generator).to(dtype)
    return Operands(q, k, v, None, None, 0.2)


def direct(package: Package, given: Operands, layer: int = 0) -> torch.Tensor | None:
    call = package.kernels.direct(layer)
    assert call is not None
    with torch.no_grad():
        return call(*given)


def changed(folder: Path, tmp_path: Path, data: bytes) -> Path:
    """A copy of a package with other bytes for the op's library."""
    copied = shutil.copytree(folder, tmp_path / "kernels")
    replace_file(copied, DIRECT_LIBRARY, data)
    return copied


CASES: dict[str, Change] = {
    "plain": lambda given: given,
    "a position each": lambda given: given._replace(position=torch.tensor([40, 57])),
    "positions that are not contiguous": lambda given: given._replace(position=torch.tensor([[40, 1], [57, 2]])[:, 0]),
    "padding on the left": lambda given: given._replace(cache_leftpad=torch.tensor([0, 11])),
    "only padding": lambda given: given._replace(cache_leftpad=torch.tensor([90, 3])),
    "dense rows": lambda given: given._replace(dense_rows=20),
    "dense rows ahead": lambda given: given._replace(dense_rows=40, tokens_ahead=24),
    "another scale": lambda given: given._replace(scale=0.7),
    "keys by token": lambda given: given._replace(k=given.k.transpose(1, 2).contiguous().transpose(1, 2)),
    "a part of a longer cache": lambda given: given._replace(
        k=torch.cat((given.k, given.k), dim=2)[:, :, :KEYS], v=torch.cat((given.v, given.v), dim=2)[:, :, :KEYS]
    ),
    "keys of all sequences alike": lambda given: given._replace(k=given.k[:1].expand(2, -1, -1, -1)),
}


@pytest.mark.parametrize("queries", [1, 2, 33])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_the_bits_of_the_way_through_python(package: Package, case: str, dtype: torch.dtype, queries: int) -> None:
    given = CASES[case](operands(queries, dtype))
    for layer in (0, 1):
        found = direct(package, given, layer)
        if queries == 1:  # with more of them Python may choose torch
            assert found is not None
        if found is not None:
            expected = package.kernels.run(layer, given)
            assert torch.equal(found, expected)
            assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())


def test_a_part_of_the_heads(package: Package) -> None:
    given = operands()
    part = package.part(range(1, 2))
    found = direct(part, given._replace(q=given.q[:, 2:], k=given.k[:, 1:], v=given.v[:, 1:]))
    whole = direct(package, given)
    assert found is not None
    assert whole is not None
    assert torch.equal(found, whole[:, :, 2:])


LEFT: dict[str, Change] = {
    "another number of heads": lambda given: given._replace(q=given.q[:, :2]),
    "another number of KV heads": lambda given: given._replace(k=given.k[:, :1], v=given.v[:, :1]),
    "another head size": lambda given: given._replace(q=given.q[..., :16], k=given.k[..., :16], v=given.v[..., :16]),
    "another batch": lambda given: given._replace(k=given.k[:1], v=given.v[:1]),
    "three dimensions": lambda given: given._replace(q=given.q[0]),
    "fewer values than keys": lambda given: given._replace(v=given.v[:, :, 1:]),
    "no sequences": lambda given: given._replace(q=given.q[:0], k=given.k[:0], v=given.v[:0]),
    "no queries": lambda given: given._replace(q=given.q[:, :, :0]),
    "dtypes that differ": lambda given: given._replace(k=given.k.bfloat16()),
    "a dtype without kernels": lambda given: given.to(torch.float64),
    "dimensions that are not contiguous": lambda given: given._replace(k=given.k.mT.contiguous().mT),
    "more sequences than it has room for": lambda given: given._replace(
        q=given.q[:1].expand(65, -1, -1, -1), k=given.k[:1].expand(65, -1, -1, -1), v=given.v[:1].expand(65, -1, -1, -1)
    ),
    "positions of 32 bits": lambda given: given._replace(position=torch.tensor([40, 57], dtype=torch.int32)),
    "one position": lambda given: given._replace(position=torch.tensor([40])),
    "a position after the keys": lambda given: given._replace(position=torch.tensor([40, 90])),
    "a negative position": lambda given: given._replace(position=torch.tensor([40, -1])),
    "a negative padding": lambda given: given._replace(cache_leftpad=torch.tensor([-1, 0])),
    "negative dense rows": lambda given: given._replace(dense_rows=-1),
    "too many tokens ahead": lambda given: given._replace(dense_rows=1, tokens_ahead=2**31),
    "tensors without values": lambda given: given._replace(
        q=given.q.to("meta"), k=given.k.to("meta"), v=given.v.to("meta")
    ),
    "positions without values": lambda given: given._replace(position=torch.zeros(2, dtype=torch.int64, device="meta")),
    "sparse keys": lambda given: given._replace(k=given.k.to_sparse()),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_to_python(package: Package, case: str) -> None:
    assert direct(package, LEFT[case](operands())) is None


def test_another_number_of_keys_than_the_positions_are_for(package: Package) -> None:
    call = package.kernels.direct(0)
    assert call is not None
    with torch.no_grad():
        assert call(*operands(), KEYS) is not None
        assert call(*operands(), KEYS - 1) is None


def test_gradients_are_left_to_python(package: Package) -> None:
    call = package.kernels.direct(0)
    assert call is not None
    assert call(*operands()) is None


class _Sees(TorchDispatchMode):
    """Notes the ops that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_dispatch__(self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_modes_and_transforms_see_the_op_that_graphs_hold(package: Package) -> None:
    given = operands()
    with torch.no_grad(), _Sees() as mode:
        package.attention(0, *given[:3])
    assert mode.seen[0] is torch.ops.surgeon.attention.default
    with torch.autocast("cpu", torch.bfloat16):
        assert direct(package, given) is None
    torch.func.vmap(lambda q: pytest.fail("direct") if direct(package, given._replace(q=q)) is not None else q)(
        given.q[None]
    )


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (LEFT["another number of heads"], PatchError),
        (LEFT["a position after the keys"], TopologyError),
        (LEFT["negative dense rows"], PatchError),
    ],
)
def test_wrong_calls_are_refused_as_without_it(package: Package, change: Change, error: type[Exception]) -> None:
    given = change(operands())
    with torch.no_grad(), pytest.raises(error, match=r"^attention: .* expected "):
        package.attention(0, *given[:3], given.scale, given.position, dense_rows=given.dense_rows)


def test_beyond_the_topology(tmp_path: Path) -> None:
    strict = load(compile_package(topology("error"), tmp_path / "kernels"))
    tokens = strict.manifest.num_blocks * strict.manifest.block_size
    assert direct(strict, operands(keys=tokens)) is not None
    assert direct(strict, operands(keys=tokens + 1)) is None


def test_a_number_that_is_no_layer(package: Package) -> None:
    call = package.kernels.direct(0)
    with torch.no_grad():
        for number in (0, -1, 2**14, 2**40, -(2**63)):
            assert call.func(number, *operands()) is None  # type: ignore[union-attr]


def test_calls_end_with_their_package(folder: Path) -> None:
    package = load(folder, cpu_variant="portable")  # kernels of its own
    call = package.kernels.direct(0)
    assert direct(package, operands()) is not None
    assert call is not None
    del package
    gc.collect()
    with torch.no_grad():
        assert call(*operands()) is None


def test_from_several_threads(package: Package) -> None:
    expected = direct(package, operands())
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: direct(package, operands()), range(64)):
            assert torch.equal(found, expected)  # type: ignore[arg-type]


def test_packages_side_by_side(package: Package, tmp_path: Path) -> None:
    wide = window_topology([1, 2, 3, 1], num_kv_heads=2, head_dim=64, num_layers=1)
    other = load(compile_package(wide, tmp_path / "kernels"))
    given = operands()
    q, k, v = (torch.cat((tensor, tensor), dim=-1) for tensor in given[:3])
    larger = Operands(q, k, v, None, None, 0.2)
    for _ in range(2):
        assert torch.equal(direct(package, given), package.kernels.run(0, given))  # type: ignore[arg-type]
        assert torch.equal(direct(other, larger), other.kernels.run(0, larger))  # type: ignore[arg-type]
        assert direct(other, given) is None


def _works(package: Package) -> None:
    assert package.kernels.direct(0) is None
    given = operands()
    with torch.no_grad():
        assert torch.equal(package.attention(0, *given[:3], 0.2), package.kernels.run(0, given))


def test_a_package_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "surgeon")
    monkeypatch.setattr(built, "torch_folder", lambda: None)
    folder = compile_package(topology(), tmp_path / "kernels")
    assert "cpu/direct.so is not built: torch's headers are not installed" in caplog.text
    assert not (folder / DIRECT_LIBRARY).exists()
    _works(load(folder))
    assert "not in the package, so every call goes through Python" in caplog.text


def test_headers_that_the_compiler_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "surgeon")
    monkeypatch.setenv("SURGEON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(built, "torch_folder", lambda: tmp_path / "nothing")
    folder = compile_package(topology(), tmp_path / "kernels", dtypes=["fp32"])
    assert not (folder / DIRECT_LIBRARY).exists()
    assert "cpu/direct.so is not built: " in caplog.text


def test_bytes_that_are_no_library(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "surgeon")
    _works(load(changed(folder, tmp_path, b"\x7fELF, or so it says")))
    assert "every call goes through Python: " in caplog.text


def test_a_library_without_the_entry_points(folder: Path, tmp_path: Path) -> None:
    other = (folder / "cpu/attention.so").read_bytes()  # which has the version and the size, but no op
    _works(load(changed(folder, tmp_path, other)))


def test_a_library_of_another_version(folder: Path) -> None:
    data = (folder / DIRECT_LIBRARY).read_bytes()
    code = b"\xb8" + CPU_ABI_VERSION.to_bytes(4, "little") + b"\xc3"  # mov eax, version; ret
    if data.count(code) != 1:
        pytest.skip("the version's code looks otherwise on this processor")
    changed = data.replace(code, b"\xb8" + (CPU_ABI_VERSION + 1).to_bytes(4, "little") + b"\xc3")
    with pytest.raises(PackageError, match=f"expected interface version {CPU_ABI_VERSION}, got"):
        DirectOp(changed, "direct.so")


def test_a_torch_that_does_not_take_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "surgeon")
    monkeypatch.setattr("surgeon.runtime.kernels.cpu.direct._op_of", lambda _library: None)
    _works(load(folder))
    assert "expected the library of an op for this torch" in caplog.text


def test_the_hash_of_its_bytes_is_checked_as_of_others(folder: Path, tmp_path: Path) -> None:
    data = bytearray((folder / DIRECT_LIBRARY).read_bytes())
    copied = changed(folder, tmp_path, bytes(data))
    data[-1] ^= 1
    (copied / DIRECT_LIBRARY).write_bytes(data)
    with pytest.raises(PackageError, match=r"cpu/direct\.so: expected SHA-256"):
        load(copied)
