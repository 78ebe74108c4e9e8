"""The `unihema` command within this process: what it writes, says and ends with, without importing PyTorch for each call."""

import contextlib
import io
import subprocess
import sys
import traceback
from pathlib import Path
from unittest import mock

from unihema_cli import main


def run_command(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Runs `unihema ARGUMENTS` as its entry point does; tests of it as a process of its own are in tests/api/test_cli.py.

    Args:
        *arguments (`object`): Of the command.
        cwd (`Path`, *optional*): Folder to run it in.

    Returns:
        `subprocess.CompletedProcess`: `returncode`, `stdout` and `stderr`.
    """
    words = ["unihema", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", words))
        stack.enter_context(contextlib.chdir(cwd or Path.cwd()))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        except Exception:
            # As the interpreter does.
            traceback.print_exc()
            code = 1
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
