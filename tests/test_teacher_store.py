"""The store of a teacher's logits: what comes back, what a kill or a full disk leaves, and what is refused."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from commands import full_disk

import kdfast
from kdfast import _files
from kdfast import teacher_store as stores
from kdfast._extras import MissingExtra

pytest.importorskip("safetensors")
from kdfast.teacher_store import Contents, StoreError, TeacherStore, TeacherStoreWriter  # noqa: E402

SAMPLES, CLASSES, AUGMENTATIONS, ROWS = 23, 12, 2, 5  # the last shard of an augmentation has three rows
CONTENTS = Contents(
    model="a teacher",
    classes=CLASSES,
    data="0123abcd",
    samples=SAMPLES,
    transform="a crop and a flip",
    seed=7,
    augmentations=AUGMENTATIONS,
    dtype="float32",
)
TOP_K = dataclasses.replace(CONTENTS, top_k=4, temperature=2.0)


BUCKET = dataclasses.replace(TOP_K, tail="bucket", temperature=1.0)
# Sequences of 0 to 6 tokens, of which some shards have none.
LENGTHS = [0, 3, 6, 1, 0, *[0] * 5, *(i % 7 for i in range(13))]
KINDS = {
    "logits": CONTENTS,
    "top-k": TOP_K,
    **{tail: dataclasses.replace(BUCKET, tail=tail) for tail in ("bucket", "renormalise", "drop")},
}
KINDS |= {f"sequences, {name}": dataclasses.replace(x, longest=6) for name, x in KINDS.items()}


def log_probabilities(logits, contents):
    """The k largest of each row, of which every third has padding in its last or all slots."""
    values, indices = (logits / contents.temperature).log_softmax(-1).topk(contents.top_k)
    indices[1::3, -1], indices[2::3] = -1, -1
    values = values.to(getattr(torch, contents.dtype))
    return kdfast.TopK.of_log_probabilities(values, indices, contents.temperature, contents.tail)


def sequence_logits(i, augmentation):
    generator = torch.Generator().manual_seed(100 * augmentation + i)
    return torch.randn(LENGTHS[i], CLASSES, generator=generator) * 5


def given(contents, shard):
    """What a writer of these contents is given for a shard."""
    say = (lambda x: x) if contents.tail == "rest" else (lambda x: log_probabilities(x, contents))
    if contents.longest is None:
        return say(teacher_logits(shard.augmentation, shard.begin, shard.end))
    return [say(sequence_logits(i, shard.augmentation)) for i in range(shard.begin, shard.end)]


def wanted(contents, i, augmentation):
    """What a reader gives back for sequence i."""
    (teacher,) = given(contents, stores.Shard(augmentation, 0, i, i + 1))
    if contents.top_k is None or contents.tail != "rest":
        return teacher
    return kdfast.TopK.of(teacher, contents.top_k, contents.temperature)


def same(got, want):
    """To the bit, but for padding slots, which are -inf."""
    if isinstance(want, torch.Tensor):
        return got.dtype == want.dtype and torch.equal(got, want)
    values = want.values.masked_fill(want.indices < 0, -float("inf"))
    rest = got.rest is None if want.rest is None else torch.equal(got.rest, want.rest)
    equal = torch.equal(got.values, values) and torch.equal(got.indices.long(), want.indices) and rest
    return equal and got.values.dtype == values.dtype and got[3:] == want[3:]


def teacher_logits(augmentation, begin=0, end=SAMPLES):
    generator = torch.Generator().manual_seed(augmentation)
    return torch.randn(SAMPLES, CLASSES, generator=generator)[begin:end] * 5


def write(folder, contents=CONTENTS, shards=slice(None)):
    writer = TeacherStoreWriter(folder, contents, ROWS)
    for shard in writer.missing()[shards]:
        writer.write(shard, given(contents, shard))
    return writer


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- what comes back -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_all_logits(tmp_path, dtype):
    write(tmp_path, dataclasses.replace(CONTENTS, dtype=dtype))
    store = TeacherStore(tmp_path)
    for augmentation in range(AUGMENTATIONS):
        want = teacher_logits(augmentation).to(getattr(torch, dtype))
        for index in (torch.randperm(SAMPLES), torch.tensor([22, 3, 3, 0]), torch.tensor([4, 5]), torch.tensor([7])):
            got = store.logits(index, augmentation)
            assert got.dtype == want.dtype and torch.equal(got, want[index])
    assert store.logits([3, 1], 0).shape == (2, CLASSES) and store.logits(3, 0).shape == (1, CLASSES)
    assert store.logits(torch.empty(0, dtype=torch.long), 0).shape == (0, CLASSES)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("classes", [CLASSES, 40_000], ids=str)
def test_top_k(tmp_path, dtype, classes):
    contents = dataclasses.replace(TOP_K, dtype=dtype, classes=classes)
    logits = [torch.randn(SAMPLES, classes) * 5 for _ in range(AUGMENTATIONS)]
    writer = TeacherStoreWriter(tmp_path, contents, ROWS)
    for shard in writer.missing():
        writer.write(shard, logits[shard.augmentation][shard.begin : shard.end])
    store = TeacherStore(tmp_path)
    index = torch.randperm(SAMPLES)[:9]
    top = store.logits(index, 1)
    want = kdfast.TopK.of(logits[1][index], 4, 2.0)
    assert torch.equal(top.values, want.values.to(getattr(torch, dtype)))
    assert torch.equal(top.indices.long(), want.indices) and torch.equal(top.rest, want.rest)
    assert top.temperature == 2.0 and top.indices.element_size() == (2 if classes == CLASSES else 4)
    row = top.values.element_size() * 4 + top.indices.element_size() * 4 + 4
    assert contents.row_bytes == row
    with pytest.raises(ValueError, match="does not tell that at temperature 4.0"):
        kdfast.KD(4.0)(torch.zeros(9, classes), top)


@pytest.mark.parametrize("contents", [CONTENTS, TOP_K], ids=["all", "top-k"])
def test_training_from_a_store(tmp_path, contents):
    """A student that learns from a float32 store is, bit for bit, the one that learns from the teacher."""
    write(tmp_path, contents)
    store = TeacherStore(tmp_path)
    x = torch.randn(SAMPLES, 6)

    def trained(teacher):
        torch.manual_seed(0)
        student = torch.nn.Linear(6, CLASSES)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        for step in range(8):
            index = torch.randperm(SAMPLES)[:8]
            optimizer.zero_grad()
            kdfast.KD(2.0)(student(x[index]), teacher(index, step % AUGMENTATIONS)).backward()
            optimizer.step()
        return student.weight.detach()

    def live(index, augmentation):
        logits = teacher_logits(augmentation)[index]
        return logits if contents.top_k is None else kdfast.TopK.of(logits, contents.top_k, 2.0)

    assert torch.equal(trained(store.logits), trained(live))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tail", ["bucket", "renormalise", "drop"])
def test_log_probabilities(tmp_path, dtype, tail):
    """A batch of any order, with padding, is what was given; the loss of it too."""
    contents = dataclasses.replace(BUCKET, dtype=dtype, tail=tail, temperature=2.0)
    write(tmp_path, contents)
    index = torch.tensor([22, 3, 5, 2, 14])
    top = TeacherStore(tmp_path).logits(index, 1)
    shards = [stores.Shard(1, i, i, min(i + ROWS, SAMPLES)) for i in range(0, SAMPLES, ROWS)]
    given_rows = [given(contents, shard) for shard in shards]
    want = given_rows[0]._replace(
        values=torch.cat([x.values for x in given_rows])[index],
        indices=torch.cat([x.indices for x in given_rows])[index],
    )
    assert top.values.dtype == getattr(torch, dtype) and same(top, want)
    assert (want.indices == -1).any(1).any() and (want.indices == -1).all(1).any()
    student = torch.randn(5, CLASSES)
    losses = [kdfast.ops.softmax_kl(student, x, 2.0, reduction="none") for x in (top, want)]
    torch.testing.assert_close(*losses, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("sequences")])
def test_sequences(tmp_path, kind):
    """Each comes back with its own number of tokens, to the bit, also without any."""
    contents = KINDS[kind]
    write(tmp_path, contents)
    store = TeacherStore(tmp_path)
    assert store.contents == contents
    for augmentation in range(AUGMENTATIONS):
        index = torch.randperm(SAMPLES)
        found = store.logits(index, augmentation)
        assert len(found) == SAMPLES
        for i, got in zip(index.tolist(), found, strict=True):
            assert same(got, wanted(contents, i, augmentation)), i
    assert store.logits([], 0) == []
    store.verify()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_continues_after_a_full_disk_and_is_held_to_its_checksums(tmp_path, kind, monkeypatch):
    contents = KINDS[kind]
    write(tmp_path, contents, slice(0, 3))
    with monkeypatch.context() as patch:
        patch.setattr(_files.os, "fsync", full_disk)
        with pytest.raises(StoreError, match="cannot write .*00003.*No space left.*the same command continues$"):
            write(tmp_path, contents)
    assert len(names(tmp_path)) == 4
    with pytest.raises(StoreError, match="is not whole: 7 of 10 shards are missing"):
        TeacherStore(tmp_path)
    assert not write(tmp_path, contents).missing()
    write(tmp_path / "whole", contents)
    for name in names(tmp_path / "whole"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    path = tmp_path / "logits-0001-00002.safetensors"
    path = path if contents.longest is None else tmp_path / "logits-0001-00003.safetensors"
    flip(path, -9)
    with pytest.raises(StoreError, match=f"{path.name} is damaged .its checksum differs"):
        TeacherStore(tmp_path).verify()


def test_stores_of_before_have_the_same_names_and_digests():
    assert CONTENTS.digest.startswith("8fa38b916765d40c") and TOP_K.digest.startswith("e5dc2cbd1327702c")
    assert "tail" not in TOP_K.as_dict() and "longest" not in TOP_K.as_dict()
    assert BUCKET.digest != dataclasses.replace(BUCKET, tail="drop").digest


def test_shards_of_the_default_size(tmp_path):
    writer = TeacherStoreWriter(tmp_path, CONTENTS)
    assert [shard[2:] for shard in writer.missing()] == [(0, SAMPLES)] * AUGMENTATIONS
    few_bytes = dataclasses.replace(TOP_K, samples=40_000, augmentations=1)
    shards = TeacherStoreWriter(tmp_path / "large", few_bytes).missing()
    assert [(shard.begin, shard.end) for shard in shards] == [(0, 32_768), (32_768, 40_000)]
    assert dataclasses.replace(CONTENTS, classes=22_000).rows_at_most == (64 << 20) // (4 * 22_000)
    assert dataclasses.replace(BUCKET, longest=4096).rows_at_most == (64 << 20) // (4096 * 4 * (4 + 2))


# ---- going on --------------------------------------------------------------------------------------------------------
def test_continues(tmp_path):
    """What is there stays as it is; a reader refuses what is not whole."""
    write(tmp_path, shards=slice(0, 10, 3))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(StoreError, match="is not whole: 6 of 10 shards are missing, first logits-0000-00001"):
        TeacherStore(tmp_path)
    assert len(write(tmp_path, shards=slice(0, 0)).missing()) == 6
    write(tmp_path)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert torch.equal(TeacherStore(tmp_path).logits(torch.arange(SAMPLES), 1), teacher_logits(1))


def test_several_writers(tmp_path):
    """Each writes its part, as ranks do."""
    one = TeacherStoreWriter(tmp_path, CONTENTS, ROWS)
    other = TeacherStoreWriter(tmp_path, CONTENTS)  # the size of the shards is the store's
    shares = [(writer, writer.missing()[rank::2]) for rank, writer in enumerate((one, other))]
    for writer, share in shares:
        for shard in share:
            writer.write(shard, teacher_logits(shard.augmentation, shard.begin, shard.end))
    assert not one.missing() and not other.missing()
    assert torch.equal(TeacherStore(tmp_path).logits(torch.arange(SAMPLES), 0), teacher_logits(0))


def test_killed_in_a_write(tmp_path):
    """A writer that dies within a shard leaves the whole ones, and a next one writes the rest."""
    code = f"""
        import os, signal, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from pathlib import Path
        import test_teacher_store as t
        from kdfast import _files
        fsync, calls = os.fsync, []

        def dying(file):
            calls.append(file)
            if len(calls) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(file)

        _files.os.fsync = dying
        t.write(Path({str(tmp_path)!r}) / "store")
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment)
    assert killed.returncode == -9
    folder = tmp_path / "store"
    assert [name for name in names(folder) if not name.startswith(".")] == [
        *(f"logits-0000-0000{number}.safetensors" for number in range(3)),
        "manifest.json",
    ]
    write(folder)
    assert len(names(folder)) == 11  # no temporary file is left
    TeacherStore(folder).verify()
    assert torch.equal(TeacherStore(folder).logits(torch.arange(SAMPLES), 0), teacher_logits(0))


