"""
LinearBase.__init__
    why: messages about a layer name it; only the merged classes keep their prefix
    until: upstream keeps the prefix
"""

from overlay.marks import append


class LinearBase:
    @append
    def __init__(self, prefix):
        self.prefix = prefix
