"""Cards of checkpoints, adapters and data folders, and pushing to the Hub."""

from .adapter_card import adapter_card
from .checkpoint_card import checkpoint_card
from .data_sources import DataRecord, DataSource
from .dataset_card import dataset_card
from .fields import check_card
from .folder_card import folder_card
from .pushing import PushResult, push_folder, push_to_hub


__all__ = [
    "DataRecord",
    "DataSource",
    "PushResult",
    "adapter_card",
    "check_card",
    "checkpoint_card",
    "dataset_card",
    "folder_card",
    "push_folder",
    "push_to_hub",
]
