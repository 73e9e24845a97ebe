import json
import struct

import pytest

from coloss.compression.safetensors_layout import mapped_bytes, read_header
from coloss.errors import InputError


def test_a_file_larger_than_memory_is_mapped(tmp_path):
    header = json.dumps({"w": {"dtype": "U8", "shape": [1 << 40], "data_offsets": [0, 1 << 40]}}).encode()
    with (tmp_path / "large.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + (1 << 40))
    entries, _, start = read_header(tmp_path / "large.safetensors")
    values = mapped_bytes(tmp_path / "large.safetensors")
    assert list(entries) == ["w"] and len(values) == start + (1 << 40) and values[-1] == 0
    (tmp_path / "empty").touch()
    for name in ("empty", "none"):
        with pytest.raises(InputError, match=f"cannot read .*{name}"):
            mapped_bytes(tmp_path / name)
