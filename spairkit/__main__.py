"""`python -m spairkit` is `spairkit`."""

from spairkit.cli.main import main

main()
