"""Helpers that all other modules may use: files, and everything private of Diffusers that the package relies on."""