def test_full_disk(tmp_path, monkeypatch):
    """One line, the shards before intact, no part left."""
    write(tmp_path, shards=slice(0, 3))
    with monkeypatch.context() as patch:
        patch.setattr(_files.os, "fsync", full_disk)
        with pytest.raises(StoreError, match="cannot write .*00003.*No space left.*the same command continues$") as e:
            write(tmp_path)
        assert "\n" not in str(e.value)
    assert len(names(tmp_path)) == 4
    write(tmp_path)
    TeacherStore(tmp_path).verify()


def test_too_little_space_is_seen_before(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 2000))
    with pytest.raises(StoreError, match="missing shards need 2.21e-06 GB, the disk has 2e-06"):
        TeacherStoreWriter(tmp_path, CONTENTS, ROWS)


def test_unread_images(tmp_path):
    """Rows of images that could not be read are never taken for logits."""
    for contents in (CONTENTS, TOP_K):
        writer = TeacherStoreWriter(tmp_path / str(contents.top_k), contents, ROWS)
        for shard in writer.missing():
            logits = teacher_logits(shard.augmentation, shard.begin, shard.end)
            writer.write(shard, logits, absent=torch.arange(shard.begin, shard.end) == 7)
        store = TeacherStore(tmp_path / str(contents.top_k))
        store.logits([6, 8], 0)
        with pytest.raises(StoreError, match="has no logits of image 7 in augmentation 1, which could not be read"):
            store.logits([6, 7], 1)
        named = TeacherStore(tmp_path / str(contents.top_k), name="image-{}.jpg".format)
        with pytest.raises(StoreError, match=r"has no logits of image 7 \(image-7.jpg\) in augmentation 1, which"):
            named.logits([6, 7], 1)


