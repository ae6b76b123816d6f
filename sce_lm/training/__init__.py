"""Configuration, data, loop and checkpoints behind `sce-lm train`."""

NEEDED = ("accelerate", "datasets", "polars", "psutil", "rich", "tqdm", "yaml")
"""What a run needs; `measure`, by which losses are measured, needs none of it."""
