"""Everything that makes learned solvers: teacher samples, losses, optimisers. Sampling imports nothing of it."""
