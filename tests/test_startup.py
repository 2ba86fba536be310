"""Scripts answer --help and slips before anything heavy is imported, and set what torch reads as it is imported."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from tests.conftest import REPOSITORY
from tests.test_rooms import modules

IMPORTS = (ast.Import, ast.ImportFrom)

TRAIN = {
    "main_train_psnr": "options/train_bsrgan_psnr.json",
    "main_train_gan": "options/train_bsrgan_ssl.json",
    "main_train_dm": "options/train_resshift_ssl.json",
    "main_train_ranker": "options/train_ranker.json",
}
SCRIPTS = sorted(path.stem for path in REPOSITORY.glob("main_*.py"))
PREPARE = ("multiscale", "subimages", "masks", "lr-bicubic", "lr-blind", "enlarge", "modcrop", "lmdb", "check", "demo")
TEST = "main_test --opt options/test_bsrgan.json"
# What is typed -> what the answer says.
SLIPS = {
    **{f"{script} --no-such-argument": "--help" for script in SCRIPTS},
    **{f"{script} --opt {file} train.iteratoins=1": "iterations" for script, file in TRAIN.items()},
    **{f"{script} --opt no_such_file.json": "no such option file" for script in (*TRAIN, "main_test")},
    "main_train_psnr --opt options/train_bsrgan_ssl.json": "main_train_gan.py",
    "main_train_gan --opt options/train_bsrgan_ssl.json scale=5": "scale",
    f"{TEST} test.tiel=5": "tile",
    f'{TEST} test.metrics=["pnsr"]': "psnr",
    "main_test --model_path x.pth --gt . --metrics pnsr": "psnr",
    "main_test --model_path x.pth": "--input",
    "main_prepare_data lr-blind --type no_such": "bsrgan",
    "main_prepare_data subimages --input . --output o --scale 2": "--L",
    "main_prepare_data check": "--opt",
    "main_prepare_data check --opt no_such_file.json": "no such option file",
    "main_show_ssg no_such_image.png": "no such image",
    "main_export --model_path x.pth --format onxn": "onnx",
    "main_export --model_path x.pth --format pth --size 4 4": "--size",
}
HELP = [
    *(f"{script} --help" for script in SCRIPTS),
    *(f"main_prepare_data {command} --help" for command in PREPARE),
    "utils.utils_option",  # the schema
]

# Each command in turn, all in one process: that is fast as long as nothing heavy is imported.
ANSWERS = """
import contextlib, importlib, io, json, runpy, sys
answers, commands = {}, json.loads(sys.argv[1])
for command in commands:
    before = set(sys.modules)
    name, *sys.argv[1:] = command.split()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            runpy.run_module(name, run_name="__main__") if "." in name else importlib.import_module(name).main()
        except (Exception, SystemExit) as error:
            print(f"{type(error).__name__}: {error}")
    answers[command] = said.getvalue(), sorted({"torch", "torchvision", "cv2"} & (set(sys.modules) - before))
print(json.dumps(answers))
"""

# Each script up to where it asks for torch, which it does not get: that is fast, and the next one asks anew.
ASKS = """
import importlib, json, os, re, sys
class Asked(BaseException):
    pass
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise Asked
sys.meta_path.insert(0, Guard())
answers, commands = {}, json.loads(sys.argv[1])
for command in commands:
    os.environ.pop("OMP_WAIT_POLICY", None)
    for module in [*sys.modules]:
        if re.match(r"main_|(training|testing|data|models|evaluation|utils)\\b", module):
            del sys.modules[module]
    name, *sys.argv[1:] = command.split()
    try:
        importlib.import_module(name).main()
    except Asked:
        answers[command] = os.environ.get("OMP_WAIT_POLICY")
print(json.dumps(answers))
"""


def in_one_process(code: str, commands: Iterable[str]) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "RANK")}
    command = [sys.executable, "-c", code, json.dumps(list(commands))]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_help_and_slips_are_answered_without_torch_and_opencv():
    answers = in_one_process(ANSWERS, [*HELP, *SLIPS])
    assert {command: heavy for command, (_, heavy) in answers.items() if heavy} == {}
    for command in HELP:
        assert re.search(r"^usage: |^{", answers[command][0]), command
    for command, words in SLIPS.items():
        said = answers[command][0]
        assert said.startswith("UserError: "), command
        assert words in said.partition(": ")[2], said


def test_openmp_is_told_how_to_wait_before_any_script_imports_torch(tmp_path):
    (tmp_path / "a.png").touch()
    commands = [f"{script} --opt {file}" for script, file in TRAIN.items()]
    commands += [TEST, f"main_test --model_path x.pth --input {tmp_path}", f"main_show_ssg {tmp_path / 'a.png'}"]
    commands += [f"main_prepare_data {command} --input {tmp_path} --output o" for command in ("modcrop", "lmdb")]
    commands += ["main_export --model_path x.pth --format pth"]
    commands += ["main_prepare_data demo", f"main_prepare_data check --H {tmp_path}"]
    assert {command.split()[0] for command in commands} == {*SCRIPTS} - {"main_download_pretrained_models"}
    assert in_one_process(ASKS, commands) == dict.fromkeys(commands, "PASSIVE")


def test_torchvision_which_brings_the_compiler_waits_until_it_is_used():
    for name, path in modules().items():
        at_once = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, IMPORTS)]
        assert not any("torchvision" in ast.unparse(node) for node in at_once), name
