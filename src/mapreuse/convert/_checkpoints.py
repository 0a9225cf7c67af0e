"""The checkpoints that long runs leave in a folder."""

from __future__ import annotations

from pathlib import Path


def checkpoints(folder: Path) -> list[Path]:
    """`checkpoint-<step>` in a folder, by their steps; whatever else is there is not ours."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))
