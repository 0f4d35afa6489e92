"""What a run saves: checkpoints, and exports in Hugging Face's format.

Change here: what is saved after which rollout step. checkpoint/ and model_files/ write the files.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor
from transformers import PretrainedConfig

from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.checkpoint.run_folder import latest_checkpoint
from dapo_mcore.checkpoint.run_state import TrainState
from dapo_mcore.checkpoint.saves import Saves
from dapo_mcore.config.schema import Config
from dapo_mcore.errors import output_error
from dapo_mcore.handover import Handover
from dapo_mcore.model_files.hf_folder import save_hf_folder
from dapo_mcore.model_files.model_folder import side_files_folder


class Outputs:
    """The checkpoints and exports of a run, on every rank. Every rank calls its methods, which are collective.

    saves        writes the checkpoints
    train_state  Return the rest of a checkpoint after a rollout step, on rank 0.
    phase        The block is a phase of the run with this name.
    line         shows a line, on rank 0
    stop_token_ids  where a server of an export stops; empty: as the model's own files say
    saved_step   rollout step of the newest checkpoint of this start; -1: none
    last_save_s  seconds that it took; None: none
    """

    def __init__(
        self,
        config: Config,
        hf_config: PretrainedConfig,
        actor: Actor,
        handover: Handover,
        layout: Layout,
        saves: Saves,
        *,
        train_state: Callable[[int], TrainState | None],
        phase: Callable[[str], AbstractContextManager[None]],
        line: Callable[[str], None],
        stop_token_ids: Sequence[int] = (),
    ):
        self._config, self._hf_config, self._actor, self._handover = config, hf_config, actor, handover
        self._layout, self._saves, self._train_state, self._phase, self._line = layout, saves, train_state, phase, line
        self._stop_token_ids = stop_token_ids
        self.last_save_s: float | None = None
        self.saved_step = -1

    def save_due(self, step: int, *, is_last: bool) -> None:
        """Save and export what is due after rollout step `step`."""
        checkpoint = self._config.checkpoint
        saves = (is_last and checkpoint.at_end) or (checkpoint.every and step % checkpoint.every == 0)
        exports = checkpoint.export_every and step % checkpoint.export_every == 0
        if not (saves or exports):
            return
        with self._phase("save"), self._handover.borrowed():
            if saves:
                self._save(step, wait=is_last)
            if exports:
                self.export(self._config.run_dir / "hf" / f"step_{step:06d}", step)

    def save_stopped(self, step: int, *, anew: bool = False) -> None:
        """Save rollout step `step`, after which the run is stopped, if it is not saved yet. Before step 1 a checkpoint is written
        only after a warm start.

        anew  save it in any case.
        """
        if anew or (step > self.saved_step and (step or self._config.warm_start)):
            with self._phase("save"):
                self._handover.to_training()
                self._save(step, wait=True)
        self.finish()

    def finish(self) -> None:
        """Wait for a save beside training. If it failed, save its step again: nothing has been trained since."""
        if not self._saves.in_flight:
            return
        with self._phase("save"):
            if problem := self._saves.finish():
                self._line(f"warning: {problem}; it is saved again")
                self._handover.to_training()
                self._save(self.saved_step, wait=True)

    def export(self, folder: Path, step: int, num_epochs: int | None = None) -> Path:
        """Write an HF folder of the weights after `step`, which ends `num_epochs`, and return it. Every rank raises what rank 0 raises.
        Collective: every rank sends its part of the weights to rank 0, also if rank 0 cannot write them."""
        stream = self._handover.stream()

        def write() -> None:
            try:
                if self._layout.is_controller:
                    self._write_export(stream, folder, step, num_epochs)
            except Exception:  # a signal's exception does not wait for the other ranks
                deque(stream, maxlen=0)
                raise
            deque(stream, maxlen=0)

        with self._layout.beacon.phase("save"):
            self._layout.on_controller_or_raise(write)
        return folder

    def _save(self, step: int, *, wait: bool) -> None:
        start = time.monotonic()
        self._saves.save(self._actor, self._train_state(step), wait=wait)
        self.saved_step, self.last_save_s = step, time.monotonic() - start

    def _write_export(
        self, stream: Iterator[tuple[str, Tensor]], folder: Path, step: int, num_epochs: int | None
    ) -> None:
        try:
            save_hf_folder(
                stream,
                folder,
                shape=self._actor.shape,
                dtype=self._actor.policy.config.params_dtype,
                hf_config=self._hf_config,
                source=side_files_folder(self._config.model),
                step=step,
                num_epochs=num_epochs,
                stop_token_ids=self._stop_token_ids,
            )
        except OSError as error:
            raise output_error(error, f"export the model to {folder} ({how_to_go_on(self._config)})") from error


def how_to_go_on(config: Config) -> str:
    """Return a clause that names the newest checkpoint, and how a user goes on from there."""
    path = latest_checkpoint(config.run_dir)
    if path is None:
        return "there is no checkpoint yet; the next start begins anew"
    how = "checkpoint.resume=auto" if config.checkpoint.resume == "never" else "the same command"
    return f"the last checkpoint is {path}; {how} goes on from there"
