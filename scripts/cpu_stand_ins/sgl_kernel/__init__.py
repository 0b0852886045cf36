"""A stand-in for sgl-kernel on machines without a CUDA driver. It computes nothing.

The real wheel links against libcuda.so.1, so that even `import sgl_kernel` fails
where there is no driver, and sglang imports names from it unconditionally. Put this
folder's parent first on PYTHONPATH there, and only there: every name can then be
imported, and calling one raises RuntimeError with the kernel's name.
"""


class _MissingKernel:
    def __init__(self, name: str):
        self._name = name

    def __call__(self, *args, **kwargs):
        raise RuntimeError(
            f"sgl_kernel.{self._name} needs a CUDA device: this process runs with the "
            "CPU stand-in for sgl-kernel (scripts/cpu_stand_ins), which has no kernels"
        )


def __getattr__(name: str) -> _MissingKernel:
    # Dunder names are Python's own questions (__path__, __file__): answer them honestly.
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _MissingKernel(name)
