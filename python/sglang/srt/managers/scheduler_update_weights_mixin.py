"""
SchedulerUpdateWeightsMixin.update_weights_from_tensor, _or_failure
    why: a tensor that cannot be loaded fails its request, not the server
    until: upstream guards update_weights_from_tensor as it does the other updates
"""

from typing import TYPE_CHECKING, Callable, Tuple

from overlay.marks import splice

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler_update_weights_mixin import logger, traceback


def _or_failure(update: Callable, *args) -> Tuple[bool, str]:
    """(success, message) of an update, also when it raises."""
    try:
        return update(*args)
    except Exception as error:
        logger.error(traceback.format_exc())
        return False, f"Failed to update weights from tensor: {error}"


class SchedulerUpdateWeightsMixin:
    @splice
    def update_weights_from_tensor(self, recv_req):
        success, message = _or_failure(worker.update_weights_from_tensor, recv_req)
