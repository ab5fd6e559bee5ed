"""Kernels: one folder per operation, each with a plain reference and the fast path that a device runs."""

if __name__ == "triton_kernels":
    # vLLM imports any module of this name for its MXFP4 MoE, and falls back to its own on ImportError.
    raise ImportError("this folder is lmcache_blend.triton_kernels; import it by that name")
