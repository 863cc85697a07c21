"""Measures the images of a sampler as the papers do: Frechet distances, and distances to the teacher."""
