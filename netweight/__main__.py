"""`python -m netweight`, the same as the command `netweight`."""

from netweight.cli.main import main

if __name__ == "__main__":
    main()
