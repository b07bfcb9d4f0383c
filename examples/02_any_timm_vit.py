"""An EVA-02 made sparse: a budget in GMACs, training for many budgets, three costs at the end."""

import spot_vit
import timm
import torch
from torch.nn import functional as F

# A small one with random weights, so that this runs in seconds; pretrained=True for a real one.
size = {"img_size": 112, "depth": 6, "embed_dim": 96, "num_heads": 3, "num_classes": 10}
model = timm.create_model("eva02_tiny_patch14_224", **size)
dense = spot_vit.count_flops(model, (3, 112, 112)).total / 1e9

# Decisions before blocks 1, 2 and 3; the ratio that costs 60 % is solved for.
spot_vit.sparsify(model, keep={"gmacs": 0.6 * dense}, at=[1, 2, 3], train_decision="topk")
print(f"dense {dense:.4f} GMACs; at 60 % each stage keeps {model.spot_config.keep:.1%}")

# Training draws another budget at every step. Only the predictors move here.
draw = spot_vit.SampledKeep(0.3, 1.0)
rates = {"lr": 1e-3, "backbone_lr_scale": 0.0, "freeze_epochs": 0, "head": "pretrained"}
groups = spot_vit.param_groups(model, **rates)
optimizer = torch.optim.AdamW(groups)
model.train()
for _step in range(3):
    images, labels = torch.randn(8, 3, 112, 112), torch.randint(10, (8,))
    with draw(model) as ratios:
        loss, _ = spot_vit.spot_loss(model(images, aux=True), labels, ratios)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# Inference removes tokens for real, at whatever budget is asked for.
model.eval()
images = torch.randn(4, 3, 112, 112)
with torch.inference_mode():
    for keep in (0.9, 0.6, 0.4):
        out = spot_vit.set_keep(model, keep)(images, aux=True)
        counts = [index.shape[1] for index in out.index]
        gmacs = spot_vit.count_flops(model, (3, 112, 112)).total / 1e9
        top = F.softmax(out.logits, dim=-1).amax(dim=-1).mean()
        print(f"keep {keep}: {counts} of 64 patches, {gmacs:.4f} GMACs, confidence {top:.2f}")
