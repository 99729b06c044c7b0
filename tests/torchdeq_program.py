"""A program written for TorchDEQ: trains small equilibrium models and prints what it saw as JSON.

It never names deqcore. tests/test_parity.py runs it as it is, and with deqcore in torchdeq's place.
"""

import argparse
import json
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchdeq
from torchdeq import add_deq_args, apply_norm, get_deq, reset_deq
from torchdeq.dropout import VariationalDropout, VariationalDropout2d
from torchdeq.loss import fp_correction, jac_reg
from torchdeq.norm import remove_norm
from torchdeq.solver import get_solver
from torchdeq.utils import mem_gc, mixed_init

INFO = ("abs_lowest", "rel_lowest", "abs_trace", "rel_trace", "nstep", "sradius")


class Cell(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.inject = nn.Linear(6, width)
        self.hidden = nn.Linear(width, width)
        self.norm = nn.GroupNorm(4, width)
        self.drop = VariationalDropout(dropout)

    def forward(self, z, u):
        return torch.tanh(0.5 * self.drop(self.hidden(z)) + self.norm(u))


class Classifier(nn.Module):
    def __init__(self, args) -> None:
        super().__init__()
        self.args = args
        self.cell = Cell(16, args.dropout)
        self.head = nn.Linear(16, 3)
        self.deq = get_deq(args)
        apply_norm(self.cell, args=args, filter_out=["inject"])

    def forward(self, x, writer=None, **solver_kwargs):
        reset_deq(self.cell)
        u = self.cell.inject(x)

        def f(z):
            return mem_gc(self.cell, (z, u)) if self.args.mem else self.cell(z, u)

        z0 = torch.zeros(x.shape[0], 16)
        z_out, info = self.deq(
            f, z0, solver_kwargs=solver_kwargs or None, sradius_mode=self.args.sradius_mode, backward_writer=writer
        )
        jac_loss = torch.zeros(())
        if self.training and self.args.jac_loss_weight > 0:
            z = z_out[-1].detach().requires_grad_()
            jac_loss = jac_reg(f(z), z, vecs=2, create_graph=True)
        return [self.head(z) for z in z_out], jac_loss, info


class MultiScale(nn.Module):
    """Two states at once: a feature map and a vector."""

    def __init__(self, args) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.pool = nn.Linear(2, 5)
        self.back = nn.Linear(5, 2)
        self.drop = VariationalDropout2d(args.dropout, token_first=False)
        self.deq = get_deq(args)
        apply_norm(self, norm_type="weight_norm", args=args, prefix_filter_out="deq")

    def forward(self, x):
        reset_deq(self)

        def f(image, vector):
            lifted = self.back(vector)[:, :, None, None]
            new = torch.tanh(0.3 * self.drop(self.conv(image)) + 0.2 * lifted + x)
            return new, torch.tanh(0.5 * self.pool(image.mean((2, 3))))

        z_out, info = self.deq(f, (torch.zeros_like(x), torch.zeros(x.shape[0], 5)))
        return z_out, info


def parse(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--mem", action="store_true")
    add_deq_args(parser)
    return parser.parse_args(argv)


def describe(info):
    return {key: list(info[key].shape) for key in INFO}


def numbers(tensor):
    return tensor.detach().double().flatten().tolist()


def train_classifier(args):
    torch.manual_seed(0)
    model = Classifier(args)
    x, y = torch.randn(24, 6), torch.randint(0, 3, (24,))
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    losses, backward = [], []
    for _ in range(args.epochs):
        model.train()
        logits, jac_loss, info = model(x, writer=lambda found: backward.append(describe(found)))
        loss = fp_correction(F.cross_entropy, (logits, y), weight_func="exp", gamma=args.gamma)
        loss = loss + args.jac_loss_weight * jac_loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    shapes = describe(info)
    model.eval()
    with torch.no_grad():
        (out,), _, info = model(x)
        (fewer,), _, _ = model(x, f_max_iter=2)
        (skipped,), _, _ = model(x, f_max_iter=0)
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(saved)
    parameters = sum(p.numel() for p in model.parameters())
    remove_norm(model.cell)
    return {
        "losses": losses,
        "states": len(logits),
        "train_info": shapes,
        "eval_info": describe(info),
        "backward": backward[:1],
        "logits": numbers(out),
        "fewer": numbers(fewer),
        "skipped": numbers(skipped),
        "nstep": numbers(info["nstep"]),
        "radius": numbers(info["sradius"]),
        "parameters": parameters,
        "plain": sum(p.numel() for p in model.parameters()),
    }


def train_multiscale(args):
    torch.manual_seed(1)
    model = MultiScale(args)
    x = torch.randn(3, 2, 4, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        z_out, info = model(x)
        loss = sum((image**2).mean() + (vector**2).mean() for image, vector in z_out)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        (state,), _ = model(x)
    return {
        "losses": losses,
        "shapes": [[list(part.shape) for part in z] for z in z_out],
        "list": isinstance(z_out, list),
        "train_info": describe(info),
        "eval": [number for part in state for number in numbers(part)],
    }


def helpers():
    torch.manual_seed(2)
    start = mixed_init((3, 4), device="cpu")
    cell = nn.Linear(4, 4)
    z, _, info = get_solver("fixed_point_iter")(
        lambda z: torch.tanh(cell(z)), start.detach(), max_iter=9, tol=0.0, stop_mode="rel", tau=0.7
    )
    return {
        "start": numbers(start),
        "solved": numbers(z),
        "info": describe(info),
        "version": hasattr(torchdeq, "get_deq"),
    }


def main() -> None:
    report = {"helpers": helpers()}
    for line in json.loads(sys.argv[1]):
        kind, *argv = line
        train = train_multiscale if kind == "multiscale" else train_classifier
        report[" ".join(line)] = train(parse(argv))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
