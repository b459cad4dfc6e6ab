"""How long compiling takes, to be told apart from running."""


class CompileClock:
    """Measures the time jax spends tracing, lowering and compiling inside a `with` block.

    Compilation happens inside the first call of a function, so it cannot be timed from outside; jax
    reports its phases as time spans, which nest.
    """

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []

    def __enter__(self) -> "CompileClock":
        from jax import monitoring

        monitoring.register_event_time_span_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        from jax import monitoring

        monitoring.unregister_event_time_span_listener(self._listen)

    @property
    def seconds(self) -> float:
        """Length of the union of the spans."""
        total, until = 0.0, 0.0
        for start, end in sorted(self._spans):
            total += max(0.0, end - max(start, until))
            until = max(until, end)
        return total

    def _listen(self, event: str, start: float, end: float, **_: object) -> None:
        if event.startswith("/jax/core/compile/"):
            self._spans.append((start, end))