@pytest.mark.parametrize("kind", ["bucket", "sequences, logits", "sequences, top-k", "sequences, bucket"])
def test_unread_samples(tmp_path, kind):
    """What is given for them does not matter."""
    contents = KINDS[kind]
    writer = TeacherStoreWriter(tmp_path, contents, ROWS)
    for shard in writer.missing():
        teacher = given(contents, shard)
        if contents.longest and shard.number == 1:
            teacher[2] = None
        elif shard.number == 1:
            teacher.values[2], teacher.indices[2] = float("nan"), CLASSES
        writer.write(shard, teacher, absent=torch.arange(shard.begin, shard.end) == 7)
    store = TeacherStore(tmp_path)
    store.logits([6, 8], 0)
    what = "sequence" if contents.longest else "image"
    with pytest.raises(StoreError, match=f"has no logits of {what} 7 in augmentation 1, which could not be read"):
        store.logits([6, 7], 1)


# ---- what is refused -------------------------------------------------------------------------------------------------
def test_another_store_in_the_folder(tmp_path):
    write(tmp_path / "store", shards=slice(0, 1))
    other = dataclasses.replace(CONTENTS, classes=10, seed=8)
    with pytest.raises(StoreError, match="has another store: classes 12, not 10; seed 7, not 8; expected another"):
        TeacherStoreWriter(tmp_path / "store", other)
    with pytest.raises(StoreError, match="is neither empty nor a teacher store"):
        TeacherStoreWriter(tmp_path, CONTENTS)
    with pytest.raises(StoreError, match="cannot write to .*File exists"):
        TeacherStoreWriter(tmp_path / "store" / "manifest.json", CONTENTS)


