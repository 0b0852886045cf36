"""The servers that are compared. Imported before there is an environment: no packages."""

LAYOUT = "SGLANG_MXFP8_TRTLLM_SF_LAYOUT"
# Name of a server to its --fp8-gemm-backend and its environment.
SERVERS = {
    "triton": ("triton", {}),
    "flashinfer_cutlass": ("flashinfer_cutlass", {}),
    "flashinfer_trtllm": ("flashinfer_trtllm", {}),
    "flashinfer_trtllm_8x4": ("flashinfer_trtllm", {LAYOUT: "8x4"}),
    "flashinfer_trtllm_128x4": ("flashinfer_trtllm", {LAYOUT: "128x4"}),
}
# Triton's MXFP8 kernel has no emulation.
EMULATED = tuple(name for name in SERVERS if name != "triton")
