"""What may be written to a terminal."""


def shown(name: str) -> str:
    """A name that a terminal can take, on one line: files and documents may be called anything."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in name)
