"""`python -m dlkernels` is the `dlkernels` command."""

from .cli import main

if __name__ == "__main__":
    main()