def test_does_not_fit(tmp_path):
    """All that differs is named, with both values."""
    write(tmp_path)
    store = TeacherStore(tmp_path)
    store.check(classes=CLASSES, samples=SAMPLES, data="0123abcd")
    with pytest.raises(StoreError, match=r"does not fit: it has classes 12, not 1000; samples 23, not 24$"):
        store.check(classes=1000, samples=24, seed=7)
    other = r"^\S+ does not fit: it has data of other images, or other names, sizes, labels or order of the 23 "
    with pytest.raises(StoreError, match=other + r"\('0123abcd', not '4567'\)$"):
        store.check(samples=SAMPLES, data="4567")
    with pytest.raises(
        StoreError, match=r"it has samples 23, not 24; data of other images \('0123abcd', not '4567'\)$"
    ):
        store.check(samples=24, data="4567")
    with pytest.raises(IndexError, match="augmentation must be from 0 to 1, got 2"):
        store.logits(torch.arange(3), 2)
    for index in ([0, 23], [-1, 3]):
        with pytest.raises(IndexError, match="index must be from 0 to 22, got"):
            store.logits(torch.tensor(index), 0)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def test_damaged(tmp_path):
    write(tmp_path)
    path = tmp_path / "logits-0001-00002.safetensors"
    whole = path.read_bytes()
    flip(path, -9)
    store = TeacherStore(tmp_path)
    assert torch.equal(store.logits([9, 15], 1), teacher_logits(1)[[9, 15]])  # of other shards
    for look in (lambda: store.logits([9, 10], 1), store.verify):
        with pytest.raises(StoreError, match="logits-0001-00002.safetensors is damaged .its checksum differs"):
            look()
    assert TeacherStore(tmp_path, verify=False).logits([10], 1).shape == (1, CLASSES)
    for damage in (lambda: flip(path, 3), lambda: path.write_bytes(whole[:-1]), lambda: path.write_bytes(b"")):
        path.write_bytes(whole)
        damage()
        with pytest.raises(StoreError, match=r"logits-0001-00002.safetensors is damaged \("):
            TeacherStore(tmp_path).logits([10], 1)
    path.unlink()
    write(tmp_path)
    TeacherStore(tmp_path).verify()


