"""python -m minirlhf.look: the command of command.py."""

import gc

if __name__ == "__main__":
    gc.disable()  # what is imported stays: to look for garbage in it takes a tenth of the time
    from minirlhf.engine.cli import run_script
    from minirlhf.look.command import Knobs, __doc__, main, parse

    gc.freeze()  # nor is it looked through later: torch has a quarter of a million objects
    gc.enable()
    run_script(main, Knobs, __doc__, parse)
