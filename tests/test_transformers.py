"""`kdfast.integrations.transformers` with small random models, against the formula with all logits."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

transformers = pytest.importorskip("transformers", reason="the [llm] extra is not installed")
pytest.importorskip("accelerate", reason="the [llm] extra is not installed")

from kdfast.integrations.transformers import DistillationTrainer  # noqa: E402

VOCABULARY = 40
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32, "head_dim": 8}
CONFIGS = {
    "llama": lambda **more: transformers.LlamaConfig(**{**SMALL, **more}),
    "llama, tied": lambda **more: transformers.LlamaConfig(**{**SMALL, "tie_word_embeddings": True, **more}),
    "gemma": lambda **more: transformers.Gemma2Config(**{**SMALL, "final_logit_softcapping": 0.5, **more}),
    "cohere": lambda **more: transformers.CohereConfig(**{**SMALL, "logit_scale": 0.25, **more}),
    "gpt2": lambda **more: transformers.GPT2Config(
        vocab_size=more.get("vocab_size", VOCABULARY), n_embd=16, n_layer=2, n_head=2, n_positions=32
    ),
}


def model(name, seed=0, **more):
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](**more))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return made


def data(count=8, length=7):
    """Rows of which the first tokens, and the padding of every other row, do not count."""
    generator, rows = torch.Generator().manual_seed(1), []
    for i in range(count):
        tokens = torch.randint(VOCABULARY, (length,), generator=generator)
        labels, mask = tokens.clone(), torch.ones(length, dtype=torch.long)
        labels[: 1 + i % 3] = -100
        if i % 2:
            labels[-2:], mask[-2:] = -100, 0
        rows.append({"input_ids": tokens, "labels": labels, "attention_mask": mask})
    return rows


def trainer(folder, student, teacher, rows=None, alpha=0.3, beta=0.0, temperature=2.0, **options):
    defaults = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 0.05, "report_to": [], "seed": 3}
    defaults |= {"use_cpu": True, "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    args = transformers.TrainingArguments(str(folder), **{**defaults, **options})
    rows = data() if rows is None else rows
    how = {"teacher": teacher, "alpha": alpha, "beta": beta, "temperature": temperature}
    return DistillationTrainer(student, args, train_dataset=rows, eval_dataset=rows, **how)


def batch(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def formula(student, teacher, rows, alpha=0.3, temperature=2.0):
    given = {k: v for k, v in batch(rows).items() if k != "labels"}
    labels = batch(rows)["labels"][:, 1:].flatten()
    with torch.no_grad():
        p = teacher(**given).logits[:, :-1].flatten(0, 1)
    z = student(**given).logits[:, :-1].flatten(0, 1)
    counted = labels != -100
    kl = F.kl_div((z / temperature).log_softmax(-1), (p / temperature).softmax(-1), reduction="none").sum(-1)
    return (alpha * kl[counted].sum() + (1 - alpha) * F.cross_entropy(z, labels, reduction="sum")) / counted.sum()


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients(name, tmp_path):
    student, teacher = model(name), model(name, 1)
    other, made, rows = copy.deepcopy(student), None, data()
    made = trainer(tmp_path, student, teacher)
    student.eval(), other.eval()  # no dropout
    loss, want = made.compute_loss(student, batch(rows)), formula(other, teacher, rows)
    torch.testing.assert_close(loss, want, rtol=2e-5, atol=1e-6)
    loss.backward(), want.backward()
    for (key, p), q in zip(student.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5 * float(q.grad.abs().max()) + 1e-8, msg=key)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_what_does_not_count_may_be_anything(tmp_path):
    student, rows = model("llama"), data()
    made = trainer(tmp_path, student, model("llama", 1))
    changed = copy.deepcopy(rows)
    for row in changed:
        row["input_ids"][row["attention_mask"] == 0] = 0
    losses = [made.compute_loss(student, batch(x)) for x in (rows, changed)]
    torch.testing.assert_close(*losses)


def test_logits_are_not_formed(tmp_path):
    """Neither side's head runs over the tokens: a model's own forward gives one logit a row."""
    student, teacher, seen = model("llama"), model("llama", 1), []
    made = trainer(tmp_path, student, teacher)
    for network in (student, teacher):
        network.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    made.compute_loss(student, batch(data()))
    assert seen == [1]


@pytest.mark.parametrize("name", ["llama", "llama, tied"])
def test_accumulation_changes_nothing(name, tmp_path):
    """One step of 8 rows, and of 4 times 2 with different numbers of tokens."""
    results = []
    for size, times in ((8, 1), (2, 4)):
        student = model(name)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": times, "max_steps": 1}
        trainer(tmp_path / str(size), student, model(name, 1), optim="sgd", max_grad_norm=0.0, **options).train()
        results.append(student.state_dict())
    for key, x in results[0].items():
        torch.testing.assert_close(results[1][key], x, rtol=1e-5, atol=1e-6)
    start = model(name).state_dict()
    assert any(not torch.equal(start[key], x) for key, x in results[0].items())


def test_resumed_to_the_same_bits(tmp_path):
    whole, part = model("llama"), model("llama")
    teacher = model("llama", 1)
    before = copy.deepcopy(teacher.state_dict())
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "lr_scheduler_type": "constant"}
    trainer(tmp_path / "whole", whole, teacher, **saving).train()
    trainer(tmp_path / "part", part, teacher, **{**saving, "max_steps": 2}).train()
    part = model("llama", 5)
    trainer(tmp_path / "part", part, teacher, **saving).train(resume_from_checkpoint=True)
    for key, x in whole.state_dict().items():
        assert torch.equal(part.state_dict()[key], x), key
    for key, x in teacher.state_dict().items():
        assert torch.equal(before[key], x)
    index = [path.name for path in (tmp_path / "whole/checkpoint-4").iterdir()]
    assert "model.safetensors" in index and not any("teacher" in name for name in index)
    assert "teacher" not in json.loads((tmp_path / "whole/checkpoint-4/trainer_state.json").read_text())


def test_evaluation_and_predictions(tmp_path):
    student, teacher = model("gemma"), model("gemma", 1)
    made = trainer(tmp_path, student, teacher, per_device_eval_batch_size=8)
    student.eval()
    want = float(formula(student, teacher, data()))
    assert made.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-4)
    predictions = made.predict(data()).predictions
    assert predictions.shape == (8, 7, VOCABULARY)


def test_without_a_teachers_share_it_does_not_run(tmp_path):
    student, teacher = model("llama"), model("llama", 1)
    made = trainer(tmp_path, student, teacher, alpha=0.0)
    teacher.model.register_forward_hook(lambda *x: pytest.fail("the teacher ran"))
    torch.testing.assert_close(
        made.compute_loss(student, batch(data())),
        formula(student, model("llama", 1), data(), 0.0),
        rtol=2e-5,
        atol=1e-6,
    )


def test_bfloat16(tmp_path):
    student = model("llama")
    made = trainer(tmp_path, student, model("llama", 1), bf16=True)
    made.train()
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in student.parameters())


def test_two_processes_are_one(tmp_path):
    """One step of 8 rows, and of 4 on each of two processes with different numbers of tokens."""
    student = model("llama")
    options = {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1}
    trainer(tmp_path / "one", student, model("llama", 1), per_device_train_batch_size=8, **options).train()
    (tmp_path / "step.py").write_text(
        f"""
