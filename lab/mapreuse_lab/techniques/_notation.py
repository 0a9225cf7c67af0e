"""How settings become a technique's name, and a name becomes settings.

A technique writes its name as a template, "window-{radius}[-global-{num_global}]": braces hold a setting, and a
part in brackets is left out if its setting is empty.
"""

from __future__ import annotations

import json
import re
from itertools import groupby
from typing import Any

from mapreuse.plan import ReusePlan


def fill(template: str, settings: dict[str, str]) -> str:
    """The text of a template, without the bracketed parts whose setting is empty.

    >>> fill("window-{radius}[-global-{num_global}]", {"radius": "16", "num_global": ""})
    'window-16'
    """
    without_brackets = re.sub(
        r"\[([^\]]*\{(\w+)\}[^\]]*)\]", lambda part: part[1] if settings[part[2]] else "", template
    )
    return without_brackets.format(**settings)


def settings_in(template: str, name: str) -> dict[str, Any] | None:
    """The settings that make `name` from a template: a `ReusePlan` for "plan", integers for the others.

    Returns None if the name does not match. Raises `ValueError` for an invalid plan.

    >>> settings_in("window-{radius}[-global-{num_global}]", "window-16-global-1")
    {'radius': 16, 'num_global': 1}
    """
    match = _pattern(template).fullmatch(name)
    if match is None:
        return None
    texts = {setting: text for setting, text in match.groupdict().items() if text is not None}
    return {setting: ReusePlan.parse(text) if setting == "plan" else int(text) for setting, text in texts.items()}


def _pattern(template: str) -> re.Pattern[str]:
    special = {"[": "(?:", "]": ")?", "{plan}": "(?P<plan>.+?)"}
    pattern = ""
    for part in re.split(r"(\[|\]|\{\w+\})", template):
        number = rf"(?P<{part[1:-1]}>\d+)" if part.startswith("{") else re.escape(part)
        pattern += special.get(part, number)
    return re.compile(pattern)


def plan_notation(plan: ReusePlan) -> str:
    """The shortest text that `ReusePlan.parse` reads as this plan: "2x4", "[0,1,0,1]" or JSON."""
    if plan.num_heads is not None:
        return json.dumps(json.loads(plan.to_json()), separators=(",", ":"))
    sources = layer_sources(plan)
    if sources != sorted(sources):
        return json.dumps(sources, separators=(",", ":"))
    sizes = [len(list(members)) for _, members in groupby(sources)]
    return ",".join(f"{size}x{len(list(equal))}" for size, equal in groupby(sizes))


def layer_sources(plan: ReusePlan) -> list[int]:
    """For every layer of a plan without head assignments, the layer whose map it applies: its own if it computes."""
    return [(*plan.sources(layer), layer)[0] for layer in range(plan.num_layers)]
