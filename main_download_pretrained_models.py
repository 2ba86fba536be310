"""Fetch published checkpoints into model_zoo/, from where their authors put them.

python main_download_pretrained_models.py                                     # list what there is
python main_download_pretrained_models.py --models BSRGAN.pth RealESRGAN_x4plus.pth
python main_download_pretrained_models.py --models swinir                     # a group
python main_download_pretrained_models.py --models all --model_dir /data/model_zoo

A broken download is resumed; a file appears under its name when it is whole and, where its size or SHA-256 is known,
right. Files that are there already are checked and left alone. The exit status is 2 if one could not be had.
"""

import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from models.published import PUBLISHED, Published, fetch, select, sha256_of
from utils.utils_error import ArgumentParser, UserError, run
from utils.utils_name import output_path


def _list(folder: Path) -> None:
    width = max(len(file.name) for file in PUBLISHED)
    for group, files in groupby(PUBLISHED, key=lambda file: file.group):
        print(group)
        for file in files:
            scale = f"x{file.scale}" if file.scale else ""
            weights = f"{file.weights / 1e6:4.1f} M" if file.weights else ""
            path = folder / file.name
            facts = [file.what, file.licence or "licence: see its page"]
            facts += [f"here, {path.stat().st_size / 1e6:.1f} MB"] if path.is_file() else []
            facts += [f"by hand: {file.page}"] if file.page else []
            print(f"  {file.name:{width}}  {file.net_type:21}  {scale:2}  {weights:6}  {', '.join(facts)}")
    print("M: millions of weights, four bytes each. The licence is that of the repository it comes from.")


def _have(file: Published, path: Path) -> None:
    """Check ``path`` if it is there, else fetch it."""
    if path.is_file():
        found = sha256_of(path)
        if (file.size or path.stat().st_size) != path.stat().st_size or not found.startswith(file.sha256 or ""):
            raise UserError(f"{path}: is not the published file (size or SHA-256 differ); move it away to fetch that")
        state = "there already"
    elif file.url is None:
        raise UserError(f"{file.name}: only by hand, from {file.page}; put it into {path.parent}")
    else:
        found = fetch(file.url, output_path(path.parent, path.name), file.size, file.sha256)
        state = "fetched"
    known = "as published" if file.sha256 else "the published one is not known here"
    print(f"{path}: {state}, {path.stat().st_size:,} bytes, SHA-256 {found} ({known})")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (None = the process's own); returns the exit status."""
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--models", nargs="+", default=[], metavar="NAME", help="files, groups or all; without it they are listed"
    )
    parser.add_argument("--model_dir", type=Path, default=Path("model_zoo"), help="folder to put them in")
    args = parser.parse_args(argv)
    # KAIR's users write several names in one pair of quotes.
    words = " ".join(args.models).split()
    if not words:
        _list(args.model_dir)
        return 0
    files = select(words)
    try:
        args.model_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{args.model_dir} cannot be made ({error.strerror}); give another --model_dir") from error
    asked = {word.lower() for word in words}
    failed = False
    for file in files:
        try:
            _have(file, args.model_dir / file.name)
        except (UserError, OSError) as error:
            # In a group, what can only be had by hand is no failure.
            wanted = file.url is not None or file.name.lower() in asked or not any(other.url for other in files)
            failed |= wanted
            print(f"{'error' if wanted else 'note'}: {' '.join(str(error).split())}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    run(main)