import sys, torch
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from test_transformers import model, trainer
made = trainer({str(tmp_path / "two")!r}, model("llama"), model("llama", 1), ddp_backend="gloo", **{options!r})
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


def test_on_policy_example():
    """The student's text becomes likelier to the teacher."""
    example = Path(__file__).resolve().parents[1] / "examples/on_policy.py"
    if not example.exists():
        pytest.skip("needs the source tree")
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, last = (float(x) for x in re.findall(r"step \d+: ([\d.]+) nats", done.stdout))
    assert last < 0.9 * first, done.stdout


class OtherHead(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) ** 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": lambda: model("llama", 1, vocab_size=50)}, "teacher must have the model's 40 classes, got 50"),
        ({"alpha": 1.5}, "alpha must be"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
    ],
)
def test_wrong_arguments(change, message, tmp_path):
    teacher = change.pop("teacher", lambda: model("llama", 1))()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model("llama"), teacher, **change)


def test_a_head_that_does_more(tmp_path):
    teacher = model("llama", 1)
    teacher.lm_head = OtherHead(16, VOCABULARY, bias=False)
    with pytest.raises(ValueError, match="teacher must have logits that are its head's of the last hidden states"):
        trainer(tmp_path, model("llama"), teacher)
    with pytest.raises(ValueError, match="inputs must have labels"):
        trainer(tmp_path, model("llama"), model("llama", 1)).compute_loss(None, {"input_ids": torch.ones(1, 2).long()})
