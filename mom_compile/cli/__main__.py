"""`python -m mom_compile.cli`, for environments without the `mom-compile` script."""

from mom_compile.cli.commands import main

if __name__ == "__main__":
    main()
