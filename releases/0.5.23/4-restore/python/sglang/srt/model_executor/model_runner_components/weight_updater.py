"""
WeightUpdater.update_weights_from_disk, keeps_served_path
    why: the rollback read the new folder again, and a failure left its path in the config
"""

import copy
import functools
from typing import Callable

from overlay.marks import decorate, prepend, splice


def keeps_served_path(update: Callable) -> Callable:
    """Wraps an update from disk: one that fails leaves the config's model_path."""

    @functools.wraps(update)
    def run(self, *args, **kwargs):
        path, success = self.model_config.model_path, False
        try:
            success, message = update(self, *args, **kwargs)
            return success, message
        finally:
            if not success:
                self.model_config.model_path = path

    return run


class WeightUpdater:
    @decorate
    @keeps_served_path
    def update_weights_from_disk(self): ...

    @prepend
    def update_weights_from_disk(self):
        served_config = copy.copy(self.model_config)

    @splice(within="except Exception as e")
    def update_weights_from_disk(self, get_weight_iter, served_config):
        iter = get_weight_iter(served_config)
