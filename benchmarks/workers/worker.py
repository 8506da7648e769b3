"""The worker's process: loads an engine and answers requests from its standard input, one after the other.

`python -m workers.worker MODULE SETTINGS`: `MODULE.load(**SETTINGS)` gives the `Engine`.
"""

import importlib
import json
import os
import sys
import time

from workers.engine import Engine
from workers.protocol import Answer, Failed, Message, Ready, Request, line_of, message_of

_LONGEST_REASON = 300


def main(module: str, settings: str) -> int:
    """Serves until the input ends, and returns the exit status."""
    # Libraries print to the standard output; what they print there goes to the standard error.
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(message: Message) -> None:
        output.write(line_of(message))
        output.flush()

    try:
        engine: Engine = importlib.import_module(module).load(**json.loads(settings))
        say(Ready(engine.versions))
        for line in sys.stdin:
            request = message_of(line)
            if isinstance(request, Request):
                say(answer(engine, request))
    except Exception as error:
        say(Failed(f"{type(error).__name__}: {' '.join(str(error).split())[:_LONGEST_REASON]}"))
        return 1
    return 0


def answer(engine: Engine, request: Request) -> Answer:
    """Has a request answered, and times its tokens."""
    tokens: list[int] = []
    times: list[tuple[float, float]] = []

    def on_token(token: int) -> None:
        times.append((time.perf_counter(), time.process_time()))
        tokens.append(token)

    started, cpu_started = time.perf_counter(), time.process_time()
    engine.generate(list(request.prompt), request.new_tokens, on_token)
    (first, first_cpu), (last, last_cpu) = times[0], times[-1]
    return Answer(tuple(tokens), first - started, last - started, first_cpu - cpu_started, last_cpu - cpu_started)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
