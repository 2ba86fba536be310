"""Known vulnerabilities of the installed packages, by pip-audit: status 1 where there are any.

Where the service that knows them cannot be reached, one line says that nothing was checked, and the status is 0.
"""

import json
import re
import subprocess
import sys

_UNREACHABLE = re.compile(r"ConnectionError|ConnectTimeout|ReadTimeout|ProxyError|ServiceError|Max retries exceeded")


def verdict(output: str, errors: str) -> tuple[int, str]:
    """Status and what to say of pip-audit's two outputs, the first of them JSON."""
    try:
        packages = json.loads(output)["dependencies"]
    except (ValueError, KeyError, TypeError):
        if _UNREACHABLE.search(errors):
            return 0, "known vulnerabilities: not checked, the service that knows them cannot be reached"
        return 1, f"pip-audit failed: {errors.strip()[-500:]}"
    found = [
        f"{package['name']} {package['version']}: {flaw['id']}, mended in {', '.join(flaw['fix_versions']) or 'none'}"
        for package in packages
        for flaw in package.get("vulns", ())
    ]
    if found:
        return 1, "\n".join(found)
    checked = sum("vulns" in package for package in packages)
    if not checked:
        return 0, "known vulnerabilities: not checked, the package index knows nothing of them"
    return 0, f"known vulnerabilities: none in {checked} packages, {len(packages) - checked} not known to the service"


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "--local", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    status, text = verdict(done.stdout, done.stderr)
    print(text)
    return status


if __name__ == "__main__":
    sys.exit(main())