def test_shards_of_another_store(tmp_path):
    write(tmp_path / "one")
    write(tmp_path / "other", dataclasses.replace(CONTENTS, model="another"))
    name = "logits-0000-00001.safetensors"
    shutil.copy(tmp_path / "other" / name, tmp_path / "one" / name)
    with pytest.raises(StoreError, match="00001.safetensors belongs to another store"):
        TeacherStore(tmp_path / "one").logits([5], 0)
    shutil.copy(tmp_path / "one" / "logits-0000-00004.safetensors", tmp_path / "one" / name)
    with pytest.raises(StoreError, match=r"00001.safetensors has logits \(3, 12\) float\d+, expected logits \(5, 12\)"):
        TeacherStore(tmp_path / "one").logits([5], 0)


def test_damaged_manifest(tmp_path):
    with pytest.raises(StoreError, match="is no teacher store: it has no manifest.json"):
        TeacherStore(tmp_path)
    write(tmp_path)
    path = tmp_path / "manifest.json"
    text = path.read_text()
    for damage in (text[:40], text.replace('"rows"', '"row"'), text.replace('"seed": 7,', ""), "[]"):
        path.write_text(damage)
        with pytest.raises(StoreError, match="manifest.json is damaged"):
            TeacherStore(tmp_path)
    path.write_text(text.replace("logits, 2", "logits, 3"))
    with pytest.raises(StoreError, match="has the format 'kdfast teacher logits, 3', expected"):
        TeacherStore(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("classes", "12"), ("samples", 2.5), ("samples", 10**30), ("augmentations", True), ("rows", 0), ("rows", "1e999")],
    ids=str,
)
def test_hand_made_manifest(field, value, tmp_path):
    write(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    (manifest if field == "rows" else manifest["contents"])[field] = value
    path.write_text(json.dumps(manifest).replace('"1e999"', "1e999"))
    with pytest.raises(StoreError, match="manifest.json is damaged"):
        TeacherStore(tmp_path)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"other": torch.zeros(5, CLASSES)},
        {"logits": torch.zeros(5, 1)},
        {"logits": torch.zeros(5, CLASSES).double()},
    ],
    ids=["nothing", "another name", "one column", "another type"],
)
def test_hand_made_shards(tensors, tmp_path):
    """A shard with the right digests and the wrong tensors."""
    from safetensors.torch import save_file

    write(tmp_path)
    metadata = {"sha256": stores._digest(tensors), "contents": TeacherStore(tmp_path).contents.digest}
    save_file(tensors, tmp_path / "logits-0000-00001.safetensors", metadata)
    with pytest.raises(StoreError, match=r"00001.safetensors has .*, expected logits \(5, 12\)"):
        TeacherStore(tmp_path).logits([5], 0)


