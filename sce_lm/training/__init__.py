"""Configuration, data, loop and checkpoints behind scripts/train.py."""
