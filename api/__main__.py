"""`python -m unihema` is the `unihema` command."""

from unihema_cli import main


main()
