"""Marks on a dataclass's fields that say how its command line treats them: Annotated[Path, POSITIONAL].

They are ours, and become tyro's when a command line is parsed, so that nothing else imports tyro. A run that another
program starts needs none.
"""

from typing import Annotated

HIDDEN = "no flag"
POSITIONAL = "no flag, but its place on the line"


def mark_for_tyro(*kinds: type) -> None:
    """Give the marked fields of dataclasses tyro's marks. Call this before tyro.cli."""
    import tyro

    marks = {HIDDEN: tyro.conf.Suppress, POSITIONAL: tyro.conf.Positional}
    for kind in kinds:
        for name, hint in kind.__annotations__.items():
            mark = next(
                (marks[each] for each in getattr(hint, "__metadata__", ()) if each in (HIDDEN, POSITIONAL)), None
            )
            if mark is not None and mark not in hint.__metadata__:
                kind.__annotations__[name] = Annotated[hint, mark]
