"""The differentiable primitives on packed rows, of which the losses are made.

`rows.pack` gathers and normalises. `pair_lse`, `pair_mean` and `pair_cross_entropy` stream over pairs of rows.
`segment_mean` averages consecutive rows. None holds an N x M matrix, except the dense backend for small problems. The
rows name the backend that computes all of them.
"""
