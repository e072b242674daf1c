"""How long the import and the command's help take, and the imports that they need.

    python benchmarks/start.py --rounds 7

Each line is a new process; lines alternate, and medians over the rounds are printed, with ratios to `import torch`.
Last, how much of `from hf_forward_inf import ForwardInf` is spent in modules of this package, by `-X importtime`.
"""

import argparse
import statistics
import subprocess
import sys
import time

LINES = {
    "import torch": ["-c", "import torch"],
    "import transformers, datasets": ["-c", "import transformers, datasets"],
    "import transformers, datasets, hf_forward_inf": ["-c", "import transformers, datasets, hf_forward_inf"],
    "from hf_forward_inf import ForwardInf": ["-c", "from hf_forward_inf import ForwardInf"],
    "hf-forward-inf --help": ["-m", "hf_forward_inf", "--help"],
    "hf-forward-inf trace --help": ["-m", "hf_forward_inf", "trace", "--help"],
    "hf-forward-inf leakage --help": ["-m", "hf_forward_inf", "leakage", "--help"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {name: [] for name in LINES}
    for _ in range(rounds):
        for name, words in LINES.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - started)
    torch = statistics.median(seconds["import torch"])
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(f"{name:48} {middle:6.2f} s  {middle / torch:5.2f}x torch  ({min(values):.2f} to {max(values):.2f})")
    own = []
    for _ in range(rounds):
        words = [sys.executable, "-X", "importtime", "-c", "from hf_forward_inf import ForwardInf"]
        lines = subprocess.run(words, check=True, capture_output=True, text=True).stderr.splitlines()
        parts = [line.removeprefix("import time:").split("|") for line in lines]
        own.append(sum(int(part[0]) for part in parts if part[-1].strip().startswith("hf_forward_inf")) / 1e6)
    print(f"{'of ForwardInf, in modules of ours':48} {statistics.median(own):6.2f} s")


if __name__ == "__main__":
    main()
