"""Lists the packages that run with their licences, writes them as an SBOM, and fails where a licence is none that may be among them.

    licences.py ENVIRONMENT.json SBOM.json      ENVIRONMENT: what cyclonedx-py found installed, in CycloneDX; SBOM: the part of it that runs

What runs is `requirements.lock`: the dependencies, and the image's extras. Tools of tests and development may have any licence.
"""

import json
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

if not __package__:  # called by its path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from infra.supply.lock import RUN, Lock, read_lock

FORBIDDEN = re.compile(r"\b[AL]?GPL|GNU|SSPL|BUSL|Business Source|Commons Clause|Elastic|non-?commercial|CC-BY-NC", re.IGNORECASE)
EXCEPTIONS = {
    "chardet": "LGPL 2.1 up to version 6. lm-eval brings it (pytablewriter, mbstrdecoder, which takes no newer one); used as the library that it is, unchanged",
    "psycopg2-binary": "LGPL with an exception for linking. In the image alone, for MLflow's database; used as the library that it is, unchanged",
    "text-unidecode": "the Artistic License or the GPL, as one chooses: the Artistic License is chosen",
}
"""Package to why its licence is no hindrance, though its name is among the forbidden."""
UNSAID = {"huey": "MIT, by its file LICENSE", "skops": "MIT, by its file LICENSE"}
"""Package to its licence, where its metadata say none."""


def licences_of(package: str) -> list[str]:
    """What a package's metadata say of its licence: the expression alone where there is one."""
    told = metadata.metadata(package)
    if told.get("License-Expression"):
        return [str(told["License-Expression"])]
    named = [
        one.rpartition(" :: ")[2]
        for one in told.get_all("Classifier") or []
        if one.startswith("License ::") and one.count("::") > 1
    ]
    written = str(told.get("License") or "").strip().splitlines()[:1]
    return named or [one[:80] for one in written] or [UNSAID[one] for one in UNSAID if one == package]


def problems(licences: dict[str, list[str]]) -> list[str]:
    """Packages whose licence may not be among what runs, or is unknown."""
    found = [f"{name}: its licence is not known; add it to UNSAID" for name, some in licences.items() if not some]
    for name, some in licences.items():
        bad = [one for one in some if FORBIDDEN.search(one)]
        if bad and name not in EXCEPTIONS:
            found.append(f"{name}: {', '.join(bad)}; replace the package, or say in EXCEPTIONS why it is no hindrance")
    return found


def part_that_runs(environment: dict[str, Any], lock: Lock) -> dict[str, Any]:
    """Of an SBOM of everything that is installed what the lock names, with the hashes of the files that may be installed."""
    kept, refs = [], set()
    for component in environment["components"]:
        name = re.sub(r"[-_.]+", "-", component["name"]).lower()
        if name in lock:
            allowed = [
                {"type": "distribution", "url": component["purl"], "hashes": [{"alg": "SHA-256", "content": one}]}
                for one in sorted(lock[name][1])
            ]
            kept.append(component | {"externalReferences": [*component.get("externalReferences", []), *allowed]})
            refs.add(component["bom-ref"])
    root = environment["metadata"]["component"]["bom-ref"]
    edges = [
        one | {"dependsOn": [ref for ref in one.get("dependsOn", []) if ref in refs]}
        for one in environment["dependencies"]
        if one["ref"] in refs | {root}
    ]
    return environment | {"components": kept, "dependencies": edges}


def main() -> None:
    environment, out = map(Path, sys.argv[1:])
    lock = read_lock(RUN.read_text())
    sbom = part_that_runs(json.loads(environment.read_text()), lock)
    out.write_text(json.dumps(sbom, indent=1))
    licences = {name: licences_of(name) for name in lock}
    for name, (version, _) in lock.items():
        print(
            f"{name:32} {version:16} {' / '.join(licences[name])}{'  [' + EXCEPTIONS[name] + ']' if name in EXCEPTIONS else ''}"
        )
    print(f"{len(sbom['components'])} of {len(lock)} packages that run, with the hashes of their files: {out}")
    if found := problems(licences):
        raise SystemExit("\n".join(["licences that may not be among what runs:", *found]))


if __name__ == "__main__":
    main()
