"""HTML pages from templates."""

import jinja2


def templates(room: str) -> jinja2.Environment:
    """The templates of a room of guard: whatever they are given is escaped, and a name that is missing is an error.

    Args:
        room: Name of the room, such as `report`.
    """
    return jinja2.Environment(
        loader=jinja2.PackageLoader("guard", room), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
