"""A program imports this first: an interrupt while torch is being imported ends it in silence.

`cli.run_script` gives interrupts their usual meaning back.
"""

import os
import signal


def end(number, _):
    os._exit(128 + number)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end)
