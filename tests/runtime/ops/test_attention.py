"""The torch ops: they pass opcheck, work under torch.compile, have right gradients or none, and are thread-safe."""

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from surgeon.compiler import compile_package
from surgeon.runtime import Package, load
from surgeon.runtime.errors import PackageError, PatchError
from topologies import window_topology


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    topology = window_topology([1, 3], head_dim=32, num_layers=2)
    return load(compile_package(topology, tmp_path_factory.mktemp("package") / "kernels"))


def arguments(
    package: Package, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, float, str, int]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 90, 2, 32, generator=generator).to(dtype).transpose(1, 2)
    k, v = torch.randn(2, 2, 1, 120, 32, generator=generator).to(dtype)
    return q, k, v, torch.tensor([30, 12]), torch.tensor([0, 5]), 0.2, 0, 0, package.id, 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["attention", "attention_with_lse"])
def test_opcheck(package: Package, name: str, dtype: torch.dtype) -> None:
    op = getattr(torch.ops.surgeon, name).default
    torch.library.opcheck(op, arguments(package, dtype))
    q, k, v, _, _, *rest = arguments(package, dtype)
    torch.library.opcheck(op, (q, k, v, None, None, *rest))


def test_under_torch_compile(package: Package) -> None:
    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.ops.surgeon.attention(q * 2, k, v, None, None, 0.2, 0, 0, package.id, 0).sum(-1)  # type: ignore[no-any-return]

    q, k, v, *_ = arguments(package)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for length in (90, 1, 33):
        torch.testing.assert_close(compiled(q[:, :, :length], k, v), layer(q[:, :, :length], k, v))


def test_rotary_backward_is_an_error_and_not_a_lost_gradient(package: Package) -> None:
    q, k, v = (torch.randn(2, heads, 40, 32) for heads in (2, 1, 1))
    cos, sin = torch.randn(2, 1, 40, 32)
    out = torch.ops.surgeon.attention_rotary(q.requires_grad_(), k, v, cos, sin, None, 0.2, 0, 0, package.id, 0)
    with pytest.raises(PatchError, match="expected a forward pass only, got a call of backward"):
        out.sum().backward()


def test_a_package_that_is_not_loaded(package: Package) -> None:
    q, k, v, *_ = arguments(package)
    with pytest.raises(PackageError, match=r"expected package 0123 loaded in this process, got none"):
        torch.ops.surgeon.attention(q, k, v, None, None, 0.2, 0, 0, "0123", 0)


def test_a_package_lives_as_long_as_someone_holds_it(tmp_path: Path) -> None:
    topology = window_topology([2, 2], sink=0, head_dim=32, num_layers=1)
    held = load(compile_package(topology, tmp_path / "kernels"))
    again = load(tmp_path / "kernels")
    identity = held.id
    q, k, v, *_ = arguments(held)
    del held
    gc.collect()
    torch.ops.surgeon.attention(q, k, v, None, None, 0.2, 0, 0, identity, 0)
    del again
    gc.collect()
    with pytest.raises(PackageError, match=r"call surgeon\.runtime\.load on its folder first"):
        torch.ops.surgeon.attention(q, k, v, None, None, 0.2, 0, 0, identity, 0)


def test_cuda_and_meta_tensors(package: Package) -> None:
    q, k, v, *_ = arguments(package)
    out = torch.ops.surgeon.attention(q.to("meta"), k.to("meta"), v.to("meta"), None, None, 0.2, 0, 0, package.id, 0)
    assert out.shape == (2, 90, 2, 32)
    assert out.is_contiguous()


class Seen(TorchDispatchMode):
    """Records the names of the ops that go through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_the_dispatcher_sees_a_call_where_anyone_watches(package: Package) -> None:
    q, k, v, *_ = arguments(package)
    plain = package.attention(0, q, k, v)
    with Seen() as seen:
        watched = package.attention(0, q, k, v)
    assert "surgeon::attention" in seen.names
    torch.testing.assert_close(watched, plain, rtol=0, atol=0)

    with torch.profiler.profile() as profile:
        package.attention(0, q, k, v)
    assert "surgeon::attention" in {event.key for event in profile.key_averages()}
    assert package.attention(0, q.to("meta"), k.to("meta"), v.to("meta")).is_meta
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert package.attention(0, q, k, v).dtype == torch.bfloat16
    assert package.attention(0, q, k, v.clone().requires_grad_()).requires_grad


def test_many_threads_at_once(package: Package) -> None:
    calls = [arguments(package, seed=seed) for seed in range(8)]
    expected = [torch.ops.surgeon.attention(*call) for call in calls]

    def work(index: int) -> bool:
        return all(
            torch.equal(torch.ops.surgeon.attention(*calls[(index + step) % 8]), expected[(index + step) % 8])
            for step in range(20)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(16)))


def test_the_process_holds_one_openmp_pool(package: Package) -> None:
    torch.ops.surgeon.attention(*arguments(package))
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    assert len({path for path in mapped if "gomp" in path or "libomp" in path or "iomp" in path}) == 1
