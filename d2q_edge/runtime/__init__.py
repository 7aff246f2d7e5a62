"""The patched llama-cpp-python and llama.cpp's tools: build them, find them, run models with them."""

from d2q_edge.runtime.build import install
from d2q_edge.runtime.installed import RuntimeInfo, info, require
from d2q_edge.runtime.tools import TOOLS, Tools

__all__ = ["TOOLS", "RuntimeInfo", "Tools", "info", "install", "require"]
