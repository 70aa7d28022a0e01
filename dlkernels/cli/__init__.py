"""The `dlkernels` command: look at the kernels, check them, measure them, train with them.

Exit codes: 0 fine; 1 a check failed or something could not be done; 2 the command line is wrong; 130 interrupted, with what was finished
kept and shown. Results go to standard output, progress to standard error.
"""

import os
import sys
from collections.abc import Sequence

import click

from .explore import info, show
from .measure import bench, check, report
from .output import INTERRUPTED
from .train import train, tune


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="dlkernels", message="%(prog)s %(version)s")
def cli() -> None:
    """Deep-learning kernels in Triton and C++ SIMD: look at them, check them, race them against native PyTorch.

    A good start: `dlkernels info`, then `dlkernels bench --quick`, then `dlkernels show linear_relu`.
    """


for command in (info, check, bench, report, show, train, tune):
    cli.add_command(command)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's) and return its exit code."""
    try:
        result = cli.main(arguments, prog_name="dlkernels", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def main() -> None:
    """The console script."""
    sys.exit(run())
