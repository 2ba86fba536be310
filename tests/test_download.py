"""Fetching published files, from a server in this process that cuts, refuses, changes and lies on demand."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import main_download_pretrained_models as script
from models import published as zoo
from models.published import Published, fetch, part_of
from models.select_network import define_G
from tests.conftest import REPOSITORY
from utils.utils_error import UserError, run

CONTENT = bytes(i * i % 251 for i in range(200_000))
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Server:
    """What the server has and how it behaves; what it was asked."""

    address: str = ""
    content: bytes = CONTENT
    etag: str | None = '"1"'
    modified: str | None = None
    ranges: bool = True
    honours_if_range: bool = True
    chunked: bool = False
    content_type: str = "application/octet-stream"
    # Of each request in turn: after how many bytes of the body the connection is cut; None = not.
    cuts: list[int | None] = field(default_factory=list)
    # Of each request in turn: a status instead of the file.
    statuses: list[int | None] = field(default_factory=list)
    asked: list[dict[str, str]] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Server

    def do_GET(self) -> None:
        state = self.state
        state.asked.append(dict(self.headers))
        status = state.statuses.pop(0) if state.statuses else None
        if status is None and not self.path.startswith("/file"):
            status = 404
        if status is not None:
            state.answered.append(status)
            self.send_error(status)
            return
        span = self.headers["Range"]
        validator = state.etag or state.modified
        same = self.headers["If-Range"] == validator or not state.honours_if_range
        start = int(span.removeprefix("bytes=").removesuffix("-")) if span and state.ranges and same else 0
        if start >= len(state.content) > 0:
            state.answered.append(416)
            self.send_error(416)
            return
        body = state.content[start:]
        state.answered.append(206 if start else 200)
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", state.content_type)
        if state.etag:
            self.send_header("ETag", state.etag)
        if state.modified:
            self.send_header("Last-Modified", state.modified)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(state.content) - 1}/{len(state.content)}")
        if state.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: state.cuts.pop(0) if state.cuts else None])
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(zoo, "_WAIT", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    state = Server()
    handler = type("Handler", (_Handler,), {"state": state})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        state.address = f"http://127.0.0.1:{httpd.server_port}"
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        httpd.shutdown()
        thread.join()


@pytest.fixture
def published(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's table, with files of the server."""
    files = (
        Published(
            "good", "right.pth", "", "rrdbnet", 4, 16_697_987, "Apache-2.0", f"{server.address}/file1", sha256=SHA256
        ),
        Published("good", "other.pth", "", "rrdbnet", 4, url=f"{server.address}/file2"),
        Published("gone", "gone.pth", "", "rrdbnet", 4, url=f"{server.address}/missing"),
        Published("good", "hand.pth", "", "rrdbnet", 4, page="https://example.org/page"),
        Published("page", "page.pth", "", "rrdbnet", 4, page="https://example.org/other"),
    )
    for module in (zoo, script):
        monkeypatch.setattr(module, "PUBLISHED", files)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------- one file


def test_a_download_is_whole_and_leaves_nothing_else(server, tmp_path):
    assert fetch(f"{server.address}/file", tmp_path / "a.pth", len(CONTENT), SHA256) == SHA256
    assert (tmp_path / "a.pth").read_bytes() == CONTENT
    assert left(tmp_path) == ["a.pth"]


def test_a_cut_download_goes_on_where_it_was_cut(server, tmp_path, capsys):
    server.cuts = [70_000, 50_000]
    fetch(f"{server.address}/file", tmp_path / "a.pth", sha256=SHA256)
    assert (tmp_path / "a.pth").read_bytes() == CONTENT
    assert server.answered == [200, 206, 206]
    assert [asked.get("Range") for asked in server.asked] == [None, "bytes=70000-", "bytes=120000-"]
    assert "cut at 70,000 of 200,000 bytes" in capsys.readouterr().err
    assert left(tmp_path) == ["a.pth"]


