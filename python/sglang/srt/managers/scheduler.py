"""
Scheduler._is_no_request, _is_done
    why: a request that has been answered stays in its batch until the next step; a weight update that came in between could not flush the cache, and its assertion ended the server
    until: upstream counts finished requests as none

Scheduler.recv_requests
    why: with a layer left half rearranged the server ends, also when nobody asks it anything
    until: never, as long as weights move in place
"""

from typing import TYPE_CHECKING, Optional

from overlay.marks import prepend, splice

from sglang.srt.layers.quantization.mxfp8.weights import refuse_half_moved

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import ScheduleBatch


def _is_done(batch: Optional["ScheduleBatch"]) -> bool:
    """Whether every request of a batch has been answered."""
    return batch is None or all(req.finished() for req in batch.reqs or ())


class Scheduler:
    @prepend
    def recv_requests(self):
        refuse_half_moved(grace=1.0)  # in which the update's answer goes out

    @splice
    def _is_no_request(self):
        no_request = (
            all(map(_is_done, (self.running_batch, self.last_batch, self.cur_batch)))
            and not (self.enable_overlap and self.result_queue)
            and (self.pp_size == 1 or all(map(_is_done, self.running_mbs)))
        )
