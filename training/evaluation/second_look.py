"""Types of nucleated cells as `unihema predict` shows them, where the checkpoint looks at their crops, too."""

from typing import Any

import numpy as np
import torch
from torchvision.ops import box_convert

from unihema.analyzer import Analyzer
from unihema.processing_unihema.class_names import is_untyped_white_cell, usual_name
from unihema.results.cell import Cell
from unihema.results.second_look import SURE, Rule, cell_types, crop_of, detection_logits, is_looked_at
from unihema.slides import open_regions
from unihema.training.data.rows import Row
from unihema.training.data.shards import readable


# Smallest score of a query that is looked at, and how many nucleated ones of an image: queries of one cell are seen one by one.
SCORE, MOST = 0.05, 64
LEAST = 1e-6
# Of a logit: as little as float32 and half precision tell apart.
STEP = 0.01


class SecondLook:
    """Puts what the crops of an image's cells say into the scores of detection.

    Args:
        analyzer ([`Analyzer`]): Of a checkpoint with a rule (`trained.second_look`).
    """

    def __init__(self, analyzer: Analyzer):
        self.analyzer, self.config = analyzer, analyzer.model.config
        self.types = cell_types(self.config.single_cell_labels, self.config.class_parents)
        self.rule = Rule(**self.config.trained.second_look)
        self.request = analyzer.request(["single_cell"])

    @classmethod
    def of(cls, model: Any, processor: Any) -> "SecondLook | None":
        """That of a model; `None` where `unihema predict` takes none."""
        if model.config.trained.second_look is None:
            return None
        analyzer = Analyzer(model, processor)
        return cls(analyzer) if analyzer.request(["detection"]).second_look else None

    def logits(self, logits: torch.Tensor, boxes: torch.Tensor, row: Row) -> torch.Tensor:
        """Scores of an image after the look.

        The type of both opinions gets the score that detection gave the cell under its best class, as it has in results, and
        the other types their share of it. What stays as detection called it keeps its scores.

        Args:
            logits (`torch.Tensor`): `[queries, classes]`; minus infinity for classes that are not asked for.
            boxes (`torch.Tensor`): Normalized cxcywh `[queries, 4]`.
            row (`dict`): The image's row.
        """
        names = self.config.class_names
        best, label = logits.float().sigmoid().max(-1)
        asked = torch.isfinite(logits).any(0).tolist()
        called = {usual_name(name): number for number, name in enumerate(names) if asked[number]}
        columns = [called.get(usual_name(name)) for name in self.types]
        with open_regions(readable(row["image"])) as source:
            sides = torch.tensor([source.width, source.height, source.width, source.height])
            corners = box_convert(boxes.float().cpu(), "cxcywh", "xyxy") * sides
            cells = {
                query: Cell(1, tuple(corners[query].tolist()), names[label[query]], float(best[query]))
                for query in best.argsort(descending=True).tolist()
                if best[query] >= SCORE
            }
            nucleated = [query for query, cell in cells.items() if is_looked_at(cell, self.config.class_parents)]
            cells = {query: cells[query] for query in nucleated[:MOST]}
            if not cells or not any(column is not None for column in columns):
                return logits
            pictures = [crop_of(source, cell) for cell in cells.values()]
            of_crops = self.analyzer.crops.probabilities(self.request, pictures, self.types)
        of_crops = of_crops.clamp(min=1e-9).log().cpu().numpy()
        together = self.rule.probabilities(detection_logits(list(cells.values()), self.types), of_crops)
        logits = logits.clone()
        for (query, cell), of_both in zip(cells.items(), together, strict=True):
            winner = int(np.argmax(of_both))
            if columns[winner] is None or (is_untyped_white_cell(cell.label) and of_both[winner] < SURE):
                continue
            # As good as before where it counts as a white cell, and no longer the best name.
            logits[query, label[query]] -= STEP
            for column, share in zip(columns, of_both / of_both[winner], strict=True):
                if column is not None:
                    score = torch.tensor(min(max(cell.score * share, LEAST), 1 - LEAST))
                    logits[query, column] = score.logit().to(logits)
        return logits


__all__ = ["SecondLook"]
