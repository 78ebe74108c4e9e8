"""Cards of checkpoints, adapters and data folders, and pushing to the Hub."""

from .adapter_card import adapter_card
from .checkpoint_card import checkpoint_card
from .data_sources import DataRecord, DataSource
from .dataset_card import dataset_card
from .fields import CardError, check_card
from .folder_card import folder_card
from .pushing import PushError, PushResult, push_folder, push_to_hub


__all__ = [
    "CardError",
    "DataRecord",
    "DataSource",
    "PushError",
    "PushResult",
    "adapter_card",
    "check_card",
    "checkpoint_card",
    "dataset_card",
    "folder_card",
    "push_folder",
    "push_to_hub",
]
