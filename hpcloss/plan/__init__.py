"""Which pairs count: labels, regions, partitions and samples."""
