"""The overlay tool: merges our files into upstream's by name; see merge.py for the rules."""
