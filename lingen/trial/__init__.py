"""The cache trial: every way to sample with less computation, measured on trained models against honest controls."""
