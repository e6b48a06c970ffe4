"""The differentiable primitives on packed rows. Every loss is a recipe over them.

`rows.pack` gathers and normalises. `pair_lse`, `pair_mean` and `pair_cross_entropy` stream over pairs of rows.
`segment_mean` averages consecutive rows. None of them ever holds an N x M matrix. The rows know the backend that
computes all of it.
"""
