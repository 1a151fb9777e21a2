"""Device helpers that several kernels share: dropout and activations.

Importing this module imports triton; it holds no kernel and no launcher.
"""

import triton
import triton.language as tl


@triton.jit
def dropout_keep(seed, threshold, batch, head, rows, first_column, BLOCK_N: tl.constexpr):
    """The keep mask of a tile, bit for bit that of `fastlm.reference.dropout.keep_mask`.

    One Philox call gives the four 32-bit words of four neighbouring columns.

    Args:
        seed: int64 scalar, loaded from a device tensor so that CUDA graphs can advance it.
        threshold: `dropout_threshold(p)`; annotate the kernel's parameter `tl.uint32`, so that one
            binary serves every p.
        batch, head: integer scalars, 0 for tensors that have rows and columns alone.
        rows: integers, [BLOCK_M].
        first_column: integer scalar, a multiple of 4.
        BLOCK_N: number of columns, a power of two of at least 4.

    Returns:
        Booleans, True = kept, [BLOCK_M, BLOCK_N]. `tl.trans` of it costs nothing.
    """
    BLOCK_M: tl.constexpr = rows.shape[0]
    GROUPS: tl.constexpr = BLOCK_N // 4
    zeros = tl.zeros([BLOCK_M, GROUPS], dtype=tl.uint32)
    group = (first_column // 4 + tl.arange(0, GROUPS)).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed,
        zeros + group[None, :],
        zeros + rows.to(tl.uint32)[:, None],
        zeros + tl.to_tensor(head).to(tl.uint32),
        zeros + tl.to_tensor(batch).to(tl.uint32),
    )
    # The words of one call lie side by side in the last dimension: 0, 1, 2, 3.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BLOCK_M, GROUPS, 2, 2]
    words = tl.reshape(words, [BLOCK_M, BLOCK_N])
    return words >= tl.to_tensor(threshold).to(tl.uint32)
