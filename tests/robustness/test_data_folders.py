"""Damaged data folders end in rows or in a `DatasetError`, in bounded time and memory.

`UNIHEMA_ATTACK` is the number of folders, `UNIHEMA_ATTACK_SEED` their seed.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest


pytest.importorskip("resource", reason="Limits of memory are of Unix.")

SCRIPT = Path(__file__).with_name("mutated_folders.py")
FOLDERS = 80
# One process reads this many, so that memory that is not given back is met within it, and a crash costs little.
PART = 500


def test_damaged_folders_give_rows_or_an_error(tmp_path):
    asked = os.environ.get("UNIHEMA_ATTACK")
    total = int(asked or FOLDERS)
    seed = os.environ.get("UNIHEMA_ATTACK_SEED") or (str(time.time_ns()) if asked else "0")
    print(f"UNIHEMA_ATTACK_SEED={seed}")
    failures: list[str] = []
    number = 0
    while number < total:
        count = min(PART, total - number)
        command = [sys.executable, str(SCRIPT), str(tmp_path / "templates"), seed, str(number), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        failures += [f"{line['failed']}: {line['damage']}\n{line['error']}" for line in lines if "failed" in line]
        if done.returncode == 0:
            number += count
            continue
        begun = [line["begins"] for line in lines if "begins" in line]
        assert begun, done.stderr
        failures.append(f"{begun[-1]}: the process ended with {done.returncode}\n{done.stderr[-2000:]}")
        number = begun[-1] + 1
    assert not failures, f"seed {seed}: {len(failures)} of {total} folders\n" + "\n".join(failures[:20])