def test_equal_shards_are_equal_files(tmp_path):
    for folder in ("one", "other"):
        write(tmp_path / folder)
    for name in names(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    first = (tmp_path / "one/logits-0000-00000.safetensors").read_bytes()
    header = json.loads(first[8 : 8 + int.from_bytes(first[:8], "little")])
    assert list(header) == sorted(header) and list(header["__metadata__"]) == ["contents", "sha256"]


def test_logits_that_cannot_be_stored(tmp_path):
    writer = TeacherStoreWriter(tmp_path, dataclasses.replace(CONTENTS, dtype="float16"), ROWS)
    shard = writer.missing()[1]
    logits = torch.zeros(5, CLASSES)
    logits[2, 3] = -float("inf")  # a masked class
    writer.write(shard, logits)
    logits[2, 3] = 7e4
    with pytest.raises(StoreError, match="logits are up to 70000, too large for float16: store float32"):
        writer.write(shard, logits)
    for bad in (float("nan"), float("inf")):
        logits[2, 3] = bad
        with pytest.raises(StoreError, match="got NaN or inf for image 7"):
            writer.write(shard, logits)
    with pytest.raises(ValueError, match=r"the shape \(5, 12\) of logits-0000-00001.safetensors, got \(5, 11\)"):
        writer.write(shard, logits[:, 1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of float16, bfloat16, float32, got 'int8'"),
        ({"samples": 0}, "samples must be a whole number of at least 1, got 0"),
        ({"top_k": 13, "temperature": 1.0}, "top_k must be from 1 to the 12 classes, got 13"),
        ({"top_k": 3}, "top_k and temperature go together"),
        ({"tail": "bucket"}, "tail='bucket' is that of a top-k store: it needs top_k, got None"),
        ({"tail": "head", "top_k": 3, "temperature": 1.0}, "tail must be .*'head'"),
        ({"longest": 0}, "longest must be a whole number of at least 1 or None, got 0"),
        ({"longest": True}, "longest must be a whole number of at least 1 or None, got True"),
    ],
    ids=str,
)
def test_contents(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONTENTS, **change)


def test_without_safetensors(tmp_path, monkeypatch):
    write(tmp_path)
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda: TeacherStore(tmp_path), lambda: TeacherStoreWriter(tmp_path, CONTENTS)):
        with pytest.raises(MissingExtra, match=r"install it with: pip install .*safetensors"):
            call()


def bad_top_k(**change):
    top = log_probabilities(teacher_logits(0, 0, ROWS), BUCKET)
    top = top._replace(indices=top.indices.clone().clamp(min=-1))
    return top._replace(**{name: value(top) if callable(value) else value for name, value in change.items()})


def put(name, row, slot, value):
    def changed(top):
        x = getattr(top, name).clone()
        x[row, slot] = value
        return x

    return changed


