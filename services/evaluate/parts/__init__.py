"""What can be measured. A part is a function of a :class:`~services.evaluate.context.Context`, and a line here.

Every part is kept by itself, so a run that was cut off goes on with the part it was in.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Final

from services.evaluate.context import Context
from services.evaluate.figures import Result

# Name -> module:function, imported when run. In the order of a run: what is wanted first comes first.
_PARTS: Final = {
    "verification": "verification:run",
    "recovery": "recovery:run",
    "detection": "detection:run",
    "lfw-pairs": "pairs:run",
    "realism": "realism:run",
    "diversity": "diversity:run",
    "background": "background:run",
    "runtime": "runtime:run",
    "baselines": "baselines:run",
    "ablations": "ablations:run",
    "video": "video:run",
    "attack-denial": "attacks:denial",
    "attack-candidates": "attacks:candidates",
    "attack-known-plaintext": "attacks_known:known_plaintext",
    "attack-known-pairs": "attacks_cover:known_pairs",
    "attack-chosen-pairs": "attacks_cover:chosen_pairs",
    "attack-pattern": "attacks_cover:pattern",
    "attack-likeness": "attacks_cover:likeness",
    "attack-outline": "attacks_cover:outline",
    "attack-hidden-linking": "attacks_cover:hidden_linking",
    "attack-invariants": "attacks_cover:invariants",
    "attack-linking": "attacks_known:linking",
    "attack-hill-climbing": "attacks:climb",
    "attack-inverter": "attacks_trained:inverter",
    "attack-code-predictor": "attacks_trained:code_predictor",
    "attack-recovery-classifier": "attacks_trained:recovery_classifier",
    "attack-sweep": "attacks:sweep",
}

# Seconds of one core at the default size; two idle cores take less. Progress shares out the time that is left by it.
SECONDS: Final = {
    "verification": 240,
    "recovery": 90,
    "detection": 45,
    "lfw-pairs": 35,
    "realism": 20,
    "diversity": 25,
    "background": 10,
    "runtime": 20,
    "baselines": 40,
    "ablations": 5,
    "video": 65,
    "attack-denial": 5,
    "attack-candidates": 60,
    "attack-known-plaintext": 60,
    "attack-known-pairs": 230,
    "attack-chosen-pairs": 50,
    "attack-pattern": 10,
    "attack-likeness": 70,
    "attack-outline": 85,
    "attack-hidden-linking": 50,
    "attack-invariants": 5,
    "attack-linking": 45,
    "attack-hill-climbing": 60,
    "attack-inverter": 100,
    "attack-code-predictor": 30,
    "attack-recovery-classifier": 40,
    "attack-sweep": 300,
}

NAMES: Final = tuple(_PARTS)
GROUPS: Final = {"attacks": tuple(name for name in NAMES if name.startswith("attack-"))}


def load(name: str) -> Callable[[Context], Result]:
    """The part of that name."""
    module, _, function = _PARTS[name].partition(":")
    part: Callable[[Context], Result] = getattr(import_module(f"services.evaluate.parts.{module}"), function)
    return part


def select(names: str) -> list[str]:
    """Names out of ``a,b`` (``attacks`` is all of those), in the order of a run; all for an empty text.

    Raises:
        ValueError: there is no such part.
    """
    wanted: set[str] = set()
    for name in filter(None, (n.strip() for n in names.split(","))):
        if name not in NAMES and name not in GROUPS:
            raise ValueError(f"there is no part {name!r}; there are {', '.join((*NAMES, *GROUPS))}")
        wanted.update(GROUPS.get(name, (name,)))
    return [name for name in NAMES if not wanted or name in wanted]
