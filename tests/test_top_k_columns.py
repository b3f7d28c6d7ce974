"""`DistillationTrainer` with a teacher in the data, against the formula with all logits in float64."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

transformers = pytest.importorskip("transformers", reason="the [llm] extra is not installed")
pytest.importorskip("accelerate", reason="the [llm] extra is not installed")
pytest.importorskip("safetensors")

from test_transformers import VOCABULARY, batch, data, model, trainer  # noqa: E402

import kdfast  # noqa: E402
from kdfast.integrations.transformers import DistillationTrainer, StoredTeacher, TopKCollator  # noqa: E402
from kdfast.teacher_store import Contents, TeacherStore, TeacherStoreWriter  # noqa: E402

K, T = 5, 2.0
LOG, INDICES = "teacher_log_probabilities", "teacher_indices"
STEP = {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1}


def taught(rows=None, k=K, temperature=T):
    """The rows with what a teacher says of each token, of which every other one has a slot of padding."""
    teacher, found = model("llama", 1).eval(), []
    for row in data() if rows is None else rows:
        with torch.no_grad():
            logits = teacher(input_ids=row["input_ids"][None]).logits[0].double()
        values, indices = (logits / temperature).log_softmax(-1).topk(k)
        values, indices = (F.pad(x[:-1], (0, 0, 1, 0), value=-1) for x in (values.float(), indices))
        indices[::2, -1] = -1
        values[indices < 0] = float("nan")
        found.append({**row, LOG: values, INDICES: indices})
    return found


def formula(student, rows, alpha=0.3, beta=0.0, temperature=T, tail="bucket"):
    """The same with all logits, in float64: the k classes and, of a bucket, one for the others."""
    given = batch(rows)
    labels, indices = given["labels"][:, 1:].flatten(), given[INDICES][:, 1:].flatten(0, 1)
    log_p = given[LOG][:, 1:].flatten(0, 1).double()
    inputs = {k: x for k, x in given.items() if k in ("input_ids", "attention_mask")}
    z = student.double()(**inputs).logits[:, :-1].flatten(0, 1)
    total = 0.0
    for row in (labels != -100).nonzero()[:, 0].tolist():
        real = indices[row] >= 0
        kept, p = indices[row][real], log_p[row][real].exp()
        q = (z[row] / temperature).softmax(-1)
        others = torch.ones(VOCABULARY, dtype=torch.bool).index_fill(0, kept, False)
        if tail == "bucket":
            p, q = torch.cat([p, 1 - p.sum()[None]]), torch.cat([q[kept], q[others].sum()[None]])
        else:
            p, q = (x / x.sum() if tail == "renormalise" else x for x in (p, q[kept]))
        m = beta * p + (1 - beta) * q
        if beta in (0, 1):
            a, b = (p, q) if beta == 0 else (q, p)
            divergence = (a * (a / b).log()).sum()
        else:
            divergence = beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()
        total = total + alpha * divergence
    ce = F.cross_entropy(z, labels, reduction="sum")
    return (total + (1 - alpha) * ce) / (labels != -100).sum()


def from_columns(folder, student, rows=None, **options):
    return trainer(folder, student, None, taught() if rows is None else rows, **options)


@pytest.mark.parametrize(
    ("name", "tail", "beta"),
    [
        *(("llama", tail, beta) for tail in ("bucket", "renormalise", "drop") for beta in (0.0, 0.5, 1.0)),
        *((name, "bucket", 0.0) for name in ("llama, tied", "gemma", "cohere", "gpt2")),
    ],
)
def test_loss_and_gradients(name, tail, beta, tmp_path):
    student, rows = model(name), taught()
    other = copy.deepcopy(student)
    made = DistillationTrainer(
        student,
        transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True),
        **{"temperature": T, "beta": beta, "alpha": 0.3, "tail": tail},
    )
    student.eval(), other.eval()  # no dropout
    loss, want = made.compute_loss(student, made.data_collator(rows)), formula(other, rows, beta=beta, tail=tail)
    torch.testing.assert_close(loss.double(), want, rtol=2e-5, atol=1e-6)
    loss.backward(), want.backward()
    for (key, p), q in zip(student.named_parameters(), other.parameters(), strict=True):
        bound = 1e-5 * float(q.grad.abs().max()) + 1e-8
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-3, atol=bound, msg=key)


def test_logits_are_not_formed(tmp_path):
    student, seen = model("llama"), []
    made = from_columns(tmp_path, student)
    student.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    made.compute_loss(student, made.data_collator(taught()))
    assert seen == [1]


def test_a_teacher_that_gives_all_classes_is_the_model(tmp_path):
    """With k all classes and no padding the columns say what the model would."""
    rows = data()
    teacher = model("llama", 1)
    given = []
    for row, padded in zip(rows, taught(rows, VOCABULARY), strict=True):
        with torch.no_grad():
            values = (teacher(input_ids=row["input_ids"][None]).logits[0] / T).log_softmax(-1)
        values = values.roll(1, 0)
        given.append({**padded, LOG: values, INDICES: torch.arange(VOCABULARY).expand_as(values)})
    losses = []
    for name, of in ((None, given), (teacher, rows)):
        student = model("llama")
        made = trainer(tmp_path / str(name is None), student, name, of)
        losses.append(made.compute_loss(student, made.data_collator(of)))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_what_does_not_count_is_not_read(tmp_path):
    student, rows = model("llama"), taught()
    made = from_columns(tmp_path, student)
    given = made.data_collator(rows)
    changed = {name: x.clone() for name, x in given.items()}
    ignored = changed["labels"] == -100
    ignored[:, 0] = True
    changed[LOG][ignored], changed[INDICES][ignored] = float("nan"), 0
    assert torch.equal(made.compute_loss(student, given), made.compute_loss(student, changed))


def test_accumulation_changes_nothing(tmp_path):
    results = []
    for size, times in ((8, 1), (2, 4)):
        student = model("llama")
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": times, **STEP}
        from_columns(tmp_path / str(size), student, **options).train()
        results.append(student.state_dict())
    start = model("llama").state_dict()
    for key, x in results[0].items():
        torch.testing.assert_close(results[1][key], x, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(start[key], x) for key, x in results[0].items())


def test_resumed_to_the_same_bits(tmp_path):
    whole, part = model("llama"), model("llama")
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "lr_scheduler_type": "constant"}
    from_columns(tmp_path / "whole", whole, **saving).train()
    from_columns(tmp_path / "part", part, **{**saving, "max_steps": 2}).train()
    part = model("llama", 5)
    from_columns(tmp_path / "part", part, **saving).train(resume_from_checkpoint=True)
    for key, x in whole.state_dict().items():
        assert torch.equal(part.state_dict()[key], x), key


def test_two_processes_are_one(tmp_path):
    student = model("llama")
    from_columns(tmp_path / "one", student, per_device_train_batch_size=8, **STEP).train()
    (tmp_path / "step.py").write_text(
        f"""
