"""Lines of a file that grows: by offset, torn, endless, sampled."""

import numpy as np

from rlproxi.telemetry.live.lines import Lines, spread


def test_lines_are_followed_by_offset_and_a_torn_one_waits(tmp_path):
    file = tmp_path / "log"
    lines = Lines(file)
    assert lines.read() is None and lines.size() == 0
    file.write_bytes(b"one\ntwo\nth")
    assert lines.read() == [(0, b"one"), (4, b"two")] and lines.read() is None
    with open(file, "ab") as more:
        more.write(b"ree\n\nfour\n")
    assert lines.read() == [(8, b"three"), (15, b"four")]
    file.write_bytes(b"new\n")  # shorter: another file
    assert lines.read() == [(0, b"new")] and lines.again == 1


def test_an_endless_line_is_passed_over_and_not_kept(tmp_path):
    file = tmp_path / "log"
    file.write_bytes(b"a\n" + b"x" * 5_000_000 + b"\nb\n")
    lines, found, held = Lines(file, limit=1 << 16), [], 0
    for _ in range(40):
        found += lines.read() or []
        held = max(held, len(lines.rest))
    assert [line for _, line in found] == [b"a", b"", b"b"] and held <= 1 << 16


def test_a_sample_of_a_file_covers_its_whole_range_with_whole_lines(tmp_path):
    file = tmp_path / "log"
    rows = [f"{i:07d} {'x' * (i % 60)}" for i in range(200_000)]
    file.write_text("\n".join(rows) + "\n")
    found = [line.decode() for line in spread(file, 300, file.stat().st_size)]
    numbers = [int(line[:7]) for line in found]
    assert found == [rows[n] for n in numbers] and numbers == sorted(set(numbers))
    assert numbers[0] == 0 and numbers[-1] == 199_999
    gaps = np.diff(numbers)
    assert len(numbers) >= 300 and gaps.max() < 200_000 / 300 * 1.5
