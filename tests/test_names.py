"""Names that come from strangers: how they are shown, and where files go that are called by them (utils_name.py)."""

import csv
import io
import logging
import os
import sys
from pathlib import Path

import pytest
import torch

from data.files import list_files
from data.preparation import run
from data.preparation.pack import pack_lmdb
from evaluation.report import write_csv
from main_prepare_data import main as prepare_main
from main_show_ssg import main as show_main
from main_test import main as restore_main
from tests.conftest import photograph
from tests.test_main_test import save_images, save_run
from utils import utils_lmdb, utils_logger
from utils.utils_error import UserError, accept_all_characters, printable
from utils.utils_image import imread_uint, imsave
from utils.utils_name import cell, check_output, output_names, output_path, safe_name
from utils.utils_option import DatasetOptions
from utils.utils_run import write_atomically

NASTY = [
    "",
    ".",
    "..",
    "...",
    "../../gt",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "..\\..\\gt",
    "C:",
    "C:\\gt",
    "c:/gt",
    "a:stream",
    "CON",
    "con.png",
    "NUL",
    "Com1.tar.gz",
    "lpt9",
    "a.",
    "a. ",
    " a",
    "a\0b",
    "a\nb",
    "a\tb",
    "\x1b[31mred",
    "\u202egnp.exe",
    "caf\udce9",
    "a|b<c>d*e?",
    "~",
    "-rf",
    "$HOME",
    "~/gt",
    "..%2f",
    "\u2028",
]


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(run, "ALONE", float("inf"))


@pytest.mark.parametrize("name", NASTY, ids=ascii)
def test_a_safe_name_is_one_name_on_every_system_and_stays_as_it_is(tmp_path, name):
    safe = safe_name(name)
    assert safe
    assert safe_name(safe) == safe
    assert printable(safe) == safe
    assert not set(safe) & set('<>:"/\\|?*')
    assert safe[-1] not in ". "
    assert safe.split(".")[0].upper() not in ("CON", "NUL", "COM1", "LPT9")
    assert output_path(tmp_path, safe, f"{safe}.png").resolve() == tmp_path / safe / f"{safe}.png"
    (tmp_path / safe).mkdir()


