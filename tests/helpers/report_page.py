"""A small run whose page the tests read: its sizes, and the parts of the page."""

import json
import re
from pathlib import Path

from pahm.config import preset

IMAGES, GRID, FAILURES = 6, 4, 3


CONFIG = preset("tiny").override(
    {
        "model.backbone": "test_resnet",
        "model.pretrained": False,
        "model.image_size": 64,
        "model.crop": 0.5,
        "train.epochs": 4,
        "train.batch_size": 4,
        "train.workers": 0,
    }
)


def body(path):
    """The page without plotly.js."""
    return re.sub(r"<script>.*?</script>", "", Path(path).read_text(encoding="utf-8"), flags=re.DOTALL)


def payload(path):
    text = re.search(r'<script type="application/json" id="payload">(.*?)</script>', body(path), re.DOTALL)
    return json.loads(text[1])


def table(path, identifier=""):
    text = re.search(rf'<table class="numbers"{identifier}>(.*?)</table>', body(path), re.DOTALL)[1]
    cells = re.compile(r"<t[hd].*?>(.*?)</t[hd]>")
    rows = [cells.findall(row) for row in re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)]
    return {row[0]: row[1:] for row in rows}
