"""The networks of EDM (arXiv 2206.00364) as Diffusers models, to be sampled by any scheduler with EDM preconditioning."""
