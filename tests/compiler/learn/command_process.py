"""What each process of test_processes.py runs: command lines one after the other, with a plus sign between them."""

import sys
from itertools import groupby

from surgeon.compiler.cli.main import main

if __name__ == "__main__":
    for between, arguments in groupby(sys.argv[1:], "+".__eq__):
        if not between and (status := main(list(arguments))):
            sys.exit(status)
