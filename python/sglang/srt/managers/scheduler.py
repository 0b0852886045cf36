"""
Scheduler._is_no_request, _is_done
    why: a request that has been answered stays in its batch until the next step; a weight update that came in between could not flush the cache, and its assertion ended the server
    until: upstream counts finished requests as none
"""

from typing import TYPE_CHECKING, Optional

from overlay.marks import splice

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import ScheduleBatch


def _is_done(batch: Optional["ScheduleBatch"]) -> bool:
    """Whether every request of a batch has been answered."""
    return batch is None or all(req.finished() for req in batch.reqs or ())


class Scheduler:
    @splice
    def _is_no_request(self):
        no_request = (
            all(map(_is_done, (self.running_batch, self.last_batch, self.cur_batch)))
            and not (self.enable_overlap and self.result_queue)
            and (self.pp_size == 1 or all(map(_is_done, self.running_mbs)))
        )
