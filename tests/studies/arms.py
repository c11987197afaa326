"""Arms of a study, each in a process of its own. Results are kept line by line, so the same command continues."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path


def collected(
    out: Path, work: Callable[[str, int], list[dict]], wanted: list[tuple[str, int]], processes: int
) -> list[dict]:
    """The rows of out/results.jsonl, and work(arm, seed)'s for each of ``wanted`` that has none there yet.

    ``work`` is picklable, and its rows have the keys arm and seed.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    done = {(row["arm"], row["seed"]) for row in rows}
    with ProcessPoolExecutor(processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        for one in [pool.submit(work, arm, seed) for arm, seed in wanted if (arm, seed) not in done]:
            for row in one.result():
                rows.append(row)
                with open(results, "a", encoding="utf-8") as file:
                    print(json.dumps(row), file=file, flush=True)
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return rows
