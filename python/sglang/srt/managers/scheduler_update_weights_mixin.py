"""
SchedulerUpdateWeightsMixin.update_weights_from_tensor, SchedulerUpdateWeightsMixin.update_weights_from_disk, SchedulerUpdateWeightsMixin.update_weights_from_distributed, SchedulerUpdateWeightsMixin.update_weights_from_ipc
    why: what one rank cannot load fails the request on every rank, before any writes, and not the server
    until: upstream lets ranks agree before they write
"""

from overlay.marks import splice

from sglang.srt.layers.quantization.mxfp8.agreement import run_weight_update


class SchedulerUpdateWeightsMixin:
    @splice
    def update_weights_from_disk(self, recv_req):
        success, message = run_weight_update(
            self.tp_cpu_group, self.tp_worker.update_weights_from_disk, recv_req
        )

    @splice
    def update_weights_from_distributed(self, recv_req):
        success, message = run_weight_update(
            self.tp_cpu_group, self.tp_worker.update_weights_from_distributed, recv_req
        )

    @splice
    def update_weights_from_tensor(self, recv_req):
        success, message = run_weight_update(
            self.tp_cpu_group, worker.update_weights_from_tensor, recv_req
        )

    @splice
    def update_weights_from_ipc(self, recv_req):
        success, message = run_weight_update(
            self.tp_cpu_group, self.tp_worker.update_weights_from_ipc, recv_req
        )
