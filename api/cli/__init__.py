"""The `unihema` command, a package beside `unihema`: its help needs neither that, nor PyTorch, nor Transformers.

So a command imports what it needs when it is called.
"""

from .app import app, main


__all__ = ["app", "main"]
