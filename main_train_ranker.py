"""Train a ranker, which orders restored images as a quality metric does: RankSRGAN's, for path.pretrained_netR.

python main_train_ranker.py --opt options/train_ranker.json
python main_train_ranker.py --opt options/train_ranker.json datasets.train.rank_csv=results/results.csv
torchrun --nproc_per_node=2 main_train_ranker.py --opt options/train_ranker.json
"""

from training.command_line import training_command
from utils.utils_launch import run


def main() -> None:
    command = training_command(__doc__, models=["ranker"])
    from training.loop import train  # with torch and all models: once the options are right

    train(*command)


if __name__ == "__main__":
    run(main)
