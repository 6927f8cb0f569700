"""Generators of the demo's five capabilities and of the base model's text: small, seeded, with answers computed in Python."""

from tasks.local.demo.questions.common import CAPABILITIES, Example, Generator, split_of

__all__ = ["CAPABILITIES", "Example", "Generator", "split_of"]
