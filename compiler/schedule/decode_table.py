"""What each row of each KV head reads at decode time: the union of its query heads' blocks, with a bit for each head.

All query heads of a KV head share one pass over its keys, though they see different blocks. The union changes from row
to row, so it is a table that a package carries as constants, not code.
"""

from surgeon.compiler.schedule.schedule import LayerSchedule
from surgeon.compiler.schedule.segments import Plan, SegmentTable, head_stretches, make_table, unions

MAX_GROUP = 31
"""The most query heads a KV head for which a table can be made: a bit each."""


def decode_table(layer: LayerSchedule) -> SegmentTable:
    """Makes a layer's table in blocks: a pattern is a KV head, the readers are its query heads.

    Its size follows the pieces of the heads, that of `rows` where the last one begins. No segments stand apart: splits
    of the keys want them all in order.
    """
    group = len(layer.heads) // layer.num_key_value_heads
    groups = [layer.heads[begin : begin + group] for begin in range(0, len(layer.heads), group)]
    found = {}
    for heads in dict.fromkeys(groups):
        readers = [head_stretches(head, rows=1, blocks=1, first_reader=index) for index, head in enumerate(heads)]
        found[heads] = [Plan(first_row, segments, shared=0) for first_row, segments in unions(readers, step=1)]
    return make_table((found[heads] for heads in groups), layer.num_rows)
