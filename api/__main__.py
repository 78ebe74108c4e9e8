"""`python -m unihema` is the `unihema` command."""

from unihema.cli import main


main()
