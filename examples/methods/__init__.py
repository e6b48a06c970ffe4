"""Semi-supervised methods, each a subclass of the mean teacher: one module per paper."""
