"""Serves the papers' tables: the networks that they sample from, readers of published files, and measures of images."""
