"""A language model's teacher that runs once: its 8 largest log-probabilities a token go to disk, and train a student.

With small random models; put your own, or a server's answers, in their place.
"""

import tempfile

import torch
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments

import kdfast
from kdfast.integrations.transformers import DistillationTrainer, StoredTeacher
from kdfast.teacher_store import Contents, TeacherStore, TeacherStoreWriter

torch.manual_seed(0)
sizes = {"vocab_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
teacher = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=64, initializer_range=0.2, **sizes))
student = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, **sizes))
rows = [{"input_ids": x, "labels": x} for x in torch.randint(64, (64, 16))]

folder, says = tempfile.mkdtemp(), {"dtype": "float32", "top_k": 8, "temperature": 1.0, "tail": "bucket", "longest": 16}
contents = Contents("teacher, seed 0", 64, "tokens, seed 0", len(rows), "none", seed=0, augmentations=1, **says)
writer = TeacherStoreWriter(folder, contents)
for shard in writer.missing():  # what a killed writer has left
    with torch.no_grad():
        logits = [teacher(row["input_ids"][None]).logits[0, :-1] for row in rows[shard.begin : shard.end]]
    tops = [x.log_softmax(-1).topk(8) for x in logits]
    tops = [(pad(values, (0, 0, 1, 0)), pad(indices, (0, 0, 1, 0), value=-1)) for values, indices in tops]
    writer.write(shard, [kdfast.TopK.of_log_probabilities(*top) for top in tops])  # a row for each token

data = StoredTeacher(rows, TeacherStore(folder))
args = TrainingArguments(tempfile.mkdtemp(), num_train_epochs=20, learning_rate=3e-3, report_to=[], use_cpu=True)
trainer = DistillationTrainer(student, args, train_dataset=data, eval_dataset=data, alpha=1.0)
before = trainer.evaluate()["eval_loss"]
trainer.train()
print(f"{before:.4f} nats a token before, {trainer.evaluate()['eval_loss']:.4f} after")
