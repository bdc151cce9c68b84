"""`python -m mom_compile.cli`, where the script is not installed."""

from mom_compile.cli.commands import main

if __name__ == "__main__":
    main()
