"""On-policy distillation: the student writes, the teacher says how it would have gone on, and the student follows.

Generalised knowledge distillation (Agarwal et al., ICLR 2024) with small random models; put your own in their place.
"""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from kdfast import ops

torch.manual_seed(0)
sizes = {"vocab_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
teacher = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=64, **sizes)).eval().requires_grad_(False)
student = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, **sizes))
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
prompts = torch.randint(64, (16, 4))

for step in range(30):
    student.eval()
    with torch.no_grad():  # what the student writes is data
        written = student.generate(prompts, max_new_tokens=12, do_sample=True, pad_token_id=0)
    student.train()
    inputs = written[:, :-1]
    answers = torch.arange(inputs.shape[1]) >= prompts.shape[1] - 1  # the prompt does not count
    with torch.inference_mode():
        target = teacher.model(inputs).last_hidden_state
    hidden = student.model(inputs).last_hidden_state
    loss = ops.linear_kl(
        *(hidden, student.lm_head.weight, target, teacher.lm_head.weight),
        beta=1.0,  # KL(student || teacher): what the student writes should be likely to the teacher
        mask=answers.expand(len(inputs), -1),
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step in (0, 29):
        print(f"step {step + 1}: {loss.item():.4f} nats a token")
