"""Turns the source of a ggml Metal library into C++ that the shim in this directory compiles.

Knows the few constructs in which ggml's Metal files are not C++20: attributes, function constants, kernels and their
explicit instantiations, and one extension of C that clang has and gcc has not. Does not know what a kernel computes:
every other line stays as it is.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

ATTRIBUTE = re.compile(r"\[\[(.*?)\]\]")
FUNCTION_CONSTANT = re.compile(r"\bconstant (\w+)\s+(\w+)\s*\[\[function_constant\((.*?)\)\]\];")
KERNEL = re.compile(r'(?:\[\[host_name\("(\w+)"\)\]\]\s*)?\bkernel\s+void\s+(\w+)\s*\(')
INSTANTIATION = re.compile(
    r'^template \[\[host_name\("(\w+)"\s*\)\]\]\s*kernel\s+\w+\s+(\w+<.*>);[ \t]*(?://.*)?$', re.MULTILINE
)
TEMPLATE_BEFORE = re.compile(r">[ \t]*(?://.*)?\n\Z")
RANGE_DESIGNATOR = re.compile(r"\{ \[ 0 \.\.\. [\w -]+ \] = 0\.0f \}")

ARGUMENTS = {
    "threadgroup(0)": "emulation::Argument::threadgroup_memory",
    "threadgroup_position_in_grid": "emulation::Argument::threadgroup_position",
    "thread_position_in_threadgroup": "emulation::Argument::thread_position",
    "thread_index_in_threadgroup": "emulation::Argument::thread_index",
    "thread_index_in_simdgroup": "emulation::Argument::lane",
    "simdgroup_index_in_threadgroup": "emulation::Argument::simdgroup",
    "threads_per_threadgroup": "emulation::Argument::threads",
}
"""What Metal passes for a parameter with an attribute; one without is the next buffer."""


@dataclass(frozen=True)
class Kernel:
    """A kernel as the host finds it."""

    host_name: str
    function: str
    arguments: tuple[str, ...]


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one before `start`."""
    depth = 1
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise ValueError("a parameter list does not end")


def _arguments(parameters: str) -> tuple[str, ...]:
    found = []
    for parameter in parameters.split(","):
        attribute = ATTRIBUTE.search(parameter)
        found.append(ARGUMENTS[attribute[1].strip()] if attribute else "emulation::Argument::buffer")
    return tuple(found)


def translate(source: str, wanted: Callable[[str], bool]) -> str:
    """C++ for the kernels whose host name is `wanted`, with a table of them and of the function constants at the end.

    Args:
        source: Metal source with its includes merged, as ggml embeds it.
        wanted: names of the kernels to keep; the others' instantiations are left out to save compile time.
    """
    kernels: list[Kernel] = []
    arguments: dict[str, tuple[str, ...]] = {}
    for match in KERNEL.finditer(source):
        host_name, function = match[1] or match[2], match[2]
        arguments[function] = _arguments(source[match.end() : _closing(source, match.end())])
        is_template = bool(TEMPLATE_BEFORE.search(source, max(0, match.start() - 500), match.start()))
        if not is_template and wanted(host_name):
            kernels.append(Kernel(host_name, function, arguments[function]))
    for match in INSTANTIATION.finditer(source):
        if wanted(match[1]):
            kernels.append(Kernel(match[1], match[2], arguments[match[2].partition("<")[0]]))
    constants = FUNCTION_CONSTANT.findall(source)

    text = INSTANTIATION.sub("", source)
    text = FUNCTION_CONSTANT.sub(r"static \1 \2;", text)
    text = RANGE_DESIGNATOR.sub("{}", text)
    text = ATTRIBUTE.sub("", text)
    text = re.sub(r"\bkernel void\b", "void", text)
    text = re.sub(r"\bconst constant\b", "const", text)
    lines = ["", "static const emulation::Registration registration({"]
    lines += [f'    {{"{k.host_name}", emulation::bind<{", ".join(k.arguments)}>({k.function})}},' for k in kernels]
    lines += ["}, {", *(f"    {{{index}, &{name}, sizeof({name})}}," for _, name, index in constants), "});", ""]
    return text + "\n".join(lines)
