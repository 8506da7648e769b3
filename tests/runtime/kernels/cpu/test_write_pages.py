"""New keys and values are written into pages where the definition says, and nowhere else."""

from collections.abc import Callable

import pytest
import torch

from models import sparse_topology
from surgeon.compiler import compile_package
from surgeon.runtime import Package, load
from surgeon.runtime.errors import PatchError

PAGES, PAGE = 5, 48


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return load(compile_package(sparse_topology(), tmp_path_factory.mktemp("pages") / "package"))


def inputs(package: Package, slots: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Keys and values that are parts of one tensor, as vLLM's, for slots in random order, of which some are padding."""
    shape = package.manifest.model
    generator = torch.Generator().manual_seed(slots)
    heads, size = shape.num_key_value_heads, shape.head_dim
    k, v = torch.randn(slots, 2 * heads, size, generator=generator).to(dtype).split(heads, dim=1)
    places = torch.randperm(PAGES * PAGE, generator=generator)[:slots]
    places[::7] = -1
    return {"k": k, "v": v, "slots": places, "pages": torch.full((PAGES, heads, PAGE, 2 * size), 7, dtype=dtype)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [0, 1, 3, PAGES * PAGE])
def test_tokens_go_to_their_slots(package: Package, slots: int, dtype: torch.dtype) -> None:
    given = inputs(package, slots, dtype)
    expected = given["pages"].clone()
    heads, size = given["k"].shape[1:]
    for slot, key, value in zip(given["slots"].tolist(), given["k"], given["v"], strict=True):
        if slot >= 0:
            halves = expected[slot // PAGE].view(heads, 2, PAGE, size)
            halves[:, 0, slot % PAGE], halves[:, 1, slot % PAGE] = key, value
    package.kernels.write_pages(**given)
    assert torch.equal(given["pages"], expected)


def test_threads_change_nothing(package: Package) -> None:
    given = inputs(package, PAGES * PAGE)
    alone = given | {"pages": given["pages"].clone()}
    package.kernels.write_pages(**alone)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        package.kernels.write_pages(**given)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(given["pages"], alone["pages"])


def test_tokens_without_a_slot_are_left_out(package: Package) -> None:
    given = inputs(package, 9)
    given["slots"] = given["slots"][:3]
    package.kernels.write_pages(**given)
    heads, size = given["k"].shape[1:]
    written = (given["pages"].view(PAGES, heads, 2, PAGE, size) != 7).any(dim=-1)
    assert int(written.sum()) == 2 * heads * 2  # keys and values; the first token is padding


def test_a_slot_behind_the_pages(package: Package) -> None:
    given = inputs(package, 3)
    given["slots"][2] = PAGES * PAGE
    with pytest.raises(PatchError, match="write: slots: expected slots below 240, those of the pages, got 240"):
        package.kernels.write_pages(**given)
    assert bool((given["pages"] == 7).all())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("pages", lambda pages: pages[..., :-1], r"pages: expected \[pages, 2, page tokens, 64\], contiguous"),
        ("pages", lambda pages: pages.transpose(2, 3), "pages: expected .*, contiguous"),
        ("pages", lambda pages: pages.half(), "k: expected torch.float16, as the pages, on cpu, got torch.float32"),
        ("slots", lambda slots: slots.int(), "slots: expected torch.int64 on cpu, got torch.int32"),
        ("slots", lambda slots: slots[::2], r"slots: expected \[tokens\], contiguous"),
        ("slots", lambda slots: slots[None], r"slots: expected \[tokens\], contiguous"),
        ("k", lambda k: k[:-1], r"k: expected \[9 or more, 2, 32\], got \[8, 2, 32\]"),
        ("v", lambda v: v[..., 1:], r"v: expected \[9 or more, 2, 32\]"),
        ("v", lambda v: v.half(), "v: expected torch.float32, as the pages, on cpu, got torch.float16"),
    ],
)
def test_what_does_not_fit(
    package: Package, name: str, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    given = inputs(package, 9)
    given[name] = change(given[name])
    with pytest.raises(PatchError, match=message):
        package.kernels.write_pages(**given)
