"""How event modules change a constant or a method of the service: loudly, should the name be gone.

An event module that fails ends the service at its start, so the test that names it fails, too.
"""

from __future__ import annotations


def patch(owner: object, name: str, value: object) -> None:
    """Set an attribute that is there. Raises: AssertionError: it is not."""
    assert hasattr(owner, name), f"{_named(owner)} has no {name} any more"
    setattr(owner, name, value)


def patch_text(owner: object, name: str, old: str, new: str) -> None:
    """Replace a part of a text. Raises: AssertionError: there is none such, or more than one."""
    assert hasattr(owner, name), f"{_named(owner)} has no {name} any more"
    text: str = getattr(owner, name)
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {_named(owner)}.{name}"
    setattr(owner, name, text.replace(old, new))


def _named(owner: object) -> str:
    return str(getattr(owner, "__name__", owner))
