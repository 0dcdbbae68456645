"""Run inside the image: three updates by DeepSpeed's cpu_adam and by PyTorch's AdamW."""

import torch
from deepspeed.git_version_info import installed_ops
from deepspeed.ops.adam import cpu_adam_op

assert installed_ops["cpu_adam"] and installed_ops["fused_adam"]
torch.manual_seed(0)
weights = torch.randn(1000)
expected = torch.nn.Parameter(weights.clone())
reference = torch.optim.AdamW([expected], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
mean, square = torch.zeros(1000), torch.zeros(1000)
cpu_adam_op.create_adam(0, 1e-2, 0.9, 0.95, 1e-8, 0.1, True, False)
for update in range(1, 4):
    gradient = torch.randn(1000)
    expected.grad = gradient.clone()
    reference.step()
    cpu_adam_op.adam_update(0, update, 1e-2, 0.9, 0.95, 1e-8, 0.1, True, weights, gradient, mean, square)
# Sums of a thousand independent numbers; the operator works in float32 as PyTorch does.
torch.testing.assert_close(weights, expected.detach(), rtol=1e-5, atol=1e-6)
print("compiled before, and computes AdamW")
