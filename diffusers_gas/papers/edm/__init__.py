"""EDM's networks (arXiv 2206.00364) as Diffusers models, which any scheduler with EDM preconditioning can sample."""
