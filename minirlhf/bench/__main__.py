"""python -m minirlhf.bench: the command of rows.py."""

from minirlhf.bench.rows import Knobs, __doc__, main
from minirlhf.engine.cli import run_script

if __name__ == "__main__":
    run_script(main, Knobs, __doc__)
