"""Asks for known faults of every locked version with pip-audit: what has one, what could not be looked up, and whether anything could.

make audit                                  make audit ARGS="--ignore-vuln PYSEC-…"; options are pip-audit's, such as --vulnerability-service osv
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCKS = (("requirements.lock", "requirements-dev.lock", "infra/requirements-cuda.lock"), ("infra/supply/requirements.lock",))
"""Of each environment; a package may be in two of them."""
PIP_AUDIT = ("--format", "json", "--progress-spinner", "off", "--require-hashes", "--disable-pip")


def said(answer: str, error: str) -> tuple[str, int]:
    """What pip-audit found, for people, and the exit code: 0 without a fault, 1 with one, 3 where not all could be looked up."""
    try:
        packages = json.loads(answer)["dependencies"]
    except ValueError:
        last = (error.strip().splitlines() or ["it gave no reason"])[-1]
        return f"nothing was looked up: pip-audit found nobody to ask, or stopped ({last[:300]}). Run this where a network is", 3
    faults = [
        f"{one['name']} {one['version']}: {fault['id']}, mended in {', '.join(fault['fix_versions']) or 'no version'}"
        for one in packages
        for fault in one.get("vulns", [])
    ]
    skipped = [one["name"] for one in packages if "skip_reason" in one]
    lines = list(faults)
    if skipped:
        what = "nothing was looked up" if len(skipped) == len(packages) else f"{len(skipped)} packages were not looked up"
        lines = [
            *faults,
            f"{what}: who was asked does not know {', '.join(skipped[:8])}{', …' if len(skipped) > 8 else ''}. Run this where a network is",
        ]
    lines.append(f"{len(packages)} packages, {len(packages) - len(skipped)} looked up, {len(faults)} known faults")
    return "\n".join(lines), 1 if faults else 3 if skipped else 0


def main() -> None:
    tool, codes = Path(sys.executable).with_name("pip-audit"), []
    for locks in LOCKS:
        files = [one for lock in locks for one in ("--requirement", str(ROOT / lock))]
        done = subprocess.run([tool, *PIP_AUDIT, *files, *sys.argv[1:]], capture_output=True, text=True)
        text, code = said(done.stdout, done.stderr)
        print(f"{', '.join(locks)}:\n{text}")
        codes.append(code)
    raise SystemExit(1 if 1 in codes else max(codes))


if __name__ == "__main__":
    main()
