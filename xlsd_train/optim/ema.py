"""Two power-function averages of the weights, kept on the CPU while training goes on.

checkpoints/step-00000250/ema.safetensors   SIGMA_REL/NAME, f32, exact, to resume from
RUN/ema/step-00000250.safetensors           the same file, kept after its checkpoint is pruned

Their lengths are those of arXiv 2312.02696, section 3.2: sigma_rel 0.05 and 0.10. `xlsd-train ema`
makes an average of any length from their snapshots.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from xlsd_cache.encoding.finite import not_finite
from xlsd_cache.errors import UserError
from xlsd_cache.runtime.atomic import link_or_copy
from xlsd_train.optim.ema_profiles import gamma_of, kept, superfluous
from xlsd_train.optim.pinned import pinned
from xlsd_train.runs.layout import SNAPSHOTS, TENSORS, steps_in
from xlsd_train.weights.lazy_tensors import check_length

SIGMAS = ("0.05", "0.10")
SNAPSHOT = "ema.safetensors"


class Ema:
    """The averages, in CPU memory. On a GPU, copying and averaging overlap the next step."""

    def __init__(self, named: Mapping[str, Parameter], every: int = 1) -> None:
        """Averages of these parameters, updated every `every` steps."""
        self.named, self.every = named, every
        self.step = 0  # of the last update
        self.averages = {
            sigma: {name: torch.zeros(p.shape) for name, p in named.items()} for sigma in SIGMAS
        }
        self._on_gpu = [p for p in named.values() if p.is_cuda]
        self._stage = pinned(named) if self._on_gpu else {}
        cuda: Any = torch.cuda
        self._stream: Any = cuda.Stream() if self._on_gpu else None
        self._thread = ThreadPoolExecutor(1, "ema")
        self._pending: Future[None] | None = None

    def update(self, step: int) -> None:
        """Update with the weights after a step, if the step is due.

        Weights between two updates count as those of the later one. On a GPU this returns at once:
        the copies to the CPU run during the next step's forward and backward pass, on their own
        stream, and a thread averages. `before_update` makes the optimizer wait for the copies.
        """
        if step % self.every:
            return
        self.finish()
        if not self._on_gpu:
            self._average(step, self.named, None)
            return
        self._stream.wait_stream(torch.cuda.current_stream())  # the step that made these weights
        with torch.cuda.stream(self._stream):
            for name, parameter in self.named.items():
                self._stage[name].copy_(parameter.detach(), non_blocking=True)
            copied = self._stream.record_event()
        self._pending = self._thread.submit(self._average, step, self._stage, copied)

    def before_update(self, *_: object) -> None:
        """Make the GPU wait for the copies before it changes weights; the CPU does not wait."""
        if self._on_gpu:
            torch.cuda.current_stream().wait_stream(self._stream)

    def finish(self) -> None:
        """Wait until the last update is done."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def contexts(self) -> dict[str, AbstractContextManager[None]]:
        """Name in validation -> `applied`; empty before the first update."""
        return {f"ema {sigma}": self.applied(sigma) for sigma in SIGMAS if self.step}

    @contextmanager
    def applied(self, sigma: str) -> Iterator[None]:
        """Within the block the weights are an average; then they are restored, bit for bit."""
        self.finish()
        live = {name: parameter.detach().cpu().clone() for name, parameter in self.named.items()}
        try:
            self._put(self.averages[sigma])
            yield
        finally:
            self._put(live)

    def save(self, folder: Path) -> None:
        """Write the snapshot into a checkpoint's folder."""
        # One entry: safetensors writes several in random order, so files would differ between runs.
        save_file(self.tensors(), folder / SNAPSHOT, {"step": str(self.step)})

    def tensors(self) -> dict[str, Tensor]:
        """The averages up to the last update, under the names in a snapshot."""
        self.finish()
        return {
            f"{sigma}/{name}": value
            for sigma, average in self.averages.items()
            for name, value in average.items()
        }

    def load(self, checkpoint: Path) -> None:
        """Resume from a checkpoint. Raises UserError if it has no snapshot of this model."""
        path = checkpoint / SNAPSHOT
        try:
            check_length(path)
            with safe_open(path, "pt") as file:
                if len(file.keys()) != len(SIGMAS) * len(self.named):
                    raise KeyError("other names")
                for sigma, average in self.averages.items():
                    for name, value in average.items():
                        value.copy_(file.get_tensor(f"{sigma}/{name}"))
                self.step = int((file.metadata() or {})["step"])
            if bad := not_finite(self.tensors()):
                raise ValueError(f"{bad[0]} is not finite")
        except (OSError, KeyError, RuntimeError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{path} does not fit this run ({error}); it is damaged or another run's: remove "
                f"{checkpoint} to resume from the checkpoint before it"
            ) from error

    def _average(self, step: int, weights: Mapping[str, Tensor], copied: Any) -> None:
        if copied is not None:
            copied.synchronize()
        with torch.no_grad():
            for sigma, average in self.averages.items():
                new = 1 - kept(gamma_of(float(sigma)), self.step, step)
                for name, value in average.items():
                    value.lerp_(weights[name], new)
        self.step = step

    def _put(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(weights[name])


@contextmanager
def averaging(
    named: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    every: int | None,
    checkpoint: Path | None,
) -> Iterator[Ema]:
    """The averages of an optimizer's parameters, loaded from the checkpoint if there is one."""
    ema = Ema(named, every or 1)
    if checkpoint:
        ema.load(checkpoint)
    hook = optimizer.register_step_pre_hook(ema.before_update)
    try:
        yield ema
    finally:
        hook.remove()
        ema.close()


def keep_snapshots(run: Path, checkpoints: list[Path], most: int) -> None:
    """Keep snapshots of pruned checkpoints too: at most `most`, evenly over training."""
    folder = run / SNAPSHOTS
    for checkpoint in checkpoints:
        snapshot = folder / f"{checkpoint.name}{TENSORS}"
        if not snapshot.exists() and (checkpoint / SNAPSHOT).exists():
            folder.mkdir(exist_ok=True)
            link_or_copy(checkpoint / SNAPSHOT, snapshot)
    kept_snapshots = snapshots(run)
    for step in superfluous(sorted(kept_snapshots), most):
        kept_snapshots[step].unlink()


def snapshots(run: Path) -> dict[int, Path]:
    """Step of the checkpoint -> snapshot, oldest first."""
    return steps_in(run / SNAPSHOTS, TENSORS)


def forget_snapshots_after(run: Path, step: int) -> None:
    """Remove the snapshots of later steps than the checkpoint's `step`."""
    for saved, path in snapshots(run).items():
        if saved > step:
            path.unlink()
