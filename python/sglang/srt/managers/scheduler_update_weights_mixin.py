"""
SchedulerUpdateWeightsMixin.update_weights_from_tensor, _or_failure
    why: a tensor that cannot be loaded fails its request on every rank, not the server
    until: upstream guards update_weights_from_tensor as it does the other updates
"""

from typing import TYPE_CHECKING, Callable, Tuple

from overlay.marks import splice

from sglang.srt.layers.quantization.mxfp8_model import what_was_written

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler_update_weights_mixin import (
        logger,
        torch,
        traceback,
    )


def _or_failure(group, update: Callable, *args) -> Tuple[bool, str]:
    """(success, message) of an update, also when it raises; of the first rank of `group`
    that failed, if one did."""
    try:
        result = update(*args)
    except Exception as error:
        logger.error(traceback.format_exc())
        what = what_was_written(error)
        result = False, f"Failed to update weights from tensor: {error}. {what}"
    results = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(results, result, group=group)
    return next((r for r in results if not r[0]), result)


class SchedulerUpdateWeightsMixin:
    @splice
    def update_weights_from_tensor(self, recv_req):
        success, message = _or_failure(
            self.tp_cpu_group, worker.update_weights_from_tensor, recv_req
        )
