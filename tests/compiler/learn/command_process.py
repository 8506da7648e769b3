"""The program that each process of test_processes.py runs: command lines in turn, separated by plus signs."""

import sys
from itertools import groupby

from surgeon.compiler.cli.main import main

if __name__ == "__main__":
    for between, arguments in groupby(sys.argv[1:], "+".__eq__):
        if not between and (status := main(list(arguments))):
            sys.exit(status)