@pytest.mark.parametrize(
    ("teacher", "error", "message"),
    [
        (lambda: torch.zeros(5, CLASSES), TypeError, "logits must be a TopK of log-probabilities, got Tensor"),
        (lambda: bad_top_k(tail="drop"), ValueError, "logits must have the store's tail 'bucket', got 'drop'"),
        (lambda: bad_top_k(temperature=2.0), ValueError, "logits must have the store's temperature 1.0, got 2.0"),
        (
            lambda: bad_top_k(values=lambda x: x.values[:, 1:], indices=lambda x: x.indices[:, 1:]),
            ValueError,
            r"logits.values must have the shape \(5, 4\) of logits-0000-00000.safetensors, got \(5, 3\)",
        ),
        (
            lambda: bad_top_k(indices=lambda x: x.indices[1:]),
            ValueError,
            r"logits.indices must have the shape \(5, 4\) of .*, got \(4, 4\)",
        ),
        (lambda: bad_top_k(indices=lambda x: x.indices.float()), TypeError, "logits.indices must be integers"),
        (lambda: bad_top_k(values=lambda x: x.values.long()), TypeError, "logits.values must be"),
        (
            lambda: bad_top_k(indices=put("indices", 3, 1, CLASSES)),
            ValueError,
            r"logits.indices\[3, 1\] is 12, expected a class from 0 to 11",
        ),
        (
            lambda: bad_top_k(
                indices=lambda x: x.indices.clone().index_put_((torch.tensor(0), torch.tensor(1)), x.indices[0, 0])
            ),
            ValueError,
            r"logits.indices\[0, 1\] is \d+, which the row has already",
        ),
        (
            lambda: bad_top_k(values=put("values", 3, 0, 2.5)),
            ValueError,
            "logits.values must be log-probabilities, numbers of at most 0, got 2.5",
        ),
        (
            lambda: bad_top_k(values=put("values", 3, 0, float("nan"))),
            StoreError,
            "the teacher's log-probabilities must be numbers, got NaN or inf for image 3",
        ),
    ],
)
def test_log_probabilities_that_cannot_be_stored(tmp_path, teacher, error, message):
    writer = TeacherStoreWriter(tmp_path, BUCKET, ROWS)
    with pytest.raises(error, match=message):
        writer.write(writer.missing()[0], teacher())
    padded = bad_top_k(values=put("values", 2, 0, float("nan")))  # a slot of padding
    assert padded.indices[2, 0] == -1
    writer.write(writer.missing()[0], padded)


def test_sequences_that_cannot_be_stored(tmp_path):
    contents = KINDS["sequences, bucket"]
    writer = TeacherStoreWriter(tmp_path, contents, ROWS)
    shard = writer.missing()[0]
    rows = given(contents, shard)
    long = log_probabilities(torch.randn(7, CLASSES), contents)
    for teacher, error, message in [
        (rows[2], TypeError, "logits must be a list of sequences, got TopK"),
        (rows[1:], ValueError, "logits must have the 5 sequences of logits-0000-00000.safetensors, got 4"),
        ([*rows[:3], long, rows[4]], ValueError, r"logits\[3\] must have at most longest=6 tokens, got 7"),
        ([*rows[:3], None, rows[4]], TypeError, r"logits\[3\] must be a .*Tensor, got NoneType"),
        ([*rows[:3], torch.zeros(2, CLASSES), rows[4]], TypeError, r"logits\[3\] must be a TopK of log-prob"),
    ]:
        with pytest.raises(error, match=message):
            writer.write(shard, teacher)
    rows[2].values[4, 1] = float("inf")
    with pytest.raises(StoreError, match="got NaN or inf for token 4 of sequence 2"):
        writer.write(shard, rows)
    logits = TeacherStoreWriter(tmp_path / "logits", KINDS["sequences, logits"], ROWS)
    with pytest.raises(TypeError, match=r"logits\[2\] must be a .*Tensor, got TopK"):
        logits.write(shard, [torch.zeros(0, CLASSES)] * 2 + rows[2:])


@pytest.mark.parametrize("offsets", [[0, 3, 9, 10, 10, 11], [1, 3, 9, 10, 10, 10], [0, 9, 3, 10, 10, 10]], ids=str)
def test_hand_made_offsets(tmp_path, offsets):
    """A shard with the right digests whose sequences do not follow each other."""
    from safetensors.torch import load_file, save_file

    contents = KINDS["sequences, bucket"]
    write(tmp_path, contents)
    path = tmp_path / "logits-0000-00000.safetensors"
    tensors = {**load_file(path), "offsets": torch.tensor(offsets)}
    save_file(tensors, path, {"sha256": stores._digest(tensors), "contents": contents.digest})
    with pytest.raises(StoreError, match="00000.safetensors is damaged .its offsets do not divide 10 rows"):
        TeacherStore(tmp_path).logits([1], 0)
