"""What users plug into a pipeline: the schedulers, and what they share."""
