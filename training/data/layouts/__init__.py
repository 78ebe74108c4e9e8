"""Layouts of data folders that people have: COCO, YOLO, VOC, tables, masks, class folders."""