@pytest.mark.parametrize(
    "name", ["gan + SSL (x4)", "Set5", "a.b_c-d", "Kodak 24", "\u00e9t\u00e9 \u6771\u4eac", "console"]
)
def test_a_usual_name_is_kept(name):
    assert safe_name(name) == name
    assert printable(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/../../x", "/x", "a//b", "a/", "a\0b"], ids=ascii)
def test_an_output_path_does_not_leave_its_folder(tmp_path, name):
    with pytest.raises(UserError, match="cannot be the name of a file"):
        output_path(tmp_path / "out", name)


def test_links_in_the_output_folder_do_not_lead_out_of_it(tmp_path):
    for folder in ("gt", "out/inside"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "gt/a.png").touch()
    (tmp_path / "out/set").symlink_to(tmp_path / "gt", target_is_directory=True)
    (tmp_path / "out/a.png").symlink_to(tmp_path / "gt/a.png")
    (tmp_path / "out/fine").symlink_to(tmp_path / "out/inside", target_is_directory=True)
    (tmp_path / "link").symlink_to(tmp_path / "out", target_is_directory=True)
    for name in ("set/a.png", "set/new/a.png", "a.png"):
        for folder in ("out", "link"):
            with pytest.raises(UserError, match="leads out of"):
                output_path(tmp_path / folder, name)
    output_path(tmp_path / "link", "fine", "a.png")
    os.link(tmp_path / "gt/a.png", tmp_path / "out/hard.png")
    with pytest.raises(UserError, match="one of the inputs"):
        output_path(tmp_path / "out", "hard.png", inputs=[tmp_path / "gt/a.png"])


def test_an_output_folder_is_known_behind_links(tmp_path):
    for folder in ("gt/sub", "out/gan"):
        (tmp_path / folder).mkdir(parents=True)
    image = tmp_path / "gt/sub/a.png"
    image.touch()
    (tmp_path / "same").symlink_to(tmp_path / "gt", target_is_directory=True)
    (tmp_path / "out/gan/gt").symlink_to(tmp_path / "out/gan", target_is_directory=True)
    for output in ("same", "same/sub", "same/new"):
        with pytest.raises(UserError, match="give another folder"):
            check_output(tmp_path / output, [str(image)], [str(tmp_path / "gt")])
    check_output(tmp_path / "out", [str(image)], [str(tmp_path / "gt")], ["gan/gt/a.png"])


# --------------------------------------------------------------------------------------------------------- main_test.py


def restored(tmp_path, *arguments):
    restore_main(["--output", str(tmp_path / "out"), "--report_images", "1", "--metrics", "psnr", *map(str, arguments)])


def everything_but(root: Path, *folders: str) -> dict[Path, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if path.relative_to(root).parts[0] not in folders}


@pytest.mark.parametrize("label", [name for name in NASTY if name and "\0" not in name and name[0] != "-"], ids=ascii)
def test_no_label_of_a_model_leads_out_of_the_output_folder(tmp_path, label):
    run, H = save_run(tmp_path / "run", names=("1_E",)), save_images(tmp_path / "gt", {"a.png": (24, 24)})
    before = everything_but(tmp_path, "out")
    if safe_name(label) == label:
        restored(tmp_path, "--model_path", f"{label}={run}", "--gt", H)
        assert (tmp_path / "out" / label / "gt" / "a.png").is_file()
    else:
        with pytest.raises(UserError, match="NAME=PATH"):
            restored(tmp_path, "--model_path", f"{label}={run}", "--gt", H)
        assert not (tmp_path / "out").exists()
    assert everything_but(tmp_path, "out") == before


@pytest.mark.parametrize("taken", ["results.json", "Report.HTML", "bicubic"])
def test_a_label_is_no_name_of_a_report(tmp_path, taken):
    run, H = save_run(tmp_path / "run", names=("1_E",)), save_images(tmp_path / "gt", {"a.png": (24, 24)})
    with pytest.raises(UserError, match="is taken"):
        restored(tmp_path, "--model_path", f"{taken}={run}", "--gt", H)


def test_a_link_to_the_ground_truth_in_the_output_folder_is_refused_before_any_work(tmp_path):
    run, H = save_run(tmp_path / "run", names=("1_E",)), save_images(tmp_path / "gt", {"a.png": (24, 24)})
    (tmp_path / "out/run").mkdir(parents=True)
    (tmp_path / "out/run/gt").symlink_to(H, target_is_directory=True)
    before = everything_but(tmp_path)
    with pytest.raises(UserError, match="leads out of"):
        restored(tmp_path, "--model_path", run, "--gt", H)
    assert everything_but(tmp_path) == before


STRANGE = ["caf\udce9", "line\nbreak", "\x1b[31mred\x07", "\u202egnp", "=1+1", "@sum", "-1", "a:b", "CON", "tab\tstop"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files")
def test_images_of_strange_names_are_restored_under_them_and_named_escaped(tmp_path, capsys):
    run = save_run(tmp_path / "run", names=("1_E",))
    (tmp_path / "gt").mkdir()
    for name in STRANGE:
        imsave(photograph(24, 24), str(tmp_path / "gt" / f"{name}.png"))
    restored(tmp_path, "--model_path", run, "--gt", tmp_path / "gt")
    out = tmp_path / "out"
    assert {path.stem for path in (out / "run/gt").iterdir()} == set(STRANGE)
    said = capsys.readouterr()
    for text in (said.out, said.err, *((out / f"results.{kind}").read_text("utf-8") for kind in ("csv", "json", "md"))):
        assert printable(text, keep="\n") == text
        assert "line\nbreak" not in text
    with (out / "results.csv").open(newline="", encoding="utf-8") as file:
        names = {row["image"] for row in csv.DictReader(file)}
    assert names == {cell(printable(name)) for name in STRANGE}
    assert not any(name.startswith(tuple("=+-@\t\r")) for name in names)
    assert "caf\\udce9" in names
    assert "caf\\\\udce9" in (out / "report.html").read_text("utf-8") + (out / "results.json").read_text("utf-8")


# ------------------------------------------------------------------------------------------------- main_prepare_data.py


def lmdb_of(folder: Path, keys: list[str]) -> Path:
    """An LMDB folder with one photograph under each key, as another program may have written it."""
    lmdb = utils_lmdb.import_lmdb()
    image = folder.parent / "image.png"
    imsave(photograph(24, 24), str(image))
    with lmdb.open(str(folder)) as env, env.begin(write=True) as transaction:
        for key in keys:
            transaction.put(key.encode(errors="surrogateescape"), image.read_bytes())
    lines = "".join(f"{key}.png (24,24,3) 1\n" for key in keys)
    (folder / utils_lmdb.META).write_bytes(lines.encode(errors="surrogateescape"))
    return folder


KEYS = ["../x", "../../gt/a", "/etc/x", "x/y", "C:/x", "C:\\x", "..\\x", "nul", "a\0b", "a. ", "caf\udce9", "-"]


@pytest.mark.parametrize("command", ["modcrop", "masks --format both", "lr-blind --type bsrgan --versions 2", "lmdb"])
def test_no_key_of_an_lmdb_folder_leads_out_of_the_output_folder(tmp_path, command):
    (tmp_path / "deep/er").mkdir(parents=True)
    save_images(tmp_path / "deep/gt", {"a.png": (9, 9)})
    source = lmdb_of(tmp_path / "deep/er/x.lmdb", KEYS)
    before = everything_but(tmp_path / "deep", "er")
    output = tmp_path / "deep/er/out.lmdb"
    assert prepare_main([*command.split(), "--input", str(source), "--output", str(output), "--workers", "1"]) == 0
    utils_lmdb.close_all()
    assert everything_but(tmp_path / "deep", "er") == before
    assert {path.name for path in (tmp_path / "deep/er").iterdir()} == {"x.lmdb", "image.png", "out.lmdb"}
    if command == "modcrop":
        assert len([*output.rglob("*.png")]) == len(KEYS)
    assert all(safe_name(part) == part for path in output.rglob("*") for part in path.relative_to(output).parts)


def test_main_test_reads_such_an_lmdb_folder(tmp_path):
    source, run = lmdb_of(tmp_path / "x.lmdb", KEYS), save_run(tmp_path / "run", names=("1_E",))
    before = {path.name for path in tmp_path.iterdir()}
    restored(tmp_path, "--model_path", run, "--input", source)
    utils_lmdb.close_all()
    assert {path.name for path in tmp_path.iterdir()} == {*before, "out"}
    assert len([*(tmp_path / "out/run/x.lmdb").rglob("*.png")]) == len(KEYS)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files")
def test_files_of_strange_names_are_packed_and_degraded(tmp_path, capsys):
    (tmp_path / "H").mkdir()
    for name in STRANGE:
        imsave(photograph(24, 24), str(tmp_path / "H" / f"{name}.png"))
    (tmp_path / "H" / "bad\udce9\x1b.png").touch()
    common = ["--input", str(tmp_path / "H"), "--workers", "1", "--output"]
    assert prepare_main(["lr-blind", "--type", "bsrgan", *common, str(tmp_path / "L")]) == 1
    assert {path.stem for path in (tmp_path / "L").rglob("*.png")} == set(STRANGE)
    assert prepare_main(["lmdb", *common, str(tmp_path / "H.lmdb")]) == 1
    names = [os.path.relpath(path, tmp_path / "H.lmdb") for path in utils_lmdb.list_lmdb(str(tmp_path / "H.lmdb"))]
    assert set(names) == {f"{printable(name)}.png" for name in STRANGE}
    for name in names:
        assert imread_uint(f"{tmp_path}/H.lmdb/{name}").shape == (24, 24, 3)
    utils_lmdb.close_all()
    prepare_main(["check", "--H", str(tmp_path / "H"), "--workers", "1"])
    said = "".join(capsys.readouterr())
    assert "bad\\udce9\\x1b.png" in said
    assert printable(said, keep="\n") == said


def test_an_output_folder_that_is_a_link_to_the_input_is_refused(tmp_path):
    H = save_images(tmp_path / "H", {"a.png": (24, 24)})
    (tmp_path / "out").symlink_to(H, target_is_directory=True)
    before = everything_but(tmp_path)
    for command in (["modcrop"], ["subimages", "--size", "8", "--step", "8", "--L", str(H), "--scale", "1"]):
        with pytest.raises(UserError, match="holds the input image"):
            prepare_main([*command, "--input", str(H), "--output", str(tmp_path / "out")])
    (tmp_path / "x.lmdb").symlink_to(H, target_is_directory=True)
    with pytest.raises(UserError, match="holds the input image"):
        pack_lmdb([str(H)], tmp_path / "x.lmdb", False, 1, False)
    (tmp_path / "x.lmdb").unlink()
    assert everything_but(tmp_path) == before


def test_a_figure_is_not_drawn_over_its_image(tmp_path):
    image = save_images(tmp_path, {"a.png": (40, 40)}) / "a.png"
    before = image.read_bytes()
    (tmp_path / "soft.png").symlink_to(image)
    os.link(image, tmp_path / "hard.png")
    for name in ("a.png", "soft.png", "hard.png"):
        with pytest.raises(UserError, match="one of the inputs"):
            show_main([str(image), "--pixel", "20", "20", "--output", str(tmp_path / name)])
    assert image.read_bytes() == before


# ---------------------------------------------------------------------------------------------- terminal and text files


def test_what_cannot_be_seen_is_escaped():
    assert printable("a\nb\x1b\u202e\udce9\u2028") == "a\\nb\\x1b\\u202e\\udce9\\u2028"
    family = "\U0001f468\u200d\U0001f469"
    assert printable(family) == family


def test_an_error_is_one_line_that_shows_no_control_characters():
    error = UserError("a\x1b[2J.png: cannot be read\n  for a reason")
    assert str(error) == "a\\x1b[2J.png: cannot be read for a reason"


def test_terminal_and_log_file_get_names_escaped(tmp_path, capsys):
    utils_logger.setup(tmp_path / "train.log")
    logging.getLogger().warning("left out: %s", "caf\udce9\x1b[2J.png")
    utils_logger.close_file()
    assert "left out: caf\\udce9\\x1b[2J.png" in capsys.readouterr().out
    assert "left out: caf\\udce9\\x1b[2J.png" in (tmp_path / "train.log").read_text("utf-8")


def test_a_strict_terminal_gets_escapes_instead_of_an_exception(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    accept_all_characters()
    print("caf\u00e9", flush=True)
    assert stream.buffer.getvalue() == b"caf\\xe9" + os.linesep.encode()  # type: ignore[attr-defined]


def test_text_files_take_names_that_are_not_utf_8(tmp_path):
    write_atomically("caf\udce9", tmp_path / "x.md")
    assert (tmp_path / "x.md").read_text("utf-8") == "caf\\udce9"


def test_no_cell_of_a_csv_is_a_formula_and_numbers_stay_numbers(tmp_path):
    names = ["=1+1", "+a", "-a", "@a", "\ta", "\ra", "\uff1da", "plain"]
    write_csv([{"image": name, "psnr": -1.5} for name in names], tmp_path / "x.csv")
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    assert [row[0] for row in rows] == ["'=1+1", "'+a", "'-a", "'@a", "\\ta", "\\ra", "'\uff1da", "plain"]
    assert {row[1] for row in rows} == {"-1.5"}


def test_names_of_files_are_kept_and_keys_of_lmdb_folders_made_safe():
    assert output_names(["a/x y:1.png", "a/s/..b.png"], ["a"]) == ["x y:1", "s/..b"]
    assert output_names(["x.lmdb/../b:1.png", "x.lmdb/s/c.png"], ["x.lmdb"]) == ["__/b_1", "s/c"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files")
def test_the_table_of_a_test_leads_back_to_images_of_strange_names(tmp_path):
    H = tmp_path / "gt"
    H.mkdir()
    for name in STRANGE:
        imsave(photograph(24, 24), str(H / f"{name}.png"))
    runs = [save_run(tmp_path / name, names=("1_E",)) for name in ("one", "two")]
    torch.save({k: v * 0.5 for k, v in torch.load(runs[1] / "models/1_E.pth").items()}, runs[1] / "models/1_E.pth")
    restored(tmp_path, "--model_path", *runs, "--gt", H)
    opt = DatasetOptions(dataset_type="rank", rank_csv=str(tmp_path / "out/results.csv"), rank_metric="psnr")
    pairs, problems = list_files(opt)
    assert problems == []
    assert {Path(pair.H).stem for pair in pairs} == set(STRANGE)
