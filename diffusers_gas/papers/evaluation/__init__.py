"""Measures the images of a sampler as the papers do: Frechet distances, CLIP scores and distances to the teacher."""
