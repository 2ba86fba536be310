"""Write a trained generator for other programs, and try each file in one of them where it is installed.

python main_export.py --model_path experiments/bsrgan_ssl --format safetensors onnx
python main_export.py --model_path experiments/bsrgan_ssl --format ncnn                 # for Real-ESRGAN's programs
python main_export.py --model_path bsrgan=model_zoo/BSRGAN.pth --format pth onnx --precision fp16 --output out

A model is a checkpoint file or a run's folder, as main_test.py takes it; NAME= in front names the files,
OUTPUT/4x_NAME.pth and so on, beside which come a card, 4x_NAME.md, and 4x_NAME.json, to complete for OpenModelDB.
OUTPUT is by default the run's folder export/, or ./export for checkpoints outside a run.

safetensors, pth   chaiNNer, ComfyUI and whatever else reads by spandrel; this program
onnx               onnxruntime, DirectML, TensorRT, browsers; any size of image
ncnn               Real-ESRGAN's ncnn programs, Upscayl; GPUs of all makers, by Vulkan
torchscript        torch.jit.load, libtorch in C++

Of several formats all are written or, where one cannot be, none.
"""

import argparse
from collections.abc import Sequence

from utils.utils_error import ArgumentParser, run

FORMATS = ("safetensors", "pth", "onnx", "ncnn", "torchscript")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--model_path", required=True, metavar="[NAME=]PATH", help="checkpoint file or run's folder")
    parser.add_argument("--format", nargs="+", required=True, choices=FORMATS, help="one or several")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), help="of weights; default fp32, ncnn fp16")
    parser.add_argument("--output", metavar="FOLDER", help="where the files go")
    parser.add_argument("--scale", type=int, help="needed only where the weights leave it open")
    parser.add_argument("--param_key", help="which weights of the file; default an average, else params, else all")
    text = "onnx, torchscript: for L of this size alone (default any size)"
    parser.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    args = parser.parse_args(argv)
    args.format = list(dict.fromkeys(args.format))
    if args.size and (not {"onnx", "torchscript"} & {*args.format} or min(args.size) < 1):
        parser.error("--size H W: is for --format onnx and torchscript, in pixels of L")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv`` (None = the process's own).

    Raises:
        UserError: a mistake in it or in the files it names; then nothing has been written.
    """
    args = _arguments(argv)
    from models.export import export  # with torch and all networks: once the command line is right
    from utils.utils_logger import setup

    setup()
    export(args)


if __name__ == "__main__":
    run(main)
