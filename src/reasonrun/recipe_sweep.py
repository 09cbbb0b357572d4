"""The values that one override of a sweep tries, by Hydra's own grammar.

>>> values("task.num_shots=1,2")
('task.num_shots=1', 'task.num_shots=2')
>>> values("launcher.devices=[0,1]")
('launcher.devices=[0,1]',)
"""

from __future__ import annotations

from hydra.errors import HydraException

from reasonrun.recipe_compose import override_parser


def values(text: str) -> tuple[str, ...]:
    """One override for each value: ``a,b``, ``range(0,3)`` and ``choice(a,b)`` are several, all else is one.

    What Hydra cannot read or count stays as it is: loading the recipe reports it with its place.
    """
    key, equals, raw = text.lstrip("+").partition("=")
    if not equals:
        return (text,)
    try:
        parsed = override_parser().parse_override(f"++{key}={raw}")
        if not parsed.is_sweep_override():
            return (text,)
        return tuple(f"{key}={value}" for value in parsed.sweep_string_iterator())
    except HydraException:
        return (text,)
