"""Every pipeline class that Diffusers exports, around small random networks. `field_matrix.py` is the script."""
