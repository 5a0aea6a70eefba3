"""`python -m fastdistil` is the command `fastdistil`."""

from fastdistil.cli import main

main()
