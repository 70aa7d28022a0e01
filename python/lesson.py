"""What the lessons share: where pictures go, and how they look.

Every lesson runs as a script, ``python python/01_neuron.py [--out FOLDER] [--quick]``, or cell by cell in an editor that
knows ``# %%``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

try:
    import matplotlib
except ImportError as error:
    raise SystemExit("the lessons draw with matplotlib, which is missing: pip install dlkernels[course]") from error

if "ipykernel" not in sys.modules:
    matplotlib.use("Agg")  # draw into files; no window, no display needed
import matplotlib.pyplot as plt
import torch
from matplotlib.animation import FuncAnimation, PillowWriter

_lesson = getattr(sys.modules["__main__"], "__doc__", None)
_parser = argparse.ArgumentParser(description=_lesson, formatter_class=argparse.RawDescriptionHelpFormatter)
_parser.add_argument("--out", type=Path, default=Path("lessons_out"), help="folder for the pictures (default: lessons_out)")
_parser.add_argument("--quick", action="store_true", help="fewer training steps and frames: shows that the lesson runs, teaches less")
_arguments = _parser.parse_known_args()[0] if "ipykernel" in sys.modules else _parser.parse_args()

OUT: Path = _arguments.out
QUICK: bool = _arguments.quick

BLUE, ORANGE, GREY = "#2a6fbb", "#e07b39", "#8a8f98"
plt.rcParams.update({"figure.dpi": 110, "figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False})
torch.set_printoptions(precision=4, sci_mode=False, linewidth=120)


def title(text: str) -> None:
    """Print a heading."""
    print(f"\n{text}\n{'-' * len(text)}")


def save(picture: Any, name: str, frames_per_second: int = 10) -> None:
    """Write a figure (PNG) or an animation (GIF) into the pictures' folder and say so."""
    OUT.mkdir(parents=True, exist_ok=True)
    if isinstance(picture, FuncAnimation):
        picture.save(OUT / name, writer=PillowWriter(fps=frames_per_second), dpi=80)
    else:
        picture.savefig(OUT / name, bbox_inches="tight")
    plt.close("all")
    print(f"picture: {OUT / name}")
