"""Deviation on CPU in float32: one pass of numba code over both tensors instead of copies of them."""

import numba


@numba.njit(nogil=True, fastmath={"reassoc", "nsz"}, cache=True)
def squared_deviation_f32(new, new_strides, old, old_strides, rows, heads, dim, out):
    """new, old: memory of [H, N, D] and [H, T, D], dims contiguous, strides of (head, token); rows [N]; out [2, N]."""
    for t in range(len(rows)):
        distances, energies = numba.float32(0), numba.float32(0)
        for h in range(heads):
            at = h * new_strides[0] + t * new_strides[1]
            a = new[at : at + dim]
            at = h * old_strides[0] + rows[t] * old_strides[1]
            b = old[at : at + dim]
            distance, energy = numba.float32(0), numba.float32(0)
            for i in range(dim):
                distance += (a[i] - b[i]) * (a[i] - b[i])
                energy += a[i] * a[i]
            distances += distance  # pyright: ignore[reportOperatorIssue]
            energies += energy  # pyright: ignore[reportOperatorIssue]
        out[0, t] = distances
        out[1, t] = energies
