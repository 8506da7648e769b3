"""The main process: the only one, or the first of those that torchrun or accelerate started; it alone prints."""

import contextlib
import os
import time

_GRACE_SECONDS = 10.0


def is_main_process() -> bool:
    """True in the process that prints, shows progress and writes the files that all have made."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def let_the_main_process_speak() -> None:
    """Waits, in the other processes, to be ended after the main process has ended with an error.

    The launcher ends all processes when one fails. Usually all fail alike, and the main process should say why. A
    process that returns from here has failed alone, and says so itself.
    """
    if not is_main_process():
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(_GRACE_SECONDS)
