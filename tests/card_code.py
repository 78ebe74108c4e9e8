"""The code that a card shows."""

import re


def code_of(card: str) -> str:
    """The Python blocks of a card, one after the other."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", card, re.M | re.S))
