"""The one submodule that sglang imports from unconditionally; see the package."""

from sgl_kernel import __getattr__  # noqa: F401
