"""A Transformer, with a φ for each kind of its layers: attention, the linear layers, the rest.

The model learns which of its tokens is the largest. Until they are meta-trained (`own_phi.py`),
these φ are Adam at a rate of 1e-3, which is enough to show how each layer gets its φ.

python examples/transformer.py
"""

import torch
from torch import nn

import l2l_ref

TOKENS, WIDTH = 8, 16


class Largest(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Linear(1, WIDTH)
        self.position = nn.Embedding(TOKENS, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 1)
        for module in self.modules():  # else these would be "convolutional", not being linear
            if isinstance(module, nn.MultiheadAttention):
                module.phi_group = module.out_proj.phi_group = "attention"
            elif isinstance(module, (nn.LayerNorm, nn.Embedding)):
                module.phi_group = "other"

    def forward(self, x):  # [b, TOKENS] -> [b, TOKENS]
        hidden = self.embedding(x[..., None]) + self.position(torch.arange(TOKENS))
        return self.head(self.encoder(hidden)).squeeze(-1)


def main(steps: int = 300) -> float:
    torch.manual_seed(0)
    model = Largest()
    phi = l2l_ref.new_phi(model, odd=True, nominal=True)
    optimizer = l2l_ref.LearnedOptimizer.for_model(model, phi)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = torch.rand(64, TOKENS)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x.argmax(1)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    x = torch.rand(1000, TOKENS)
    accuracy = (model(x).argmax(1) == x.argmax(1)).float().mean().item()
    print(f"φ of {', '.join(phi)}: accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
