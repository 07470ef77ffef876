"""Clips in, batches out. The only package that touches clips."""
