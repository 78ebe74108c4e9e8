"""Tools of the developers, run by hand from a clone: `python -m tools.NAME`. They are not in the wheel."""
