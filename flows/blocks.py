"""placeholder until the branch infra is merged"""


def use_blocks() -> None:
    """Nothing yet."""
