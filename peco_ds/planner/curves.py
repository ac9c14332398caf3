"""Images a second and days over GPU counts, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peco_ds.planner.bill import Bill
from peco_ds.planner.simulation import simulate_step

SIMULATED_STEPS = 50


def scaling_plot(path: Path, bills: Sequence[Bill]) -> None:
    """Two panels over GPU counts, a line a kind of GPU, with a band from the slow to the fast pace: images/s
    of the main stage beside linear scaling and the simulation,
    and days of the whole chain."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    speed, days = figure.subplots(1, 2)
    for number, name in enumerate(dict.fromkeys(bill.hardware.name for bill in bills)):
        own = sorted((bill for bill in bills if bill.hardware.name == name), key=lambda bill: bill.gpus)
        gpus, colour = [bill.gpus for bill in own], f"C{number}"
        rates = {pace: [bill.main.images_s(pace) for bill in own] for pace in ("slow", "typical", "fast")}
        speed.plot(gpus, rates["typical"], marker="o", color=colour, label=name)
        speed.fill_between(gpus, rates["slow"], rates["fast"], color=colour, alpha=0.2, linewidth=0)
        speed.plot(
            gpus, [rates["typical"][0] / gpus[0] * count for count in gpus], color=colour, linestyle=":", linewidth=1
        )
        if bills[0].chain.main.trains:
            steps = [simulate_step(bill.main.inputs(), steps=SIMULATED_STEPS) for bill in own]
            batch = bills[0].chain.main.run.global_batch
            speed.plot(
                gpus,
                [min(batch / step.mean_s, bill.main.loader_images_s()) for step, bill in zip(steps, own)],
                color=colour,
                linestyle="none",
                marker="x",
                markersize=9,
                label=f"{name}, simulated",
            )
        spent = {pace: [bill.hours(pace) / 24 for bill in own] for pace in ("slow", "typical", "fast")}
        days.plot(gpus, spent["typical"], marker="o", color=colour, label=name)
        days.fill_between(gpus, spent["fast"], spent["slow"], color=colour, alpha=0.2, linewidth=0)
    main = bills[0].chain.main
    for axes, title, label in (
        (
            speed,
            f"{main.name}, {main.recipe.schedule.epochs or 0:g} epochs; dotted: linear, band: fast to slow pace",
            "images/s",
        ),
        (days, "all stages, with evaluations, saves and failures", "days"),
    ):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(
            sorted({bill.gpus for bill in bills}), [str(count) for count in sorted({bill.gpus for bill in bills})]
        )
        axes.set_xlabel("GPUs")
        axes.set_ylabel(label)
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.savefig(path, dpi=120)
