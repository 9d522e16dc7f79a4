"""python -m minirlhf.feedback: the command of page/command.py."""

if __name__ == "__main__":
    from minirlhf.engine.cli import run_script
    from minirlhf.feedback.page.command import Knobs, __doc__, main, parse

    run_script(main, Knobs, __doc__, parse)
