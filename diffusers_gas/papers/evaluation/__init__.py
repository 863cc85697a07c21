"""How good the images of a sampler are: Frechet distances, CLIP scores, and the networks that these look through."""
