"""The work that a topology asks for is limited before it is done, well above what real topologies ask for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

import strategies
import topologies
from surgeon.compiler.schedule import limits, schedule, segment_tables
from surgeon.compiler.schedule.fragments import CutBlocks
from surgeon.compiler.schedule.limits import MAX_ROWS, check_size, most_pieces
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.topology.read import read_topology
from surgeon.compiler.topology.topology import SparseHead, Topology
from surgeon.runtime.errors import TargetError, TopologyError
from surgeon.runtime.package.schedule import MAX_PIECES, HeadSchedule, Piece, Run

SHIPPED = Path(__file__).parents[3] / "benchmarks" / "topologies"


def interleaved(num_blocks: int, clusters: int = 2) -> dict[str, Any]:
    """A tree whose cut at 0 is `clusters` clusters that take turns, block by block: the most pieces that there are."""
    return {"paths": [[block % clusters] for block in range(num_blocks)], "arity": clusters}


def bomb(num_blocks: int, heads: int, layers: int) -> Topology:
    """Every head another schedule, of a piece a block."""
    rows = [[topologies.head(0, 0.0, head, 1 + layer) for head in range(heads)] for layer in range(layers)]
    return topologies.build(rows, [interleaved(num_blocks)], num_blocks=num_blocks)


@pytest.fixture
def _no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a head was scheduled")

    monkeypatch.setattr(schedule, "_sparse_schedule", fail)


@pytest.mark.usefixtures("_no_work")
def test_a_schedule_of_too_many_pieces_is_refused_before_it_is_made() -> None:
    with pytest.raises(TopologyError) as caught:
        schedule_layers(bomb(16_384, 512, 1))
    assert str(caught.value).startswith(
        "layers: expected at most 2,097,152 pieces in the schedules of the distinct layers, got up to 8,389,632; lower "
    )


@pytest.mark.usefixtures("_no_work")
def test_too_many_rows_are_refused_before_any_cluster_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Iterator[None]:
        raise AssertionError("a tree was cut")

    monkeypatch.setattr(limits, "by_cut", fail)
    topology = bomb(8, 8, 16)
    monkeypatch.setattr(limits, "MAX_ROWS", 8 * 8 * 16 - 1)
    with pytest.raises(TopologyError, match=r"1,023 rows of .*, got 1,024: 16 layers of 8 heads of 8 blocks; let"):
        schedule_layers(topology)


def test_equal_layers_count_once_and_others_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package stores the pieces of every distinct layer, also where layers have the same heads in another order."""
    first, second, third = ([topologies.head(0, 0.0, sink, 1) for sink in sinks] for sinks in ((0, 1), (1, 0), (1, 2)))
    most = most_pieces(16, 16)
    for layers, pieces in (([first, first], 2), ([first, second], 4), ([first, third], 4)):
        topology = topologies.build(layers, [interleaved(16)], num_blocks=16)
        monkeypatch.setattr(limits, "MAX_PIECES", pieces * most)
        check_size(topology)
        monkeypatch.setattr(limits, "MAX_PIECES", pieces * most - 1)
        with pytest.raises(TopologyError, match=f"got up to {pieces * most}; "):
            check_size(topology)


@settings(max_examples=30)
@given(strategies.checked_topologies())
def test_no_head_has_more_pieces_or_runs_than_were_counted(topology: Topology) -> None:
    for heads, layer in zip(topology.layers, schedule_layers(topology), strict=True):
        for head, made in zip(heads, layer.heads, strict=True):
            if isinstance(head, SparseHead):
                cut = CutBlocks.of(topology.dendrograms[head.dendrogram], head.cut)
                most = most_pieces(len(cut.fragments(head.window)[0]), topology.num_blocks)
                assert len(made.pieces) <= most
                assert len(made.runs) <= 2 * most


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.json")), ids=lambda file: file.stem)
def test_what_was_learned_is_far_below_the_limits(file: Path) -> None:
    topology = read_topology(file)
    pieces = sum(len(head.pieces) for layer in set(schedule_layers(topology)) for head in set(layer.heads))
    assert pieces < MAX_PIECES / 100
    assert len(topology.layers) * topology.model.num_attention_heads * topology.num_blocks < MAX_ROWS / 100


def test_a_large_model_at_a_million_tokens_is_below_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 80 layers of 64 heads: every one with a window of its own, half of them with contiguous clusters."""
    tree = {"linkage": topologies.balanced_tree(16_384)}
    heads = [topologies.head(0, 7.0 * (number % 2), number % 4, 1 + number) for number in range(4 * 64)]
    layers = [heads[begin : begin + 64] for begin in range(0, len(heads), 64)]
    topology = topologies.build(layers, [tree], num_kv_heads=8, head_dim=128, num_blocks=16_384)
    assert MAX_ROWS > 80 * 64 * 16_384
    monkeypatch.setattr(limits, "MAX_PIECES", MAX_PIECES // 20)
    check_size(topology)


def test_a_hash_is_computed_once() -> None:
    """Layers of many heads are looked up by the hashes of all of them."""
    computed = 0

    class Counted(tuple[Piece, ...]):
        def __hash__(self) -> int:
            nonlocal computed
            computed += 1
            return super().__hash__()

    head = HeadSchedule((Run(0, 1),), Counted([Piece(0, 2, 0, 1, 0, False)]))
    assert len({(head, head), (head, head, head)}) == 2
    assert computed == 1
    assert hash(head) == hash(HeadSchedule((Run(0, 1),), (Piece(0, 2, 0, 1, 0, False),)))


def test_tables_of_too_many_segments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (layer,) = schedule_layers(topologies.build([[topologies.head()]], [interleaved(8)], num_blocks=8))
    number = sum(piece.end_run - piece.first_run + 1 for piece in layer.heads[0].pieces)
    wanted = {"a": (layer, segment_tables.TableShape("prefill", 4, 2))}
    monkeypatch.setattr(segment_tables, "MAX_SEGMENTS", 8 * number)
    assert list(segment_tables.segment_tables(wanted)) == ["a"]
    monkeypatch.setattr(segment_tables, "MAX_SEGMENTS", 8 * number - 1)
    with pytest.raises(TargetError, match=rf"layers: expected at most .* segments .*, got up to {8 * number}; leave"):
        segment_tables.segment_tables(wanted)


def test_the_fragments_of_a_cut() -> None:
    tree = topologies.build([[topologies.head()]], [interleaved(6, 3)], num_blocks=6).dendrograms[0]
    cut = CutBlocks.of(tree, 0.0)
    assert (cut.last - cut.first).tolist() == [3] * 6
    begins, labels = cut.fragments(window=3)
    assert begins.tolist() == list(range(6))
    assert len(set(labels.tolist())) == 3
    begins, labels = cut.fragments(window=4)
    assert (begins.tolist(), labels.tolist()) == ([0], [-1])
    assert np.array_equal(cut.labels, tree.labels(0.0))
