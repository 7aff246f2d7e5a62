"""`python -m d2q_edge.cli`: the same as the console script."""

from d2q_edge.cli import main

main()
