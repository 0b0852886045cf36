"""
_set_envs_and_config
    why: FlashInfer 0.6.7 brings the trtllm MXFP8 GEMM
    thread: sgl-project/sglang#21576
    until: the base is 0.5.10 or later
"""

from typing import TYPE_CHECKING

from overlay.marks import splice

if TYPE_CHECKING:
    from sglang.srt.entrypoints.engine import assert_pkg_version


@splice
def _set_envs_and_config():
    assert_pkg_version(
        "flashinfer_python",
        "0.6.7.post3",
        "Install the release that this sglang was built for: "
        "pip install flashinfer_python==0.6.7.post3 flashinfer_cubin==0.6.7.post3",
    )
