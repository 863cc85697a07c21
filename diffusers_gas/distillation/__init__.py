"""What fits learned solvers: losses, optimizers and adversarial training. Sampling imports nothing of it."""
