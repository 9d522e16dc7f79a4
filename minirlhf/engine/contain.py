"""Good manners: a main function in another program, a notebook or a test puts back what it changed.

Commands that need no torch, whose import takes seconds, import this file, too: it imports torch
where a function needs it.

Left out: torch's process group and its current GPU, which stay for the next stage; the random
numbers of devices other than CPU and CUDA.
"""

import contextlib
import contextvars
import functools
import random
import signal
import sys
import threading

import numpy as np

from minirlhf.engine.terminal import as_terminal

HANG_UP = getattr(signal, "SIGHUP", None)  # Windows has none
ENDS = contextvars.ContextVar("what ends with the innermost contained function", default=None)


def at_end(undo):
    """Has undo() called when the innermost `contained` function that runs now returns or raises.

    Outside of all of them nothing will be called.
    """
    if ENDS.get():
        ENDS.get().callback(undo)


def contained(main):
    """The function, as a good guest: as it finds the process, so it leaves it, by return or error.

    That means the random numbers of Python, NumPy and torch, torch's precision of fp32 products and
    sys.stdout, which is a Terminal meanwhile; what was handed to `at_end` is called, the last
    first. One contained function may call another.
    """

    @functools.wraps(main)
    def inside(*args, **kwargs):
        import torch

        with contextlib.ExitStack() as ends:
            ends.callback(random.setstate, random.getstate())
            ends.callback(np.random.set_state, np.random.get_state())
            ends.callback(torch.set_rng_state, torch.get_rng_state())
            ends.callback(cuda_seeds())
            ends.callback(precision_switches())
            ends.callback(setattr, sys, "stdout", sys.stdout)
            sys.stdout = as_terminal(sys.stdout)
            ends.callback(ENDS.reset, ENDS.set(ends))
            return main(*args, **kwargs)

    return inside


def cuda_seeds():
    """A function that puts back the random numbers of all GPUs as they are now."""
    import torch

    if torch.cuda.is_initialized():
        return functools.partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
    seed = torch.initial_seed()  # what a GPU begins with when it is first used

    def put_back():
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)

    return put_back


def precision_switches():
    """A function that puts back torch's precision of fp32 products, whichever switches set it.

    From torch 2.9 on there is one for each library, and where a caller has set those, the older one
    cannot be read.
    """
    import torch

    backends = (torch.backends.cuda, torch.backends.mkldnn)
    libraries = [x.matmul for x in backends if hasattr(x, "matmul")]
    newer = [(x, x.fp32_precision) for x in libraries if hasattr(x, "fp32_precision")]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = None

    def put_back():
        if older:
            torch.set_float32_matmul_precision(older)
        for library, value in newer:
            library.fp32_precision = value

    return put_back


@contextlib.contextmanager
def caught_signals():
    """The numbers of the signals so far that end a run, a list; the second ends the process.

    They are SIGINT, SIGTERM and SIGHUP, which a closed terminal sends, once or twice; a process
    that `nohup` told to ignore it goes on doing so. Their handlers come back at the end of the
    block, or `at_end` if that is sooner. Outside of the main thread nothing is caught.
    """
    caught = []

    def catch(number, _):
        if caught and number != HANG_UP:  # asked twice: at once
            raise SystemExit(128 + number)
        caught.append(number)

    here = threading.current_thread() is threading.main_thread()
    own = [signal.SIGINT, signal.SIGTERM] if here else []
    if here and HANG_UP and signal.getsignal(HANG_UP) != signal.SIG_IGN:
        own.append(HANG_UP)
    before = {number: signal.signal(number, catch) for number in own}

    def put_back():
        while before:
            signal.signal(*before.popitem())

    at_end(put_back)
    try:
        yield caught
    finally:
        put_back()
