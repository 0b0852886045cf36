"""
WeightUpdater.update_weights_from_disk, WeightUpdater._served, keeps_served_path
    why: the rollback read the new folder again, and a failure left its path in the config
"""

import functools
from typing import TYPE_CHECKING, Callable

from overlay.marks import decorate, prepend, splice

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig


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
                self._served(path)

    return run


class WeightUpdater:
    @decorate
    @keeps_served_path
    def update_weights_from_disk(self): ...

    @prepend
    def update_weights_from_disk(self):
        served_path = self.model_config.model_path

    @splice(within="except Exception as e")
    def update_weights_from_disk(self, get_weight_iter, served_path):
        iter = get_weight_iter(self._served(served_path))

    def _served(self, path: str) -> "ModelConfig":
        """The config, of the checkpoint at `path` again."""
        self.model_config.model_path = path
        return self.model_config
