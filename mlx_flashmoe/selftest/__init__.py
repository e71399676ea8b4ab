"""The command that finds out, without a model, which parts work on this machine. ``run.py`` is its beginning."""
