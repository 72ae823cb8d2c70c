"""A peer that cannot take part."""


def available() -> str | None:
    return "it is not installed, for a test"
