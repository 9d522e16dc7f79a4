"""python -m minirlhf.online ALGORITHM: the command of command.py."""

import sys

from minirlhf.engine.cli import run_script
from minirlhf.online.command import Knobs, __doc__, main

if __name__ == "__main__":
    sys.argv[0] = "python -m minirlhf.online ALGORITHM"
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--algorithm")
    run_script(main, Knobs, __doc__)
