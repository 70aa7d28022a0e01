"""The `dlkernels` command as a process: how it is started, what a terminal sees, a pipe that closes."""

from __future__ import annotations

import os
import pty
import re
import struct
import subprocess
import sys
from fcntl import ioctl
from termios import TIOCSWINSZ

import pytest
from support import COMMAND, ENVIRONMENT


def on_terminal(*arguments: str, width: int = 80) -> list[str]:
    """The lines that a terminal of `width` columns gets to see."""
    master, slave = pty.openpty()
    ioctl(slave, TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in ("COLUMNS", "NO_COLOR")} | {"TERM": "xterm-256color"}
    process = subprocess.Popen([*COMMAND, *arguments], stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    seen = b""
    try:
        while block := os.read(master, 65536):
            seen += block
    except OSError:  # the terminal closes when the command ends
        pass
    process.wait(timeout=60)
    os.close(master)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode()).splitlines()  # a carriage return ends a line too


def test_the_command_is_there_in_every_spelling() -> None:
    for module in ("dlkernels", "dlkernels.cli"):
        result = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
        assert result.returncode == 0
        assert all(name in result.stdout for name in ("info", "check", "bench", "report", "show", "train", "tune"))


def test_importing_the_package_does_not_import_the_command() -> None:
    code = "import sys, dlkernels; print([m for m in ('click', 'rich', 'jinja2', 'dlkernels.cli', 'dlkernels.bench') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, timeout=60, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments", [("info",), ("check", "linear", "--dtype", "float32", "--device", "cpu"), ("show", "linear"), ("--help",)]
)
def test_lines_fit_a_terminal_of_80_columns(arguments: tuple[str, ...]) -> None:
    lines = on_terminal(*arguments)
    assert lines and max(map(len, lines)) <= 80, max(lines, key=len)


def test_a_closed_pipe_is_no_error() -> None:
    command = " ".join([*COMMAND, "show", "linear", "|", "head", "-n", "1"])
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert "Traceback" not in result.stderr and result.returncode == 0 and len(result.stdout.splitlines()) == 1
