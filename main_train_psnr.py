"""Train a generator with pixel losses.

python main_train_psnr.py --opt options/train_bsrgan_psnr.json
python main_train_psnr.py --opt options/train_bsrgan_psnr.json train.iterations=1000 datasets.train.H_size=128
torchrun --nproc_per_node=2 main_train_psnr.py --opt options/train_bsrgan_psnr.json
"""

from data.check import check_dataset
from data.select_dataset import define_Dataset
from models.select_model import define_Model
from utils.utils_dist import run
from utils.utils_train import train, training_options


def main() -> None:
    train(training_options(__doc__, models=["plain"]), define_Model, define_Dataset, check_dataset)


if __name__ == "__main__":
    run(main)
