"""What CI makes of pip-audit's answers (.ci/audit.py)."""

import importlib.util
import json
import re
from typing import Any

import pytest

from tests.conftest import REPOSITORY

OFFLINE = "requests.exceptions.ConnectionError: HTTPSConnectionPool(host='api', port=443): Max retries exceeded"


def report(*packages: dict[str, Any]) -> str:
    return json.dumps({"dependencies": [{"name": "a", "version": "1", **package} for package in packages]})


@pytest.mark.parametrize(
    ("output", "errors", "status", "words"),
    [
        (report({"vulns": []}, {"skip_reason": "not found"}), "", 0, "none in 1 packages, 1 not known"),
        (report({"vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}), "Found 1", 1, "a 1: CVE-1, mended in 2"),
        (report({"skip_reason": "not found"}), "", 0, "not checked, the package index knows nothing"),
        ("", OFFLINE, 0, "not checked, the service .* cannot be reached"),
        ("", "No module named pip_audit", 1, "failed: No module named pip_audit"),
        ("[]", "", 1, "failed"),
    ],
)
def test_a_finding_fails_and_a_service_out_of_reach_is_one_line(
    output: str, errors: str, status: int, words: str
) -> None:
    spec = importlib.util.spec_from_file_location("audit", REPOSITORY / ".ci" / "audit.py")
    assert spec
    assert spec.loader
    audit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(audit)
    found, line = audit.verdict(output, errors)
    assert found == status
    assert re.search(words, line), line
    assert "\n" not in line
