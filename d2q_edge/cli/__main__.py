"""Run the command line with `python -m d2q_edge.cli`."""

from d2q_edge.cli import main

main()
