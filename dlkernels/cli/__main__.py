"""`python -m dlkernels.cli` is the `dlkernels` command."""

from . import main

if __name__ == "__main__":
    main()
