"""Runs the command line: `python -m mmtok_deploy` is `mmtok`."""

import sys

from mmtok_deploy.cli import main

if __name__ == "__main__":
    sys.exit(main())
