"""
Chooses how to fine-tune on the digits benchmark, and shows what it brings.

    python benchmarks/greg_digits.py

Each way to fine-tune is tried on three networks, with seeds 3 to 5. The choice is by the
validation data alone: the highest AUROC of the energy score against validation outliers, among the
settings that cost at most half a percent of ID accuracy. GReg builds on the choice for
energy-regularized training and adds ``beta``; GReg+ takes GReg's. All train for the same number of
steps, and for all, the learning rate is searched, since the classifiers are small, and so are
their logits: the margins made for CIFAR-10 need not fit.

Then the choices are compared on the test sets, with the networks of the README's table, seeds 0 to
2. ``benchmarks/results/greg_digits.json`` holds every trial, the choices, and this comparison, the
``.md`` beside it the table. The choices belong into ``FINETUNING`` in
``pood_plugins/benchmark/digits.py``.

All runs in one thread: for networks this small, that is faster, and the number of threads changes
the rounding and hence the networks.
"""

import json
from copy import deepcopy
from pathlib import Path
from statistics import fmean

import torch
from pytorch_ood.metrics import OODMetrics
from torch import nn
from torch.utils.data import DataLoader

from pood_plugins import split_model
from pood_plugins.benchmark.digits import FINETUNING, Digits, finetune_classifier, train_classifier
from pood_plugins.evaluation.digits import run_digits
from pood_plugins.evaluation.report import environment
from pood_plugins.training import DivergenceError

RESULTS = Path(__file__).parent / "results"
SEARCH_SEEDS, TEST_SEEDS = (3, 4, 5), (0, 1, 2)
EPOCHS = 5
ACCURACY_LOSS = 0.005

LEARNING_RATES = (0.001, 0.003, 0.01)
MARGINS = ((-25.0, -7.0), (-12.0, -4.0), (-10.0, -2.0), (-8.0, -3.0), (-7.0, -2.0))
BETAS = (0.1, 1.0, 10.0, 100.0)

ROWS = ["Energy", *(f"{train} → Energy" for train in ("CE", "OE", "Energy", "GReg", "GReg+"))]


def choices(train: str, chosen: dict[str, dict]) -> list[dict[str, float]]:
    """Settings to try."""
    rates = [{"learning_rate": rate} for rate in LEARNING_RATES]
    if train == "energy":
        return [
            {**rate, "margin_in": margin_in, "margin_out": margin_out}
            for margin_in, margin_out in MARGINS
            for rate in rates
        ]
    if train == "greg":
        return [{**chosen["energy"], "beta": beta} for beta in BETAS]
    return [chosen["greg"]] if train == "greg+" else rates


def validate(model: nn.Module, benchmark: Digits) -> dict[str, float]:
    """ID accuracy, and AUROC and FPR95 of the energy score, on the validation data."""
    x, y = (torch.cat(batches) for batches in zip(*DataLoader(benchmark.validation_set(), 256)))
    with torch.no_grad():
        logits = model(x)
    metrics = OODMetrics()
    metrics.update(-logits.logsumexp(dim=1), y)
    values = metrics.compute()
    known = y >= 0
    return {
        "accuracy": float((logits[known].argmax(dim=1) == y[known]).double().mean()),
        "AUROC": float(values["AUROC"]),
        "FPR95": float(values["FPR95TPR"]),
    }


def mean(values: list[dict[str, float]]) -> dict[str, float]:
    return {name: fmean(value[name] for value in values) for name in values[0]}


def attempt(
    train: str, settings: dict[str, float], networks: dict[int, nn.Module], benchmark: Digits
) -> dict:
    """Means over the networks, or why training failed."""
    outcomes = []
    for seed, network in networks.items():
        split = split_model(deepcopy(network))
        try:
            finetune_classifier(benchmark, split, train, seed, EPOCHS, **settings)
        except DivergenceError as error:
            return {"settings": settings, "error": str(error)}
        outcomes.append(validate(split, benchmark))
    return {"settings": settings, **mean(outcomes)}


def main() -> None:
    torch.set_num_threads(1)
    benchmark = Digits()
    networks = {seed: train_classifier(benchmark, seed) for seed in SEARCH_SEEDS}
    untouched = mean([validate(network, benchmark) for network in networks.values()])
    print(f"not fine-tuned: {untouched}", flush=True)

    trials: dict[str, list[dict]] = {}
    chosen: dict[str, dict] = {}
    for train in FINETUNING:
        trials[train] = []
        for settings in choices(train, chosen):
            trials[train].append(attempt(train, settings, networks, benchmark))
            print(f"{train}: {trials[train][-1]}", flush=True)
        good = [
            trial
            for trial in trials[train]
            if trial.get("accuracy", 0.0) >= untouched["accuracy"] - ACCURACY_LOSS
        ]
        chosen[train] = max(good, key=lambda trial: trial["AUROC"])["settings"]
        print(f"{train}: chosen {chosen[train]}", flush=True)
    if chosen != FINETUNING:
        print(f"put these settings into FINETUNING: {chosen}")
        FINETUNING.update(chosen)

    report = run_digits(ROWS, seeds=TEST_SEEDS)
    print(report.to_text())
    content = {
        **environment(),
        "epochs": EPOCHS,
        "accuracy_loss": ACCURACY_LOSS,
        "search": {"seeds": SEARCH_SEEDS, "not fine-tuned": untouched, "trials": trials},
        "chosen": chosen,
        "test": {
            "seeds": TEST_SEEDS,
            "rows": [
                {
                    "detector": row,
                    "accuracy": result.accuracy,
                    **{
                        f"{column} {metric}": report.value(row, column, metric)
                        for column in ("near", "far")
                        for metric in ("AUROC", "FPR95")
                    },
                }
                for row, result in zip(ROWS, report.results)
            ],
        },
    }
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    (RESULTS / "greg_digits.json").write_text(text)
    (RESULTS / "greg_digits.md").write_text(report.to_markdown())


if __name__ == "__main__":
    main()