def test_a_later_call_goes_on_with_what_an_interrupted_one_kept(server, tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.pth"
    server.cuts = [70_000]
    with monkeypatch.context() as patched:
        patched.setattr(zoo.time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fetch(f"{server.address}/file", path)
    assert f"{part_of(path)} is kept" in capsys.readouterr().err
    assert part_of(path).read_bytes() == CONTENT[:70_000]
    assert not path.exists()
    fetch(f"{server.address}/file", path)
    assert path.read_bytes() == CONTENT
    assert server.answered == [200, 206]
    assert left(tmp_path) == ["a.pth"]


def test_without_an_etag_the_date_of_change_tells_whether_to_go_on(server, tmp_path):
    server.etag, server.modified, server.cuts = 'W/"weak"', "Mon, 01 Jan 2024 00:00:00 GMT", [70_000]
    # The weak ETag is sent, but may not be asked back (RFC 9110, 13.1.5).
    server.honours_if_range = False
    fetch(f"{server.address}/file", tmp_path / "a.pth", sha256=SHA256)
    assert server.asked[1]["If-Range"] == server.modified


def test_without_any_mark_of_the_file_a_cut_download_starts_anew(server, tmp_path):
    server.etag, server.cuts = None, [70_000]
    fetch(f"{server.address}/file", tmp_path / "a.pth", sha256=SHA256)
    assert server.answered == [200, 200]
    assert "Range" not in server.asked[1]


def test_a_server_without_ranges_sends_all_again(server, tmp_path):
    server.ranges, server.cuts = False, [70_000]
    fetch(f"{server.address}/file", tmp_path / "a.pth")
    assert (tmp_path / "a.pth").read_bytes() == CONTENT
    assert server.answered == [200, 200]


@pytest.mark.parametrize("honours_if_range", [True, False])
@pytest.mark.parametrize("length", [200_000, 50_000])  # the second ends before the piece that was kept: status 416
def test_a_file_that_changed_on_the_server_is_fetched_anew(server, tmp_path, honours_if_range, length):
    path = tmp_path / "a.pth"
    part_of(path).write_bytes(CONTENT[:70_000])
    part_of(path).with_name("a.pth.part.etag").write_text('"1"')
    server.content, server.etag, server.honours_if_range = CONTENT[::-1][:length], '"2"', honours_if_range
    fetch(f"{server.address}/file", path)
    assert path.read_bytes() == CONTENT[::-1][:length]
    assert left(tmp_path) == ["a.pth"]


def test_a_piece_of_unknown_origin_is_not_continued(server, tmp_path):
    part_of(tmp_path / "a.pth").write_bytes(b"?" * 70_000)
    fetch(f"{server.address}/file", tmp_path / "a.pth")
    assert (tmp_path / "a.pth").read_bytes() == CONTENT


@pytest.mark.parametrize("cut", [None, 70_000])
def test_a_body_without_length_is_whole_only_at_its_last_chunk(server, tmp_path, cut):
    server.chunked, server.cuts = True, [cut]
    fetch(f"{server.address}/file", tmp_path / "a.pth")
    assert (tmp_path / "a.pth").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.statuses = [503, 429, None]
    fetch(f"{server.address}/file", tmp_path / "a.pth")
    assert server.answered == [503, 429, 200]


def test_tries_end_when_none_gets_further(server, tmp_path):
    server.cuts = [70_000] + 10 * [0]
    with pytest.raises(UserError) as error:
        fetch(f"{server.address}/file", tmp_path / "a.pth")
    assert "cut at 70,000 of 200,000 bytes" in one_line(error)
    assert len(server.asked) == 1 + zoo._RETRIES
    assert not (tmp_path / "a.pth").exists()
    assert part_of(tmp_path / "a.pth").stat().st_size == 70_000  # for the next call


def test_a_wrong_hash_is_named_and_nothing_is_left(server, tmp_path):
    with pytest.raises(UserError) as error:
        fetch(f"{server.address}/file", tmp_path / "a.pth", sha256="0123abcd")
    assert SHA256 in one_line(error)
    assert "0123abcd..." in str(error.value)
    assert left(tmp_path) == []


@pytest.mark.parametrize("chunked", [False, True])
def test_a_wrong_size_is_named_and_nothing_is_left(server, tmp_path, chunked):
    # With a length the server's offer is refused; without one, what came.
    server.chunked = chunked
    with pytest.raises(UserError) as error:
        fetch(f"{server.address}/file", tmp_path / "a.pth", size=199_999)
    assert "200,000" in one_line(error)
    assert "199,999" in str(error.value)
    assert left(tmp_path) == []


@pytest.mark.parametrize(("status", "words"), [(404, "no such file"), (403, "Forbidden")])
def test_a_refusal_is_one_line_and_not_tried_again(server, tmp_path, status, words):
    server.statuses = [status]
    with pytest.raises(UserError) as error:
        fetch(f"{server.address}/file", tmp_path / "a.pth")
    assert words in one_line(error)
    assert str(status) in str(error.value)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("content_type", "content"),
    [
        ("text/html; charset=utf-8", CONTENT),
        ("application/octet-stream", b"\n<!DOCTYPE HTML><title>Sign in</title>"),
        ("application/octet-stream", b"<html><title>Sign in</title>"),
    ],
)
def test_a_web_page_is_refused_and_does_not_cost_what_was_kept(server, tmp_path, content_type, content):
    path = tmp_path / "a.pth"
    part_of(path).write_bytes(CONTENT[:70_000])
    part_of(path).with_name("a.pth.part.etag").write_text('"1"')
    server.content_type, server.content, server.etag = content_type, content, '"page"'
    with pytest.raises(UserError, match="a web page came"):
        fetch(f"{server.address}/file", path)
    assert not path.exists()
    assert part_of(path).read_bytes() == CONTENT[:70_000]


def test_an_empty_answer_is_no_file(server, tmp_path):
    server.content = b""
    with pytest.raises(UserError, match="0 bytes came"):
        fetch(f"{server.address}/file", tmp_path / "a.pth")
    assert left(tmp_path) == []


def test_a_server_that_is_not_there_is_one_line_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(zoo, "_WAIT", 0.0)
    with pytest.raises(UserError) as error:
        fetch("http://127.0.0.1:9/file", tmp_path / "a.pth")  # a port that nobody may listen on without rights
    assert "cannot be reached" in one_line(error)
    assert capsys.readouterr().err == ""  # no further try is announced


def test_a_full_disk_is_one_line_and_not_the_networks_fault(server, tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zoo.os, "fsync", full)
    with pytest.raises(UserError) as error:
        fetch(f"{server.address}/file", tmp_path / "a.pth")
    assert "No space left on device" in one_line(error)
    assert len(server.asked) == 1
    assert not (tmp_path / "a.pth").exists()


def test_proxies_of_the_environment_are_used(server, tmp_path, monkeypatch):
    # The server stands for the proxy: it is asked for the whole address.
    monkeypatch.delenv("no_proxy")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", server.address)
    monkeypatch.setattr("urllib.request._opener", None)  # urllib reads the proxies at its first use only
    with pytest.raises(UserError, match="404"):
        fetch("http://weights.invalid/file", tmp_path / "a.pth")
    assert server.asked[0]["Host"] == "weights.invalid"


# -------------------------------------------------------------------------------------------------------- the script


def test_names_and_groups_are_fetched_several_in_one_word_and_in_any_case(published, tmp_path, capsys):
    assert script.main(["--models", "RIGHT.pth other.pth", "--model_dir", str(tmp_path / "zoo")]) == 0
    assert left(tmp_path / "zoo") == ["other.pth", "right.pth"]
    out = capsys.readouterr().out
    assert f"SHA-256 {SHA256} (as published)" in out
    assert f"SHA-256 {SHA256} (the published one is not known here)" in out


def test_one_that_fails_does_not_stop_the_others(published, tmp_path, capsys):
    assert script.main(["--models", "gone.pth", "right.pth", "--model_dir", str(tmp_path)]) == 2
    assert left(tmp_path) == ["right.pth"]
    assert capsys.readouterr().err.count("error: ") == 1


def test_in_a_group_a_file_had_by_hand_is_a_note(published, tmp_path, capsys):
    assert script.main(["--models", "Good", "--model_dir", str(tmp_path)]) == 0
    assert left(tmp_path) == ["other.pth", "right.pth"]
    assert "note: hand.pth: only by hand, from https://example.org/page" in capsys.readouterr().err


@pytest.mark.parametrize("names", [["hand.pth"], ["right.pth", "hand.pth"], ["page"]])
def test_a_file_had_by_hand_that_was_asked_for_by_name_or_alone_is_an_error(published, tmp_path, capsys, names):
    assert script.main(["--models", *names, "--model_dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_file_that_is_there_is_checked_and_not_fetched_again(server, published, tmp_path, capsys):
    for name in ("right.pth", "hand.pth"):
        (tmp_path / name).write_bytes(CONTENT)
    assert script.main(["--models", "right.pth", "hand.pth", "--model_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("there already") == 2
    assert server.asked == []


def test_another_file_of_the_name_is_reported_and_left_alone(server, published, tmp_path, capsys):
    (tmp_path / "right.pth").write_bytes(b"mine")
    assert script.main(["--models", "right.pth", "--model_dir", str(tmp_path)]) == 2
    assert "is not the published file" in capsys.readouterr().err
    assert (tmp_path / "right.pth").read_bytes() == b"mine"
    assert server.asked == []


def test_an_unknown_name_suggests_close_ones_and_nothing_is_fetched(server, published, tmp_path):
    with pytest.raises(UserError, match=r"rihgt\.pth.*do you mean right\.pth"):
        script.main(["--models", "other.pth", "rihgt.pth", "--model_dir", str(tmp_path)])
    assert server.asked == []


def test_a_folder_that_cannot_be_made_is_one_line_and_status_2(published, tmp_path, capsys):
    (tmp_path / "zoo").write_text("")
    with pytest.raises(SystemExit) as end:
        run(lambda: script.main(["--models", "all", "--model_dir", str(tmp_path / "zoo")]))
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "give another --model_dir" in error


def test_without_names_the_files_are_listed_with_what_is_there(published, tmp_path, capsys):
    (tmp_path / "right.pth").write_bytes(CONTENT)
    assert script.main(["--model_dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (here,) = (line for line in lines if "here" in line)
    assert here.split()[0] == "right.pth"
    assert "0.2 MB" in here
    assert any("hand.pth" in line and "by hand: https://example.org/page" in line for line in lines)
    assert "16.7 M" in here
    assert "Apache-2.0" in here
    assert all("licence: see its page" in line for line in lines if "other.pth" in line)


COUNTED: dict[str, dict[str, Any]] = {
    "BSRGAN.pth": {"net_type": "rrdbnet"},
    "BSRGANx2.pth": {"net_type": "rrdbnet"},
    "RealESRGAN_x2plus.pth": {"net_type": "rrdbnet_basicsr"},
    "RealESRGAN_x4plus_anime_6B.pth": {"net_type": "rrdbnet_basicsr", "nb": 6},
    "realesr-general-x4v3.pth": {"net_type": "srvgg_compact", "nf": 64, "nc": 32},
    "realesr-animevideov3.pth": {"net_type": "srvgg_compact", "nf": 64, "nc": 16},
    "msrresnet_x4_psnr.pth": {"net_type": "msrresnet1", "nc": 64, "nb": 16},
    "mmsr_SRResNet_pretrain.pth": {"net_type": "ranksrgan_srresnet", "nf": 64, "nb": 16},
    "001_classicalSR_DIV2K_s48w8_SwinIR-M_x8.pth": {
        "net_type": "swinir",
        **{"embed_dim": 180, "depths": [6] * 6, "num_heads": [6] * 6, "window_size": 8, "img_size": 48},
        **{"mlp_ratio": 2, "upsampler": "pixelshuffle"},
    },
    "spsr": {"net_type": "spsr", "nf": 64, "nb": 23, "gc": 32},
    "elan": {"net_type": "elan", "m_elan": 36, "c_elan": 180},
}


@pytest.mark.parametrize("name", COUNTED)
def test_as_many_weights_are_listed_as_the_network_has(name: str) -> None:
    (file,) = (file for file in zoo.PUBLISHED if file.name == name)
    with torch.device("meta"):
        network = define_G({"scale": file.scale, "n_channels": 3, "netG": COUNTED[name]})
    assert file.weights == sum(parameter.numel() for parameter in network.parameters())


def test_the_table_names_each_file_once_and_says_where_it_is():
    names = [file.name.lower() for file in zoo.PUBLISHED]
    assert len(set(names)) == len(names)
    for file in zoo.PUBLISHED:
        assert (file.url is None) != (file.page is None)
        assert file.url is None or (file.url.startswith("https://") and file.url.endswith("/" + file.name))
    groups = [file.group for file in zoo.PUBLISHED]
    assert groups == sorted(groups, key=groups.index)  # the listing prints a group's files in one block
    assert "all" not in {*groups, *names}


def test_the_readme_of_the_model_zoo_names_every_group():
    text = (REPOSITORY / "model_zoo" / "README.md").read_text()
    for group in {file.group for file in zoo.PUBLISHED}:
        assert f"`{group}`" in text
