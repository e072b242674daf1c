"""`python -m hf_forward_inf` is `hf-forward-inf`."""

import sys

from hf_forward_inf.cli import main

if __name__ == "__main__":
    sys.exit(main())
