"""Routed heads' speeds as rows of the table of figures."""

from collections.abc import Iterator

from committed import suite
from inputs.checkpoints import QWEN_CODER_05B

_TITLE = QWEN_CODER_05B.title


def routed() -> Iterator[tuple[str, str]]:
    """Attention for a prompt and for one token, and the model with it, by what was measured and the result."""
    for row in suite("routed-prefill")["rows"]:
        yield (
            f"{_TITLE}, routed heads, {row['routed_density']:.0%} of the blocks: attention for {row['length']:,} tokens"
            f" of text, {row['dtype']}",
            f"{row['of_windows']:.2f} of the speed of as many blocks of windows, {row['times_sdpa']:.2f}x SDPA",
        )
    for row in suite("routed-decode")["rows"]:
        yield (
            f"{_TITLE}, routed heads: attention for one token behind {row['length']:,}, {row['dtype']}",
            f"{row['times_folded']:.2f}x SDPA whose queries are a group's heads (windows of about the same density "
            f"{row['windows_times_folded']:.2f}x); {row['routed_mb']:.0f} MB read, windows {row['windows_mb']:.0f}, "
            f"dense {row['dense_mb']:.0f}",
        )
    for row in suite("model-routed")["rows"]:
        yield (
            f"{_TITLE}, {row['length']:,} tokens, fp32, by routed heads and by windows alone",
            f"first token {row['routed_first_token']:.2f}x and {row['windows_first_token']:.2f}x, decoding "
            f"{row['routed_decoding']:.2f}x and {row['windows_decoding']:.2f}x",
        )
