"""Event files: records with checksums of tensorboard's own, and what damaged, odd and unfinished records do to a reader."""

import os
import struct

import numpy as np
import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from torch.utils.tensorboard import SummaryWriter

from study import events, runfolders


def record(data: bytes) -> bytes:
    """A record with the checksums that tensorboard's own code gives it."""
    head = struct.pack("<Q", len(data))
    return head + struct.pack("<I", masked_crc32c(head)) + data + struct.pack("<I", masked_crc32c(data))


def scalar(step: int, value: float = 0.5, tag: str = "val/acc") -> Event:
    event = Event(step=step, wall_time=1.7e9)
    event.summary.value.add(tag=tag, simple_value=value)
    return event


def write(folder, *content: Event | bytes):
    """An event file of these records; returns its path and the byte at which each record begins."""
    blocks = [record(c if isinstance(c, bytes) else c.SerializeToString()) for c in content]
    path = folder / "events.out.tfevents.1"
    path.write_bytes(b"".join(blocks))
    return path, np.cumsum([0, *map(len, blocks)]).tolist()


def test_every_damaged_byte_is_noticed_and_named(tmp_path, capsys):
    """One flipped bit in each byte of a file in turn: the records before it are read, and one line says where it is."""
    path, at = write(tmp_path, *(scalar(step, step / 8) for step in range(4)))
    whole = path.read_bytes()
    for byte in range(len(whole)):
        broken = bytearray(whole)
        broken[byte] ^= 1 << byte % 8
        path.write_bytes(broken)
        hit = sum(a <= byte for a in at) - 1
        assert list(events.scalars(path)) == [("val/acc", step, step / 8) for step in range(hit)]
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and f"{path}: the record at byte {at[hit]} of {len(whole)} is damaged" in err


def test_every_cut_reads_as_far_as_it_goes_without_a_word(tmp_path, capsys):
    path, at = write(tmp_path, *(scalar(step) for step in range(3)))
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        assert len(list(events.scalars(path))) == sum(a <= size for a in at) - 1
    assert capsys.readouterr().err == ""


def test_zeros_where_a_crash_left_no_data_are_damage(tmp_path, capsys):
    path, at = write(tmp_path, scalar(0), scalar(1))
    with open(path, "ab") as f:
        f.write(bytes(4096))
    assert [step for _, step, _ in events.scalars(path)] == [0, 1]
    assert f"byte {at[2]} of {at[2] + 4096} is damaged (checksum of its length)" in capsys.readouterr().err


def odd(dtype: int, sizes: tuple[int, ...] = (), tag: bytes = b"loss", step: int = 1, **content) -> bytes:
    event = Event(step=step)
    value = event.summary.value.add(tag="loss")
    value.metadata.plugin_data.plugin_name = "scalars"
    value.tensor.dtype = dtype
    for size in sizes:
        value.tensor.tensor_shape.dim.add(size=size)
    for name, given in content.items():
        setattr(value.tensor, name, given) if isinstance(given, bytes) else getattr(value.tensor, name).extend(given)
    return event.SerializeToString().replace(b"loss", tag)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\xff" * 9, "no TensorBoard event"),
        (odd(1, tag=b"l\xffss", float_val=[1]), "no TensorBoard event|no text"),
        (odd(1, (2,), float_val=[1, 2]), "more or less than one value"),
        (odd(1, (10**6, 10**6), float_val=[1]), "more or less than one value"),
        (odd(1, (0,)), "more or less than one value"),
        (odd(1, (1,) * 70, float_val=[1]), "cannot be decoded"),
        (odd(1), "cannot be decoded"),
        (odd(1, tensor_content=b"abc"), "cannot be decoded"),
        (odd(7, string_val=[b"1.5"]), "not a number"),
        (odd(8, scomplex_val=[1, 1]), "not a number"),
        (odd(99, float_val=[1]), "not a number"),
        (odd(1, step=-5, float_val=[1]), "step below 0"),
        (scalar(1, tag="").SerializeToString(), "without a name"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_records_with_right_checksums_and_odd_content(data, why, tmp_path, capsys):
    path, at = write(tmp_path, scalar(0), data, scalar(2))
    assert list(events.scalars(path)) == [("val/acc", 0, 0.5)]
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"byte {at[1]} of {at[3]} is damaged (" in err
    assert any(words in err for words in why.split("|"))


def test_tensors_of_one_number_are_read(tmp_path, capsys):
    path, _ = write(
        tmp_path,
        odd(1, float_val=[0.25]),
        odd(2, (1, 1), double_val=[0.1]),
        odd(1, tensor_content=struct.pack("<f", 3)),
        odd(9, int64_val=[7]),
        b"",  # an event without content
    )
    assert [value for *_, value in events.scalars(path)] == [0.25, 0.1, 3, 7]
    assert capsys.readouterr().err == ""


def test_what_is_no_file_is_left_out_by_name(tmp_path, capsys):
    (tmp_path / "events.out.tfevents.2").mkdir()
    os.mkfifo(tmp_path / "events.out.tfevents.3")
    write(tmp_path, scalar(0))
    assert runfolders.read_events(tmp_path).keys() == {"val/acc"}
    err = capsys.readouterr().err
    assert err.count("not a regular file") == err.count("\n") == 2 and "tfevents.3" in err


def test_text_and_pictures_are_passed_over(tmp_path, capsys):
    writer = SummaryWriter(str(tmp_path))
    writer.add_text("about", "words " * 500)
    writer.add_image("picture", np.zeros((3, 90, 90), np.uint8))
    writer.add_scalar("loss", 2.0, 3)
    writer.add_scalar("loss", 1.0, 4, new_style=True)
    writer.close()
    assert {t: [v.tolist() for v in s] for t, s in runfolders.read_events(tmp_path).items()} == {
        "loss": [[3, 4], [2, 1]]
    }
    assert capsys.readouterr().err == ""
