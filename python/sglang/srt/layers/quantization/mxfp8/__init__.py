"""MXFP8 for dense linear layers. A module imports only those above it.

numerics            quantize, dequantize
finite              which bytes are no numbers
shuffle_kernel      trtllm's order of rows as a Triton kernel
layout              the kernels' permutations of bytes, and back
weight_only_kernel  a product with the checkpoint's own bytes as Triton kernels
weight_only         the same, and in plain torch
emulation           what FlashInfer's kernels compute, for missing hardware only
shapes              which kernel takes which weight
scale_layout        trtllm's activation scales: 8x4 or 128x4
routing             which kernel for which layer
formats             what a checkpoint's config says
agreement           ranks agree before one of them writes
headers             what a checkpoint's files say of their tensors
weights             one layer's weight and scale through its life
meta                a model without memory, and what arrives in it
linears             what the self-check needs of a layer
self_check          whether a kernel computes what it should, here and now
names               what a model makes of a checkpoint's names
release             what the next one needs of this release of sglang
update_check        whether a model would take an update
lifecycle           a model's loads and updates
"""
