"""``python -m mlx_flashmoe``."""

import sys

from mlx_flashmoe.cli import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m mlx_flashmoe"))
