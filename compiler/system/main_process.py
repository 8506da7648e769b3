"""Which of several processes speaks: the first of those that torchrun or accelerate started, or the only one."""

import contextlib
import os
import time

_GRACE_SECONDS = 10.0


def is_main_process() -> bool:
    """Whether this process prints, shows progress and writes the files that all have made."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def let_the_main_process_speak() -> None:
    """Waits, in another process, for the end that comes to all when the first one ends with an error.

    Whoever started them ends all when one fails. Mostly all fail alike, and the first one is to say why. What comes
    back from here has failed alone, and says so itself.
    """
    if not is_main_process():
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(_GRACE_SECONDS)
