"""Callbacks that take a training framework's loop into a run; each module needs the extra of its name."""
