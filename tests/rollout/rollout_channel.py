"""A channel under test: its state, the time, and every command so far."""

from __future__ import annotations

from cloud.rollout.events import (
    Begin,
    Command,
    Event,
    Outcome,
    Report,
    Seen,
)
from cloud.rollout.machine import step
from cloud.rollout.plan import Plan
from cloud.rollout.state import (
    Content,
    Health,
    Phase,
    Rollout,
    order,
)

OLD, NEW, NEWER = "aa" * 32, "bb" * 32, "cc" * 32


class Fleet:
    """A channel under test: its state, the time, and every command so far."""

    def __init__(self, *devices: str, plan: Plan | None = None) -> None:
        self.state = Rollout("home")
        self.now = 1000.0
        self.plan = plan or Plan()
        self.commands: list[Command] = []
        self.sequence = 0
        for device in devices:
            self.does(Seen(device, OLD, 1))

    def does(self, event: Event, after: float = 1.0) -> list[Command]:
        self.now += after
        self.state, commands = step(self.state, event, self.now)
        self.commands += commands
        return commands

    def begin(self, version: int = 2, student: str = NEW, devices: tuple[str, ...] = ()) -> None:
        self.does(Begin(Content(version, student), self.plan, devices))

    def reports(
        self, device: str, outcome: Outcome, student: str | None = None, release: int | None = None
    ) -> Report:
        self.sequence += 1
        running = self.state.student if outcome is Outcome.COMMITTED else OLD
        report = Report(
            device,
            self.state.version if release is None else release,
            outcome,
            student or running,
            self.sequence,
            "the probe failed" if outcome is Outcome.FAILED else "",
        )
        self.does(report)
        return report

    def commits(self, *devices: str) -> None:
        for device in devices:
            self.reports(device, Outcome.COMMITTED)

    def fails(self, *devices: str) -> None:
        for device in devices:
            self.reports(device, Outcome.FAILED)

    # Methods, not attributes: mypy would take them for constants between two assertions.
    def phase(self) -> Phase:
        return self.state.phase

    def health(self, device: str) -> Health:
        return self.state.devices[device].health

    def told(self) -> set[str]:
        return {d for d in self.state.devices if self.state.target(d) == self.state.version}

    def in_order(self) -> list[str]:
        names = self.state.devices
        return sorted(names, key=lambda d: order("home", self.state.version, d))


def names(count: int) -> list[str]:
    return [f"device-{n}" for n in range(count)]
