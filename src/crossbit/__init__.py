"""crossbit: post-training quantization of causal language models.

    import crossbit
    crossbit.quantize("demo", "crossquant-w8a8", out="out")
    crossbit.evaluate("out", against="demo")

The names are imported when they are first used: verification and plots need libraries that a
quantization run has no memory for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from crossbit.analysis.run import analyze as analyze
    from crossbit.api import evaluate as evaluate
    from crossbit.api import generate as generate
    from crossbit.errors import CrossbitError as CrossbitError
    from crossbit.errors import InputError as InputError
    from crossbit.errors import WorkError as WorkError
    from crossbit.pipeline import quantize as quantize
    from crossbit.planning import plan as plan
    from crossbit.recipe import Recipe as Recipe
    from crossbit.verification import verify as verify

_HOME = {
    "analyze": "analysis.run",
    "evaluate": "api",
    "generate": "api",
    "plan": "planning",
    "quantize": "pipeline",
    "verify": "verification",
    "Recipe": "recipe",
    "CrossbitError": "errors",
    "InputError": "errors",
    "WorkError": "errors",
}
__all__ = sorted(["__version__", *_HOME])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"crossbit.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'crossbit' has no attribute {name!r}")
