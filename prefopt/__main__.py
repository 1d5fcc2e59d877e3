"""`python -m prefopt`, for launchers such as torchrun."""

from prefopt.cli.app import main

main()