import sys, torch
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from test_top_k_columns import from_columns, model
made = from_columns({str(tmp_path / "two")!r}, model("llama"), ddp_backend="gloo", **{STEP!r})
assert made.args.world_size == 2
made.train()
torch.save(made.model.state_dict(), {str(tmp_path)!r} + f"/{{made.args.process_index}}.pt")
"""
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(tmp_path / "step.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        for key, x in torch.load(tmp_path / f"{rank}.pt").items():
            torch.testing.assert_close(x, student.state_dict()[key], rtol=1e-5, atol=1e-6, msg=key)


def test_evaluation_and_predictions(tmp_path):
    student = model("gemma")
    made = from_columns(tmp_path, student, per_device_eval_batch_size=8)
    want = float(formula(copy.deepcopy(student).eval(), taught()).detach())
    assert made.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-4)
    assert made.predict(taught()).predictions.shape == (8, 7, VOCABULARY)


def test_without_a_teachers_share_no_column_is_needed(tmp_path):
    student = model("llama")
    made = from_columns(tmp_path, student, data(), alpha=0.0)
    made.train()
    torch.testing.assert_close(
        made.compute_loss(student, batch(data())).double(),
        formula(copy.deepcopy(student), taught(), 0.0),
        rtol=2e-5,
        atol=1e-6,
    )


# ---- a store ---------------------------------------------------------------------------------------------------------
def stored(folder, rows, **change):
    contents = Contents("a teacher", VOCABULARY, "texts", len(rows), "none", 0, 1, "float32", K, T, "bucket", 7)
    contents = Contents(**{**contents.as_dict(), **change})
    writer = TeacherStoreWriter(folder, contents, 3)
    for shard in writer.missing():
        part = rows[shard.begin : shard.end]
        tops = [kdfast.TopK.of_log_probabilities(x[LOG], x[INDICES], T, contents.tail) for x in part]
        writer.write(shard, tops)
    return TeacherStore(folder)


def test_a_store_is_the_columns(tmp_path):
    """To the bit, also through several workers."""
    rows, results = taught(), []
    for where, of in (("columns", rows), ("store", StoredTeacher(data(), stored(tmp_path / "logits", rows)))):
        student = model("llama")
        from_columns(tmp_path / where, student, of, dataloader_num_workers=2 * (where == "store")).train()
        results.append(student.state_dict())
    for key, x in results[0].items():
        assert torch.equal(results[1][key], x), key


def test_stores_that_do_not_fit(tmp_path):
    rows = taught()
    store = stored(tmp_path / "one", rows)
    good = StoredTeacher(data(), store)
    assert len(list(good)) == len(good) == 8
    for change, message in [
        ({"temperature": 1.0}, "train_dataset has a store that does not fit the trainer: temperature 2.0, not 1.0"),
        ({"alpha": 0.5, "temperature": 3.0}, "temperature 2.0, not 3.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            from_columns(tmp_path, model("llama"), good, **change)
    drop = StoredTeacher(data(), stored(tmp_path / "drop", rows, tail="drop"))
    with pytest.raises(ValueError, match="train_dataset has a store that does not fit .*: tail 'drop', not 'bucket'"):
        from_columns(tmp_path, model("llama"), drop)
    with pytest.raises(ValueError, match="does not fit the trainer: classes 40, not 50"):
        from_columns(tmp_path, model("llama", vocab_size=50), good)
    with pytest.raises(ValueError, match="rows must be the store's 8 samples, got 7"):
        StoredTeacher(data(7), store)
    with pytest.raises(ValueError, match="augmentation must be at most 0, got 1"):
        StoredTeacher(data(), store, 1)
    with pytest.raises(TypeError, match="store must be a TeacherStore, got str"):
        StoredTeacher(data(), "store")
    contents = Contents("a teacher", VOCABULARY, "images", 8, "none", 0, 1)
    writer = TeacherStoreWriter(tmp_path / "images", contents)
    writer.write(writer.missing()[0], torch.zeros(8, VOCABULARY))
    with pytest.raises(ValueError, match="store must have sequences of log-probabilities, got logits with tail='rest'"):
        StoredTeacher(data(), TeacherStore(tmp_path / "images"))
    with pytest.raises(TypeError, match="teacher must be a causal language model, or None for .*, got TeacherStore"):
        trainer(tmp_path, model("llama"), store)


# ---- padding ---------------------------------------------------------------------------------------------------------
def tokenizer(side):
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", padding_side=side)


def uneven():
    """Samples of 3 to 7 tokens as lists, with k from 2 to 5; tokens of padding are common."""
    rows = []
    for i, row in enumerate(taught()):
        length, k = 3 + i % 5, 2 + i % 4
        row["input_ids"][0] = row["input_ids"][length - 1] = 0
        row = {name: x[:length] for name, x in row.items()}
        row[LOG], row[INDICES] = row[LOG][:, :k], row[INDICES][:, :k]
        rows.append({name: x.tolist() for name, x in row.items()})
    return rows


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side, tmp_path):
    """The batch is the samples one by one, padded where the tokens are."""
    rows = uneven()
    collator = transformers.DataCollatorForSeq2Seq(tokenizer(side), pad_to_multiple_of=4)
    student = model("llama")
    args = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    made = DistillationTrainer(student, args, data_collator=collator, temperature=T, alpha=0.3)
    given = made.data_collator(rows)
    assert given["labels"].shape == (8, 8) and given[LOG].shape == given[INDICES].shape == (8, 8, 5)
    for i, row in enumerate(rows):
        tokens, k = len(row["input_ids"]), len(row[LOG][0])
        at = slice(8 - tokens, 8) if side == "left" else slice(0, tokens)
        assert given[INDICES][i, at, :k].tolist() == row[INDICES]
        padding = given[INDICES][i].clone()
        padding[at, :k] = -1
        assert (padding == -1).all()
    student.eval()
    counted = [sum(x != -100 for x in row["labels"][1:]) for row in rows]
    alone = [made.compute_loss(student, made.data_collator([row])) for row in rows]
    mean = sum(x * n for x, n in zip(alone, counted, strict=True)) / sum(counted)
    if side == "right":  # a causal model's states are those of the tokens before
        torch.testing.assert_close(made.compute_loss(student, given), mean, rtol=1e-5, atol=1e-6)
    made.train_dataset = rows
    made.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved/tokenizer.json").exists()


def changed(**change):
    rows = taught()
    for name, value in change.items():
        rows[1][name] = value(rows[1][name].clone())
    return rows


def set_at(place, value):
    def of(x):
        x[place] = value
        return x

    return of


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {LOG: lambda x: x[1:], INDICES: lambda x: x[1:]},
            ValueError,
            rf"samples\[1\]: {LOG} must be \(7, k\), a row for each of input_ids, got shape \(6, 5\)",
        ),
        ({INDICES: lambda x: x[:, 0]}, ValueError, rf"samples\[1\]: {INDICES} must be \(7, k\).*got shape \(7,\)"),
        (
            {INDICES: lambda x: x[:, :4]},
            ValueError,
            rf"samples\[1\]: {INDICES} must have the shape of {LOG} \(7, 5\), got \(7, 4\)",
        ),
        (
            {INDICES: set_at((3, 2), VOCABULARY)},
            ValueError,
            rf"samples\[1\]: {INDICES}\[3, 2\] is 40, expected a class from 0 to 39",
        ),
        (
            {INDICES: set_at((3, slice(2)), 7)},
            ValueError,
            rf"samples\[1\]: {INDICES}\[3, 1\] is 7, which the row has already",
        ),
        ({INDICES: lambda x: x.float()}, TypeError, rf"samples\[1\]: {INDICES} must be integers, got torch.float32"),
        ({INDICES: lambda x: [[1], [1, 2]]}, ValueError, rf"samples\[1\]: {INDICES} must be \(tokens, k\) numbers"),
        ({LOG: lambda x: x.long()}, TypeError, rf"samples\[1\]: {LOG} must be"),
        ({LOG: set_at((3, 0), 2.5)}, ValueError, rf"samples\[1\]: {LOG} must be log-probabilities, .* got 2.5"),
        ({LOG: set_at((3, 0), float("nan"))}, ValueError, rf"samples\[1\]: {LOG} must be log-probab.* got nan"),
        (
            {INDICES: set_at(3, -1)},
            ValueError,
            rf"samples\[1\]: {INDICES} must have a class for each token that counts, got only padding for token 3",
        ),
    ],
)
def test_wrong_columns(change, error, message, tmp_path):
    made = from_columns(tmp_path, model("llama"), changed(**change), per_device_train_batch_size=8)
    made.args.seed = 0
    with pytest.raises(error, match=message):
        made.data_collator(made.train_dataset)


def test_missing_columns(tmp_path):
    student = model("llama")
    made = from_columns(tmp_path, student, data())
    with pytest.raises(ValueError, match=rf"samples\[0\] must have {LOG}, {INDICES}, got input_ids, labels"):
        made.train()
    given = TopKCollator(transformers.default_data_collator, VOCABULARY)(taught())
    with pytest.raises(ValueError, match=f"inputs must have {INDICES} where teacher is None, got input_ids"):
        made.compute_loss(student, {name: x for name, x in given.items() if name != INDICES})
    for name, x, message in [
        (LOG, given[LOG][:, 1:], rf"{LOG} must be \(8, 7, k\) as labels are, got \(8, 6, 5\)"),
        (INDICES, given[INDICES][..., 1:], rf"{INDICES} must have the shape of {LOG} \(8, 7, 5\), got \(8, 7, 4\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            made.compute_loss(student, {**given, name: x})
    with pytest.raises(ValueError, match="tail must be one of bucket, renormalise, drop, got 'rest'"):
        DistillationTrainer(student, made.args, tail="rest")


def test_collators_that_move_tokens():
    joined = TopKCollator(lambda rows: {"input_ids": torch.zeros(1, 56), "labels": torch.zeros(1, 56)}, VOCABULARY)
    with pytest.raises(ValueError, match=r"data_collator must give input_ids of shape \(8, tokens\), got \(1, 56\)"):
        joined(taught())

    def cut(rows):
        return {name: torch.stack([row[name][1:] for row in rows]) for name in ("input_ids", "labels")}

    with pytest.raises(ValueError, match=r"must keep the 7 tokens of samples\[0\] at the begin or the end of its row"):
        TopKCollator(cut, VOCABULARY)(taught())


def test_stored_teacher_example():
    example = Path(__file__).resolve().parents[1] / "examples/stored_teacher.py"
    if not example.exists():
        pytest.skip("needs the source tree")
    code = [line for line in example.read_text().split('"""')[2].splitlines() if line.strip()]
    assert len(code) <= 30, len(code)
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    before, after = (float(x) for x in re.search(r"([\d.]+) nats a token before, ([\d.]+) after", done.stdout).groups())
    assert after < 0.7 * before, done.stdout
