"""Copy the first rows of a training split, and the whole test split, to another folder.

Usage: python docs/gpu/part_of_images.py FROM TO [--train N] [--test N]
FROM holds train.parquet and test.parquet, with the columns image and label, in a shuffled order.
"""

import argparse
from pathlib import Path

import pyarrow.parquet


def main() -> None:
    """Copy both splits."""
    parser = argparse.ArgumentParser(description="Copy a part of a set of images.")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--train", type=int, help="Rows to keep of train.parquet; all by default.")
    parser.add_argument("--test", type=int, help="Rows to keep of test.parquet; all by default.")
    asked = parser.parse_args()
    asked.target.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        name = f"{split}.parquet"
        table = pyarrow.parquet.read_table(asked.source / name, columns=["image", "label"])
        rows = getattr(asked, split) or len(table)
        pyarrow.parquet.write_table(table.slice(0, rows), asked.target / name)


if __name__ == "__main__":
    main()
