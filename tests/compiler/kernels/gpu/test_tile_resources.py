"""A sample of the kernels that tile_resources.py checks for every target, head size and dtype."""

from pathlib import Path

import pytest

from surgeon.runtime.package.target import Target
from tile_resources import figures

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize(("target", "head_dim", "dtype"), [("cuda:80", 80, "fp16"), ("hip:gfx942", 96, "bf16")])
def test_kernels_spill_nothing_and_fit_into_shared_memory(
    target: str, head_dim: int, dtype: str, tmp_path: Path
) -> None:
    found = list(figures(Target.parse(target), head_dim, dtype, tmp_path))
    assert len(found) == 10
    assert [row for row in found if not row["fits"]] == []
    assert all(0 < row["shared_bytes"] <= row["limit"] for row in found if "combine" not in row["kernel"])
