"""A page of what the stages of a run feed the model."""
