"""Train a ranker, which orders restored images as a quality metric does: RankSRGAN's, for path.pretrained_netR.

python main_train_ranker.py --opt options/train_ranker.json
python main_train_ranker.py --opt options/train_ranker.json datasets.train.rank_csv=results/results.csv
torchrun --nproc_per_node=2 main_train_ranker.py --opt options/train_ranker.json
"""

from training.loop import train, training_options
from utils.utils_dist import run


def main() -> None:
    train(training_options(__doc__, models=["ranker"]))


if __name__ == "__main__":
    run(main)
