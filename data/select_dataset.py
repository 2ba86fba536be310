"""From ``dataset_type`` to a data set."""

from data.dataset_base import DatasetBase
from data.dataset_blindsr import DatasetBlindSR
from data.dataset_l import DatasetL
from data.dataset_rank import DatasetRank
from data.dataset_sr import DatasetSR
from utils.utils_error import UserError
from utils.utils_option import DatasetOptions


def define_Dataset(dataset_opt: DatasetOptions) -> DatasetBase | DatasetL:
    """The data set of ``dataset_opt.dataset_type``; the ``mask`` variants add edge masks from ``dataroot_H_mask``.

    Raises UserError for an unknown type, for missing or empty folders and for images without a partner.
    """
    dataset_type = dataset_opt.dataset_type
    if dataset_type in ("sr", "srmask", "plain", "plainmask", "multiLR_oneGT"):
        return DatasetSR(dataset_opt)
    if dataset_type in ("blindsr", "blindsrmask"):
        return DatasetBlindSR(dataset_opt)
    if dataset_type == "l":
        return DatasetL(dataset_opt)
    if dataset_type == "rank":
        return DatasetRank(dataset_opt)
    raise UserError(
        f"datasets.{dataset_opt.phase}.dataset_type: there is no data set {dataset_type!r}; take sr or blindsr"
    )
