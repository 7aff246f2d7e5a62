"""d2q-edge: 2- and 3-bit GGUF files for llama.cpp on laptops and phones (D2Quant, arXiv 2602.02546).

In Python, where paths may be strings:

    from d2q_edge import Options, convert, evaluate

    convert("path/to/model", "model.gguf", Options(bits=2))
    print(evaluate("model.gguf", reference="original.gguf").kl_divergence_mean)

`convert` quantizes a checkpoint, as `Options` say, and returns a `Conversion`; `evaluate` measures a file and returns
an `Evaluation`. What can't be done is a `D2QError` with one sentence. These are the functions behind the command line.
They are loaded when they are asked for, because torch takes seconds.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2q_edge.conversion import Conversion, convert
    from d2q_edge.errors import D2QError
    from d2q_edge.evaluation.perplexity import Evaluation, evaluate
    from d2q_edge.options import Options

__version__ = "0.1.0"
__all__ = ["Conversion", "D2QError", "Evaluation", "Options", "convert", "evaluate"]

_MODULES = {
    "Conversion": "conversion",
    "D2QError": "errors",
    "Evaluation": "evaluation.perplexity",
    "Options": "options",
    "convert": "conversion",
    "evaluate": "evaluation.perplexity",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'd2q_edge' has no attribute {name!r}")
    return getattr(importlib.import_module(f"d2q_edge.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
