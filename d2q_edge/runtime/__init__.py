"""The patched llama-cpp-python that runs d2q files: install it, find it, describe it.

Knows how to get from the published source distribution plus cpp_patch/ to an installed wheel and llama.cpp's tools.
Does not know how a model is loaded or measured (evaluation.py) and prints nothing on stdout.
"""

from d2q_edge.runtime.build import install
from d2q_edge.runtime.following import follow_tool
from d2q_edge.runtime.installed import TOOLS, RuntimeInfo, find_tool, info, require, run_tool

__all__ = ["TOOLS", "RuntimeInfo", "find_tool", "follow_tool", "info", "install", "require", "run_tool"]
