"""`python -m ftray`: for machines where the package is there and its script is not on the path."""

from ftray.cli.main import main

if __name__ == "__main__":  # processes that tokenise import this file again
    main()
