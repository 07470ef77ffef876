"""Runs of the same prompts and seeds, measured against each other: quality, cost, and what people prefer."""
