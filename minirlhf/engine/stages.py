"""Stages that need one another: what an earlier one should have made and has not is made now."""

from pathlib import Path

from minirlhf.engine import place
from minirlhf.engine.cli import UserError
from minirlhf.engine.files import figures_of, finished
from minirlhf.engine.log import complete
from minirlhf.engine.weights import model_directory


def look_ahead(knobs, models, function=""):
    """Refuses what is wrong with --out or a given model, before anything is made.

    models: {folder beside --out: the name of the model in its place, or ""}; no folder where none
    has to be made. A function may score in the place of one; `function` is its name.
    """
    given = list(models.values())
    folders = [folder for folder, model in models.items() if folder and not model]
    loaded = [model for model in given if model != function]
    place.look_ahead(knobs.out, [knobs.data, *given], folders, loaded)


def stage_before(name, main, knobs, feedback):
    """(model directory, summary) of an earlier stage at knobs.out, made now with its defaults when
    it is missing.

    feedback.trained(summary, source) says whether it has seen the same. Raises UserError where not.
    """
    summary = finished(knobs.out)
    if summary is None:
        missing = f"no {name} in {knobs.out}"
        print(f"{missing}: making it now with the defaults of that stage", flush=True)
        summary = main(knobs)
    summary = complete(summary, main, knobs)
    if not feedback.trained(summary, knobs.data):
        other = f"--data {summary['data']}, not {knobs.data}"
        if summary["data"] == knobs.data:
            other = f"{knobs.data} when it said something else"
        raise UserError(
            f"{knobs.out} was made from {other}: give an --out in another folder (its earlier "
            "stages lie beside it), or name the model with a flag"
        )
    return Path(knobs.out) / "model", summary


def note_other_data(given, knobs, feedback):
    """Says where a model that was named was trained on other data."""
    run = Path(model_directory(given)).parent
    summary = figures_of(run, say=len) if Path(given).is_dir() else {}
    if summary and not feedback.trained(summary, knobs.data):
        held_out = "which may hold what is held out here"
        print(f"note: {given} was trained on other data ({summary['data']}), {held_out}")


def earlier(knobs):
    """The knobs that a stage made on the way has from the one that needs it."""
    shared = "data", "overlong", "seed", "device", "dtype", "resume", "on_nonfinite", "shard"
    return {name: getattr(knobs, name) for name in shared}
