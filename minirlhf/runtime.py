"""python -m minirlhf.runtime --plan gpt2-xl: the old name of python -m minirlhf.bench.plan."""

import runpy

if __name__ == "__main__":
    runpy.run_module("minirlhf.bench.plan", run_name="__main__")
