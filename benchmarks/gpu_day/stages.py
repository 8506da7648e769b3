"""The stages of a day, in their order."""

from collections.abc import Callable
from pathlib import Path

from gpu_day.day import Day, Tell
from gpu_day.model import model_speed
from gpu_day.smoke import smoke
from gpu_day.speed import speed
from gpu_day.suite import suite
from gpu_day.tiles import tiles

Stage = Callable[[Day, Path, Tell], None]
"""Takes the day and the folder of the packages; tells its rows."""

STAGES: dict[str, Stage] = {"smoke": smoke, "suite": suite, "tiles": tiles, "speed": speed, "model": model_speed}
