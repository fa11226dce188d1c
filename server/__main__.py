"""`python -m headrace.server` is `headrace serve`."""

import sys

from headrace.server.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
