"""Architectures of mlx-lm and mlx-vlm: their modules, the project's experts.

A model whose architecture has no file in ``models`` is built by the library that has one. Its modules that hold all
experts of a layer in memory (SwitchGLU, SwitchMLP and their like) are replaced by streamed experts; the rest is theirs.
"""
