"""A curriculum as a chain of Slurm jobs, one a stage: written, checked, submitted, looked at, settled."""
