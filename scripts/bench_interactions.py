"""Sequences per second that the data module's loader assembles, through the real DataLoader, for both targets.

    python scripts/bench_interactions.py [--batch-size 1024] [--max-length 50] [--workers 0] [--repeats 7]

Synthetic data: long histories, so that every slot is filled. Online Retail: as it is, short histories included.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import polars as pl
import torch

from datamodules import InteractionsDataModule
from datamodules.synthetic import markov_interactions

GOODS = ["customer_id IS NOT NULL", "quantity > 0", "unit_price > 0", "stock_code ~ '^[0-9]{5}'"]
LEAST_SEQUENCES = 100_000


def epochs(module: InteractionsDataModule, n_epochs: int, first_epoch: int) -> float:
    """Sequences per second over whole epochs, iteration of the loader included."""
    loader = module.train_dataloader()
    n_sequences = 0
    started = time.perf_counter()
    for epoch in range(first_epoch, first_epoch + n_epochs):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for batch in loader:
            n_sequences += len(batch["targets"])
    return n_sequences / (time.perf_counter() - started)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--max-length", type=int, default=50)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--users", type=int, default=20_000, help="of the synthetic data")
    options = parser.parse_args()

    print(
        f"device cpu ({platform.processor() or platform.machine()}, {os.cpu_count()} cores), torch threads "
        f"{torch.get_num_threads()}, workers {options.workers}, batch {options.batch_size}, length "
        f"{options.max_length}, int64 batches, torch {torch.__version__}, polars {pl.__version__}"
    )
    print("| data | target | windows an epoch | filled slots | sequences/s: median | least | most |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "markov.parquet"
        # Times to the day make baskets of about two items.
        interactions = markov_interactions(options.users, 20_000, mean_length=2 * options.max_length, n_days=200)
        interactions.with_columns(pl.col("timestamp").dt.truncate("1d")).write_parquet(file)
        synthetic = {
            "paths": str(file),
            "user_column": "user_id",
            "item_column": "item_id",
            "time_column": "timestamp",
        }
        retail = {
            "paths": "bundled:online_retail",
            "user_column": "customer_id",
            "item_column": "stock_code",
            "time_column": "invoice_date",
            "where": GOODS,
        }
        for name, source in (("synthetic", synthetic), ("online_retail", retail)):
            for target in ("next_item", "next_basket"):
                module = InteractionsDataModule(
                    **source,  # type: ignore[arg-type]
                    target=target,  # type: ignore[arg-type]
                    recommend_seen=True,
                    train_window="strided",
                    max_length=options.max_length,
                    batch_size=options.batch_size,
                    num_workers=options.workers,
                    cache_dir=folder,
                )
                sizes = module.report_facts()["split"]
                n_windows = sizes["train_sequences"]
                n_epochs = -(-LEAST_SEQUENCES // n_windows)
                epochs(module, 1, 0)
                rates = [epochs(module, n_epochs, 1 + r * n_epochs) for r in range(options.repeats)]
                filled = sizes["train_positions"] / (n_windows * options.max_length)
                print(
                    f"| {name} | {target} | {n_windows:,} | {filled:.0%} | {statistics.median(rates):,.0f} | "
                    f"{min(rates):,.0f} | {max(rates):,.0f} |"
                )


if __name__ == "__main__":
    main()
