"""What could be part of any package: files that appear complete or not at all, and hooks into Diffusers."""
