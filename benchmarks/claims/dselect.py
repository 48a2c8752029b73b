"""Does a gate find the experts that made the data? DSelect-k against top-k and softmax gates (Hazimeh et al. 2021).

    python benchmarks/claims/dselect.py --to claims/dselect

Each of 28 tasks is the mean of another pair of 8 experts, small random networks. Given: the experts are known and only
gates are learned. Learned: experts and gates are learned together. A gate has recovered its task where its two largest
weights are on the right pair, under the naming of the experts that suits best.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import bed
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from loramux.routing import Decision, DSelectK, Normaliser, Softmax, TopK

EXPERTS, INPUTS, HIDDEN, OUTPUTS, ROWS, NOISE = 8, 10, 16, 4, 32, 0.05
PAIRS = torch.tensor(list(combinations(range(EXPERTS), 2)))
GATES: dict[str, tuple[Normaliser, float]] = {
    "dselect_k": (DSelectK(k=2, gates=EXPERTS), 0.01),
    "top-k": (TopK(k=2), 1.0),
    "softmax": (Softmax(), 1.0),
}
"""By name the gate, and the deviation of its scores at the start."""
STEPS, PENALTY = 800, 1e-3
RATES = (1e-2, 5e-2)


@dataclass
class Experts:
    """Networks with one hidden layer, side by side."""

    inner: Tensor
    outer: Tensor

    @classmethod
    def drawn(cls, generator: torch.Generator) -> "Experts":
        inner = torch.randn(EXPERTS, INPUTS, HIDDEN, generator=generator) * INPUTS**-0.5
        return cls(inner, torch.randn(EXPERTS, HIDDEN, OUTPUTS, generator=generator) * HIDDEN**-0.5)

    def __call__(self, x: Tensor) -> Tensor:
        """`(tasks, rows, inputs)` to `(tasks, rows, experts, outputs)`."""
        hidden = torch.einsum("trd,edh->treh", x, self.inner).mul(2).tanh()
        return torch.einsum("treh,eho->treo", hidden, self.outer)


@dataclass
class Outcome:
    recovered: float
    experts: float
    test_loss: float
    jitter: float


def learn(name: str, rate: float, seed: int, given: bool) -> Outcome:
    """Learn gates, and experts where they are not given, on fresh examples in every step."""
    generator = torch.Generator().manual_seed(seed)
    truth = Experts.drawn(generator)
    experts = truth if given else Experts.drawn(generator)
    gate, deviation = GATES[name]
    scores = torch.randn(len(PAIRS), gate.num_scores(EXPERTS), generator=generator) * deviation
    learnt = [scores, *([] if given else [experts.inner, experts.outer])]
    optimiser = torch.optim.Adam([tensor.requires_grad_() for tensor in learnt], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    late: list[float] = []
    for step in range(STEPS):
        decision = gate(scores, training=True)
        loss = _error(decision, experts, truth, generator)
        if step >= STEPS // 2:
            late.append(float(loss.detach()))
        if decision.penalty is not None:
            loss = loss + PENALTY * decision.penalty.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        decision = gate(scores)
        recovered = _recovered(decision.weights)
        chosen = float((decision.weights > 1e-3).sum(-1).float().mean())
        return Outcome(
            recovered, chosen, float(_error(decision, experts, truth, generator)), float(torch.tensor(late).std())
        )


def _recovered(weights: Tensor) -> float:
    """The share of tasks whose two largest weights are on their experts, under the best naming of the experts."""
    true = torch.zeros_like(weights).scatter(1, PAIRS, 1.0)
    named = torch.tensor(linear_sum_assignment(true.T @ weights, maximize=True)[1])
    found = weights[:, named].topk(2).indices.sort(-1).values
    return float((found == PAIRS).all(-1).float().mean())


def _error(
    decision: Decision, experts: Callable[[Tensor], Tensor], truth: Experts, generator: torch.Generator
) -> Tensor:
    """Mean squared error on fresh examples."""
    x = torch.randn(len(PAIRS), ROWS, INPUTS, generator=generator)
    made = truth(x).detach()
    wanted = made[torch.arange(len(PAIRS))[:, None], :, PAIRS].mean(1)
    wanted = wanted + NOISE * torch.randn(wanted.shape, generator=generator)
    return (torch.einsum("treo,te->tro", experts(x), decision.weights) - wanted).square().mean()


def main() -> None:
    parser = bed.parser(__doc__, "dselect")
    args = parser.parse_args()
    rows, data = [], {}
    for given in (True, False):
        for name in GATES:
            rate = min(RATES, key=lambda rate: learn(name, rate, 100, given).test_loss)
            found = [learn(name, rate, seed, given) for seed in args.seeds]
            recovered = bed.over_seeds([100 * one.recovered for one in found])
            figures = [[getattr(one, what) for one in found] for what in ("experts", "test_loss", "jitter")]
            cells = [bed.over_seeds(figures[0]), bed.over_seeds(figures[1], 4), bed.over_seeds(figures[2], 4)]
            rows.append(["given" if given else "learned", name, f"{rate:g}", recovered, *cells])
            data[f"{name}, {'given' if given else 'learned'}"] = [vars(one) for one in found]
    header = ["experts", "gate", "rate", "pairs recovered, %", "experts per task", "test loss", "deviation of the loss"]
    title = f"{len(PAIRS)} tasks of {EXPERTS} experts, {STEPS} steps; noise alone costs {NOISE**2:.4f}"
    bed.show(args.to / "dselect.json", title, header, rows, data)


if __name__ == "__main__":
    main()
