"""Which pairs count: labels, regions, the sort that makes intervals of them, and samples of the intervals.

Nothing here knows features or a loss. All results are tensors of integers of static shape.
"""
