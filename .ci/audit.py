"""Look all that is installed in .venv up among known vulnerabilities: fails where one is found.

Where pip-audit cannot be installed or its service does not answer, that is a notice and no failure.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PIP_AUDIT = "pip-audit==2.10.1"
INSTALLED, OWN = Path(".venv/bin/python"), Path(".venv-audit")  # pip-audit's requirements are no part of the project


def main() -> str | None:
    """What sys.exit is to be given."""
    frozen = output(INSTALLED, "-m", "pip", "freeze", "--disable-pip-version-check")
    output(sys.executable, "-m", "venv", OWN)
    output(OWN / "bin/python", "-m", "pip", "install", "--disable-pip-version-check", "-q", PIP_AUDIT)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(re.sub(r"\+\w+$", "", frozen, flags=re.MULTILINE))  # 2.13.0+cpu is 2.13.0 there
        file.flush()
        report = output(
            OWN / "bin/pip-audit",
            "--disable-pip",
            "--no-deps",
            "--progress-spinner",
            "off",
            "-f",
            "json",
            "-r",
            file.name,
        )
    packages = json.loads(report)["dependencies"]
    faults = [
        f"{package['name']} {package['version']}: {fault['id']}, mended in {fault['fix_versions']}"
        for package in packages
        for fault in package.get("vulns", ())
    ]
    known = sum("vulns" in package for package in packages)
    print(f"{'notice: ' if known < len(packages) else ''}{known} of {len(packages)} requirements could be looked up")
    return "\n".join(faults) or None


def output(*command: str | Path) -> str:
    """What a command prints, whatever its exit status: pip-audit's is 1 where it finds something."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    if done.returncode and not done.stdout.strip():
        raise OSError((done.stderr.strip() or "no reason given").splitlines()[-1])
    return done.stdout


if __name__ == "__main__":
    try:
        found = main()
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        found = print(f"notice: the requirements were not looked up: {error}")
    sys.exit(found)
