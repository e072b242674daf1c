"""Virtual environments of the peers, which are made where they are missing."""

import os
import subprocess
import venv
from pathlib import Path

from hf_forward_inf.utils.processes import say

REQUIREMENTS = {
    "bergson": ["bergson==2.5.1"],
    "captum": ["captum==0.9.0"],
    "dattri": ["dattri==0.3.0"],
    "dattri_llm": ["dattri-llm[transformers,attribution]==0.1.0"],
    "kronfluence": ["kronfluence==1.0.1"],
}
SHARED = ["torch==2.13.0", "transformers==5.24.0"]
UNWANTED = ["torchvision", "torchaudio"]
"""Dependencies of peers that no method here needs, and whose wheels may not match the CPU build of torch."""


def environment(peer: str, folder: Path) -> Path:
    """Return the Python of a peer's virtual environment, which is made if it does not exist."""
    python = folder / peer / "bin" / "python"
    ready = folder / peer / "installed.txt"
    wanted = "\n".join(SHARED + REQUIREMENTS[peer])
    if not ready.exists() or ready.read_text() != wanted:
        say(f"Installing {wanted.split()[-1]} ...")
        if not python.exists():
            venv.create(folder / peer, with_pip=True, symlinks=os.name != "nt")
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-q"]
        subprocess.run([*pip, "install", *SHARED, *REQUIREMENTS[peer]], check=True)
        subprocess.run([*pip, "uninstall", "-y", *UNWANTED], check=True, stderr=subprocess.DEVNULL)
        ready.write_text(wanted)
    return python
