"""The writers of a run's log, opened, flushed and closed together."""

from pathlib import Path

from curriq.config import RunConfig, to_dict
from curriq.runlog.queries import QueryLog
from curriq.runlog.windows import WindowLog
from curriq.runlog.writers import CandidateLog, MetricsLog, Sink, TensorBoardSink, WandbSink
from curriq.train.loop import StepRecord
from curriq.types import Metrics


class RunLogs:
    """The writers of one session, opened and closed together."""

    def __init__(
        self, config: RunConfig, run_dir: Path, names: tuple[str, ...], tokenizer: str, start: int
    ) -> None:
        self._metrics = MetricsLog(run_dir, start)
        self._candidates = CandidateLog(run_dir, names, start) if config.log.log_candidates else None
        self._queries = QueryLog(run_dir, start) if config.log.log_candidates else None
        self._windows = WindowLog(run_dir, start, config.log.log_windows_mb, tokenizer)
        self._sinks: list[Sink] = []
        if config.log.tensorboard:
            self._sinks.append(TensorBoardSink(run_dir, start))
        if config.log.wandb:
            self._sinks.append(WandbSink(config.log.wandb, run_dir, to_dict(config)))

    def write(self, record: StepRecord, row: Metrics) -> None:
        self._metrics.append(row)
        for sink in self._sinks:
            sink.write(row)
        self._windows.append(record.step, record.proposed)
        if self._candidates is not None:
            mixture = record.mixture
            self._candidates.append(
                record.step,
                record.proposed,
                record.trained,
                loss=mixture.features.loss,
                scores=mixture.scores,
                weights=mixture.weights,
                q=record.q,
                effects=record.effects,
            )
        if self._queries is not None:
            self._queries.append(record.step, record.proposed)

    def flush(self) -> None:
        self._metrics.flush()
        self._windows.flush()
        if self._candidates is not None:
            self._candidates.flush()
        if self._queries is not None:
            self._queries.flush()

    def __enter__(self) -> "RunLogs":
        return self

    def __exit__(self, *exception: object) -> None:
        for sink in self._sinks:
            sink.close()
        self._metrics.close()
