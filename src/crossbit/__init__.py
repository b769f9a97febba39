"""crossbit: post-training quantization of causal language models.

import crossbit
crossbit.quantize("demo", "crossquant-w8a8", out="out")
crossbit.evaluate("out", against="demo")
"""

__version__ = "0.1.0"

from crossbit.api import evaluate as evaluate
from crossbit.api import generate as generate
from crossbit.errors import CrossbitError as CrossbitError
from crossbit.errors import InputError as InputError
from crossbit.errors import WorkError as WorkError
from crossbit.quantize import quantize as quantize
from crossbit.recipe import Recipe as Recipe
from crossbit.verify import verify as verify
