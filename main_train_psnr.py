"""Train a generator with pixel losses.

python main_train_psnr.py --opt options/train_bsrgan_psnr.json
python main_train_psnr.py --opt options/train_bsrgan_psnr.json train.iterations=1000 datasets.train.H_size=128
torchrun --nproc_per_node=2 main_train_psnr.py --opt options/train_bsrgan_psnr.json
"""

from training.command_line import training_command
from utils.utils_launch import run


def main() -> None:
    command = training_command(__doc__, models=["plain"])
    from training.loop import train  # with torch and all models: once the options are right

    train(*command)


if __name__ == "__main__":
    run(main)
