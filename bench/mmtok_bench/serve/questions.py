"""What the load generator asks about photographs."""

from __future__ import annotations

__all__ = ["PROMPT_TEXT", "QUESTIONS"]

QUESTIONS = (
    "What is in the middle of this picture, and which colours does it have? Answer in one short sentence.",
    "How many different things can be seen in this picture? Name the largest one in one short sentence.",
    "Where was this picture taken, inside or outside? Say in one short sentence how it can be seen.",
    "Is there a person, an animal or a machine in this picture? Say in one short sentence where it is.",
)

PROMPT_TEXT = "\n".join(
    (*QUESTIONS, "system", "You are a helpful assistant.", "user", "assistant", "USER: ", " ASSISTANT:")
)
"""Every word of a prompt, for a vocabulary in which each of them is one token, as it is in a real one."""
