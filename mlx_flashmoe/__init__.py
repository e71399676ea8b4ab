"""Mixture-of-Experts models several times larger than memory, on MLX: experts are read from disk as routed to.

Example::

    from mlx_flashmoe import convert, load, generate, stream_generate

    convert("Qwen/Qwen3.5-397B-A17B", "qwen-4bit", q_bits=4)
    model, tokenizer = load("qwen-4bit")
    print(generate(model, tokenizer, prompt="The capital of France is", max_tokens=20))
"""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # Type checkers cannot see that kernels/ is a subpackage of this one.
    import mlx_flashmoe.kernels as kernels  # noqa: F401
    from mlx_flashmoe.convert import convert as convert
    from mlx_flashmoe.generate import generate as generate
    from mlx_flashmoe.generate import stream_generate as stream_generate
    from mlx_flashmoe.loader import load as load

__all__ = ["convert", "generate", "load", "stream_generate"]

# Where each public function is defined. They are imported when first used: this package imports in no time.
_HOME = {"convert": "convert", "generate": "generate", "load": "loader", "stream_generate": "generate"}


class _Package(ModuleType):
    """``convert`` and ``generate`` are functions here and submodules too: as attributes, always the functions.

    Importing a submodule sets it as an attribute of its package, which would hide the function of that name;
    those assignments are dropped. ``from mlx_flashmoe.convert import …`` finds the submodule all the same.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        function = getattr(import_module(f"{self.__name__}.{_HOME[name]}"), name)
        setattr(self, name, function)
        return function

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_HOME})


# In a clone kernels/ and convert/ stand next to this folder, not in it, and the folder comes before what is installed.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

sys.modules[__name__].__class__ = _Package
