"""torchrun that ends with its own launcher and prints no traceback: `python -m hf_forward_inf.utils.launch`."""

import logging
import os
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from hf_forward_inf.utils.watch import watch


def main(arguments: Sequence[str] | None = None) -> int:
    """Start several processes, and return the exit status of the first that failed: what it had to say, it has said.

    Args:
        arguments (`Sequence[str]`, *optional*): torchrun's. Defaults to the words after the program's name.
    """
    logging.disable(logging.CRITICAL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    watch()
    try:
        run.main(arguments)
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        return status if status >= 0 else 128 - status
    return 0


if __name__ == "__main__":
    sys.exit(main())
