"""benchmarks/run_gpu.py as far as no GPU is needed: parts in processes, their time, the tables."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from tests.conftest import REPOSITORY
from utils.utils_error import UserError

SCRIPT = REPOSITORY / "benchmarks" / "run_gpu.py"


@pytest.fixture(scope="module")
def run_gpu():
    spec = importlib.util.spec_from_file_location("run_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_gpu"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


GOOD = python("import sys; open(r'{folder}/figures.json', 'w').write('{\"ms\": 2.5}'); print('measured')")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_ends_in_one_line_and_writes_nothing(tmp_path):
    command = [sys.executable, str(SCRIPT), "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: there is no GPU here that PyTorch can use: nothing is measured\n"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "seconds", "status", "why"),
    [
        (
            "import os, signal; print('so far', flush=True); os.kill(os.getpid(), signal.SIGSEGV)",
            60,
            "failed",
            "SIGSEGV",
        ),
        ("print('so far'); raise SystemExit(3)", 60, "failed", "exit status 3: so far"),
        ("import time; print('so far', flush=True); time.sleep(600)", 2, "timed out", "not done in 2 s"),
    ],
    ids=["crash", "error", "hang"],
)
def test_a_part_that_ends_badly_costs_itself_alone(run_gpu, tmp_path, code, seconds, status, why):
    parts = [run_gpu.Part("bad", seconds, python(code)), run_gpu.Part("good", 60, GOOD)]
    results = run_gpu.run_parts(parts, 1000, tmp_path / "out.json")
    assert results["bad"]["status"] == status
    assert why in results["bad"]["why"]
    assert results["bad"]["output"] == "so far\n"
    assert results["good"]["status"] == "ok"
    assert results["good"]["figures"] == {"ms": 2.5}
    assert json.loads((tmp_path / "out.json").read_text())["parts"] == results


def test_a_part_for_which_no_time_is_left_is_not_run_and_a_shorter_one_is(run_gpu, tmp_path):
    mark = tmp_path / "mark"
    long = run_gpu.Part("long", 3000, python(f"open({str(mark)!r}, 'w')"))
    results = run_gpu.run_parts([long, run_gpu.Part("short", 100, GOOD)], 1000, tmp_path / "out.json")
    assert results["long"] == {"status": "not run", "why": "1000 s left of 3000 s needed"}
    assert results["short"]["status"] == "ok"
    assert not mark.exists()


def test_a_part_whose_program_is_not_installed_is_not_run(run_gpu, tmp_path):
    part = run_gpu.Part("check", 60, ["no-such-program", "--x"], needs="no-such-program")
    results = run_gpu.run_parts([part], 1000, tmp_path / "out.json")
    assert results["check"] == {"status": "not run", "why": "no-such-program is not installed"}


def test_the_limits_of_all_parts_add_up_to_eight_minutes(run_gpu):
    assert sum(part.seconds for part in run_gpu.all_parts()) <= 8 * 60


def test_the_tests_that_need_a_gpu_are_found(run_gpu):
    assert {"tests/test_ssl.py", "tests/test_ssl_layouts.py", "tests/test_step.py"} <= set(run_gpu.gpu_tests())
    assert "tests/test_cuda_on_cpu.py" not in run_gpu.gpu_tests()


def rows(text: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n") if line.startswith("|")]
    return {first: rest for first, *rest in cells if not set(first) <= {"-"}}


def test_what_was_not_measured_says_so_in_every_row(run_gpu):
    text = run_gpu.tables({})
    headings = [line for line, rule in zip(text.split("\n"), text.split("\n")[1:], strict=False) if "|---" in rule]
    of_figures = {first: cells for first, cells in rows(text).items() if not any(f"| {first} |" in h for h in headings)}
    assert len(of_figures) > 25
    assert all("not measured" in " ".join(cells) for cells in of_figures.values())
    assert not any(character.isdigit() for cells in of_figures.values() for character in "".join(cells))


def test_tables_show_what_was_measured_and_why_the_rest_was_not(run_gpu):
    parts = {
        "environment": {"status": "ok", "figures": {"gpu": "NVIDIA X", "memory_gib": 80, "driver": "1.2"}},
        "kernels are right": {"status": "failed", "why": "exit status 1: WRONG"},
        "op": {"status": "timed out", "figures": {"64 cuda": {"ms": 5.0}, "64 naive": {"ms": 400.0, "extra_mib": 9.0}}},
        "tests": {"status": "failed", "figures": {"passed": 70, "failed": ["test_x"], "skipped": 2}},
        "memcheck": {"status": "ok", "figures": {"found": 0}},
        "racecheck": {"status": "not run", "why": "compute-sanitizer is not installed"},
        "training": {
            "status": "ok",
            "figures": {
                "forms": {"plain step": [{"seconds": 0.5, "memory": 100}], "ours": [{"seconds": 0.2, "memory": 80}]}
            },
        },
        "inference": {
            "status": "ok",
            "figures": {
                "forms": {
                    "plain loop": [{"seconds": 0.3, "extra": 600}],
                    "ours, bf16": [{"seconds": 0.1, "extra": 300}],
                },
                "tiles": {"64": {"seconds": 0.6, "extra": 80}},
            },
        },
        "degradation": {"status": "ok", "figures": {"bsrgan": {"ms_a_sample": 0.5, "of_it_drawing": 0.125}}},
        "ncu": {"status": "ok", "figures": {"compare": {"gpu__time_duration.sum": 5000.0}}},
    }
    text = run_gpu.tables({"parts": parts})
    found = rows(text)
    assert "NVIDIA X, 80 GiB, driver 1.2" in text
    assert found["kernels against float64 (`python -m similarity_cuda`)"] == ["not measured (exit status 1: WRONG)"]
    assert found["tests that need a GPU"] == ["70 passed, 1 failed, 2 skipped"]
    assert found["compute-sanitizer, memcheck"] == ["0 found"]
    assert found["compute-sanitizer, racecheck"] == ["not measured (compute-sanitizer is not installed)"]
    assert found["64 images of 128 px, ours (cuda)"] == ["5.000", "80.0", "not measured"]
    assert found["64 images of 128 px, boxsum"] == ["not measured"] * 3
    assert found["ours"] == ["200.0", "2.50", "80"]
    assert found["ours, bf16, tiles of 256"] == ["100.0", "3.00", "300"]
    assert found["ours, tiles of 64"] == ["600.0", "0.50", "80"]
    assert found["ours, whole"] == ["not measured"] * 3
    assert found["bsrgan"] == ["0.500", "0.125"]
    assert found["compare"] == ["5", "not measured", "not measured"]


def test_tables_take_their_place_in_the_readme_and_leave_the_rest(run_gpu, tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{run_gpu.BEGIN}\nof yesterday\n{run_gpu.END}\nafter\n")
    figures = tmp_path / "gpu.json"
    figures.write_text('{"parts": {"memcheck": {"status": "ok", "figures": {"found": 0}}}}')
    monkeypatch.setattr(run_gpu, "README", readme)
    for _ in range(2):
        assert run_gpu.main(["--tables", str(figures)]) == 0
        text = readme.read_text()
        assert text.startswith(f"before\n{run_gpu.BEGIN}\n\n")
        assert text.endswith(f"\n\n{run_gpu.END}\nafter\n")
        assert "yesterday" not in text
        assert "| compute-sanitizer, memcheck | 0 found |" in text
        assert capsys.readouterr().out.strip() in text
    figures.write_text("no JSON")
    with pytest.raises(UserError, match="these are no figures"):
        run_gpu.main(["--tables", str(figures)])
    readme.write_text("without a place")
    figures.write_text("{}")
    with pytest.raises(UserError, match="marks are missing"):
        run_gpu.main(["--tables", str(figures)])
    assert readme.read_text() == "without a place"


def test_the_readme_of_the_benchmarks_has_that_place(run_gpu):
    text = (REPOSITORY / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert run_gpu.with_tables(text, "x") != text


def test_figures_are_read_from_what_pytest_compute_sanitizer_and_ncu_write(run_gpu, tmp_path):
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure/></testcase>'
        '<testcase name="c"><skipped/></testcase><testcase name="d"><error/></testcase></testsuite></testsuites>'
    )
    assert run_gpu.counted_tests("", tmp_path) == {"passed": 1, "failed": ["b", "d"], "skipped": 1}
    assert run_gpu.sanitized("========= ERROR SUMMARY: 12 errors\n", tmp_path) == {"found": 12}
    race = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert run_gpu.sanitized(race, tmp_path) == {"found": 0}
    assert run_gpu.sanitized("it crashed", tmp_path) == {}
    table = (
        '==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","compare<3>(int)","launch__registers_per_thread","","96"\n'
        '"0","compare<3>(int)","gpu__time_duration.sum","ns","1,250"\n'
        '"1","compare<3>(int)","gpu__time_duration.sum","ns","950"\n'
        '"2","finish(int)","gpu__time_duration.sum","ns","n/a"\n'
    )
    assert run_gpu.profiled(table, tmp_path) == {
        "compare": {"launch__registers_per_thread": 96.0, "gpu__time_duration.sum": 1250.0}
    }


def test_figures_are_written_where_git_does_not_look(run_gpu):
    assert f"{run_gpu.RESULTS.name}/" in (REPOSITORY / ".gitignore").read_text(encoding="utf-8").split("\n")
