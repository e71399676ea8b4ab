"""Measurements that a user can repeat: ``python -m mlx_flashmoe bench …``."""
