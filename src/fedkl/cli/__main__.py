"""`python -m fedkl.cli`."""

from fedkl.cli import main

if __name__ == "__main__":
    main()
