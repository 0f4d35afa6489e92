"""Rules of verl's table about the optimizers of policy and critic: schedule, warm-up, AdamW, and the critic's own settings.

Change here: how a setting of verl's optim sections becomes one of ours. Sources at verl b178a3c: verl/workers/config/optimizer.py,
fsdp_workers.py, verl/utils/megatron/optimizer.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dapo_mcore.foreign.table import Outcome, Source, asked, became, gone
from dapo_mcore.foreign.tables.verl_defaults import is_megatron

_ACTOR, _MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.model"
_NO_NUMBER = frozenset(
    {"optimizer_cpu_offload", "optimizer_offload_fraction", "overlap_cpu_optimizer_d2h_h2d", "use_precision_aware_optimizer",
     "overlap_param_gather", "overlap_param_gather_with_optimizer_step", "use_torch_optimizer_for_cpu_offload",
     "pin_cpu_grads", "pin_cpu_params", "fp8_recipe", "foreach", "fused"}
)  # fmt: skip
"""Fields of Megatron's OptimizerConfig, and arguments of torch's AdamW, that say where and how it is computed."""
_ADAM = {"adam_beta1": "beta1", "adam_beta2": "beta2", "adam_eps": "eps", "eps": "eps", "lr": "lr",
         "weight_decay": "weight_decay", "clip_grad": "clip_grad", "min_lr": "min_lr"}  # fmt: skip
_READ = ("model.path", "cliprange_value", "grad_clip", "optim.lr", "optim.weight_decay", "optim.betas", "optim.clip_grad",
         "optim.grad_clip", "optim.lr_warmup_steps", "optim.lr_warmup_steps_ratio", "optim.lr_scheduler_type",
         "optim.warmup_style", "optim.lr_decay_style", "optim.lr_decay_steps", "optim.min_lr", "optim.min_lr_ratio")  # fmt: skip
"""Settings of the critic that have a rule of their own."""
_SHARED = ("ppo_epochs", "ppo_mini_batch_size", "loss_agg_mode", "shuffle")
"""Settings that critic and policy have in common here."""
_LAYOUT = ("strategy", "rollout_n", "ppo_micro_batch_size", "ppo_micro_batch_size_per_gpu", "use_dynamic_bsz", "nccl_timeout",
           "ppo_max_token_len_per_gpu", "forward_max_token_len_per_gpu", "forward_micro_batch_size",
           "forward_micro_batch_size_per_gpu", "ulysses_sequence_parallel_size", "data_loader_seed", "enable", "load_weight",
           "ppo_infer_max_token_len_per_gpu", "ppo_infer_micro_batch_size_per_gpu",
           "model.tokenizer_path", "model.trust_remote_code", "model.external_lib", "model.use_shm",
           "model.use_remove_padding", "model.enable_gradient_checkpointing", "model.enable_activation_offload",
           "model.lora_alpha", "model.target_modules", "optim.optimizer_impl", "optim.total_training_steps",
           "optim.use_checkpoint_opt_param_scheduler", "optim.lr_wsd_decay_style", "optim.lr_wsd_decay_steps")  # fmt: skip
"""The critic's settings that its place in the policy's layout, batches and files answers."""
_LAYOUTS = (
    "model.fsdp_config.",
    "fsdp_config.",
    "megatron.",
    "checkpoint.",
    "profiler.",
    "model.tiled_mlp.",
    "model.lora.",
)
_OFF: dict[str, tuple[Any, ...]] = {
    "model.lora_rank": (0, None), "model.lora.rank": (0, None), "model.override_config": ({}, None),
    "optim.optimizer": ("adam", "adamw", "Adam", "AdamW", None), "optim.num_cycles": (0.5, None),
    "optim.lr_warmup_init": (0, None), "optim.weight_decay_incr_style": ("constant", None),
    "model.override_config.moe_config.freeze_moe_router": (False, None), "model.override_config.model_config": ({}, None),
}  # fmt: skip
"""The critic's settings that cannot be had unless they have one of these values."""


def schedule(source: Source, place: str = f"{_ACTOR}.optim", ours: str = "optimizer") -> Iterator[Outcome]:
    """Yield the learning rate's schedule. verl counts rollout steps: its scheduler steps once in each."""
    old, new, style = f"{place}.warmup_style", f"{place}.lr_scheduler_type", f"{place}.lr_decay_style"
    names = (style,) if is_megatron(source.run) else (old, new)
    key = next((name for name in names if source[name]), names[-1])
    kind = source[key] or "constant"
    if kind not in ("constant", "cosine"):
        yield gone(f"the schedule {kind}; nearest: cosine, and until then the learning rate is constant", key)
    yield became(source, f"{ours}.schedule", "cosine" if kind == "cosine" else "constant", key)
    yield from warmup(source, place, ours)
    if kind != "cosine":
        return
    ratio, least = f"{place}.min_lr_ratio", f"{place}.min_lr"
    if is_megatron(source.run) and source[least]:
        yield became(source, f"{ours}.min_lr", source[least], least)
    elif not is_megatron(source.run) and source[ratio]:
        lr = source[f"{place}.lr"]
        yield Outcome("converted", (ratio,), f"{ours}.min_lr", source[ratio] * lr, f"{source[ratio]} × lr {lr}")
    steps = _length(source, place)
    if source[steps] is None:
        note = f"the cosine lasts as long as the run: {_steps_of_epochs(source)}; put 1000000 first, `dapo-mcore config` says how many"
        yield asked(f"{ours}.decay_rollout_steps", note, key)
    else:
        yield Outcome("converted", (steps,), f"{ours}.decay_rollout_steps", source[steps], "the cosine's length")


def _length(source: Source, place: str) -> str:
    """Return the key of the schedule's length: lr_decay_steps, which Megatron alone has, else that of the run."""
    own = f"{place}.lr_decay_steps"
    return own if is_megatron(source.run) and source[own] else "trainer.total_training_steps"


def _steps_of_epochs(source: Source) -> str:
    """Return how the rollout steps of a run follow from what a script without their number says."""
    epochs, prompts = source["trainer.total_epochs"], source["data.train_batch_size"]
    if source["algorithm.filter_groups.enable"]:
        return f"the rollout steps of {epochs} epochs, of which filtering decides how many there are"
    return f"rows of the training files / {prompts} × {epochs} epochs, in rollout steps"


def warmup(source: Source, place: str, ours: str) -> Iterator[Outcome]:
    """Yield the warm-up in rollout steps of the optimizer at `place`: verl's steps, or its ratio of all steps.

    The ratio holds where the steps are below 0; with Megatron also where they are 0, and then it is of lr_decay_steps.
    """
    key, ratio = f"{place}.lr_warmup_steps", f"{place}.lr_warmup_steps_ratio"
    steps, part = source[key], source[ratio] or 0
    ours = f"{ours}.warmup_rollout_steps"
    given = steps is not None and (steps > 0 or (steps == 0 and not (is_megatron(source.run) and part)))
    length = _length(source, place)
    if given:
        yield became(source, ours, steps, key, note="rollout steps, as verl's scheduler counts" if steps else "")
    elif not part:
        yield Outcome("converted", (key,), ours, 0, "none")
    elif source[length] is None:
        note = f"{part:g} × {_steps_of_epochs(source)}; put 0 first, `dapo-mcore config` says how many steps there are"
        yield asked(ours, note, ratio)
    else:
        yield Outcome(
            "converted", (ratio,), ours, int(part * source[length]), f"{part:g} of {source[length]} rollout steps"
        )


def adam(source: Source, place: str = f"{_ACTOR}.optim", ours: str = "optimizer") -> Iterator[Outcome]:
    """Yield AdamW's betas and what override_optimizer_config replaces. Megatron's workers do not read `betas`."""
    key = f"{place}.betas"
    if not is_megatron(source.run):
        for number, beta in enumerate(source[key] or (), 1):
            yield Outcome("same", (key,), f"{ours}.beta{number}", beta)
    elif source.gives(key):
        yield Outcome("meaningless", (key,), note="verl's Megatron workers do not read it: 0.9 and 0.999, as here")
    yield from _overrides(source, f"{place}.override_optimizer_config", ours)


def _overrides(source: Source, place: str, ours: str) -> Iterator[Outcome]:
    whole = source[place] if isinstance(source[place], dict) else {}
    given = {**whole, **source.below(place)}
    for name, value in given.items():
        key = f"{place}.{name}" if source.gives(f"{place}.{name}") else place
        if name in _ADAM:
            yield Outcome("converted", (key,), f"{ours}.{_ADAM[name]}", value, "it replaces the setting of its name")
        elif name == "betas":
            yield from (Outcome("converted", (key,), f"{ours}.beta{n}", beta) for n, beta in enumerate(value, 1))
        elif name == "optimizer_cpu_offload" and value:
            part = given.get("optimizer_offload_fraction")
            yield Outcome("converted", (key, f"{place}.optimizer_offload_fraction"), f"{ours}.offload_fraction",
                          1.0 if part is None else float(part), "of the state")  # fmt: skip
        elif name in _NO_NUMBER:
            yield Outcome("meaningless", (key,), note="where and how the optimizer is computed; ours says it by itself")
        else:
            yield gone(f"the table does not know {name}; nearest: the section optimizer", key, objective=True)


def clip_grad(source: Source) -> Iterator[Outcome]:
    """Yield the largest norm of the gradient. FSDP's old workers, verl's default, read actor.grad_clip, all others optim.clip_grad."""
    yield from _clipped(source, _ACTOR, "optimizer.clip_grad")


def _clipped(source: Source, section: str, ours: str) -> Iterator[Outcome]:
    old, new, older = f"{section}.grad_clip", f"{section}.optim.clip_grad", f"{section}.optim.grad_clip"
    of_old_workers = not is_megatron(source.run) and source["trainer.use_legacy_worker_impl"] != "disable"
    key = old if of_old_workers else older if source[older] is not None else new
    if source[key] is not None:
        yield became(source, ours, source[key], key)
    for other in (old, new, older):
        if other != key and source.gives(other):
            yield Outcome(
                "meaningless",
                (other,),
                note=f"verl's workers of this run read {key.removeprefix('actor_rollout_ref.')}",
            )


def critic(source: Source) -> Iterator[Outcome]:
    """Yield the critic's settings, which hold only with the estimator gae. One that the table does not know is lost."""
    warms = "trainer.critic_warmup"
    if not source.is_known("algorithm.adv_estimator"):
        yield from _meaningless(
            source, "only with the estimator gae, which is open: then write it in the section critic", warms
        )
        return
    if source["algorithm.adv_estimator"] != "gae":
        yield from _no_critic(source, warms)
        return
    for key, ours in {"critic.optim.lr": "critic.optimizer.lr", "critic.optim.weight_decay": "critic.optimizer.weight_decay",
                      "critic.cliprange_value": "critic.clip"}.items():  # fmt: skip
        yield became(source, ours, source[key], key)
    steps = max(0, source[warms] - 1)
    note = (
        f"verl trains the policy from step {source[warms]} on, after {steps} of the critic alone"
        if source[warms]
        else ""
    )
    yield became(source, "critic.warmup_steps", steps, warms, note=note)
    yield from schedule(source, "critic.optim", "critic.optimizer")
    yield from adam(source, "critic.optim", "critic.optimizer")
    yield from _clipped(source, "critic", "critic.optimizer.clip_grad")
    yield from _of_the_policy(source)
    yield from _other_settings(source)


def _meaningless(source: Source, note: str, *others: str) -> Iterator[Outcome]:
    for setting in source.run.settings:
        if setting.key.startswith("critic.") or setting.key in others:
            yield Outcome("meaningless", (setting.key,), note=note)


def _no_critic(source: Source, warms: str) -> Iterator[Outcome]:
    yield from _meaningless(source, "there is no critic without the estimator gae", warms)
    if (source[warms] or 0) > 1:
        yield gone(f"verl leaves out the policy's first {source[warms] - 1} updates, though it has no critic", warms)


def _of_the_policy(source: Source) -> Iterator[Outcome]:
    """Yield what the critic has from the policy here and from its own section there."""
    path = "critic.model.path"
    if source.gives(path) and source.path(path) != source.path(f"{_MODEL}.path"):
        yield gone(
            "the critic starts from the policy's weights with a value head of 0, not from another model",
            path,
            objective=True,
        )
    elif source.gives(path):
        yield Outcome("meaningless", (path,), note="the policy's model, as here")
    for name in _SHARED:
        key, value = f"critic.{name}", source[f"{_ACTOR}.{name}"]
        if source.gives(key) and source[key] != value:
            yield gone(f"the critic trains with the policy's {name}, {value}", key, objective=True)
        elif source.gives(key):
            yield Outcome("meaningless", (key,), note="the policy's, as here")


def _other_settings(source: Source) -> Iterator[Outcome]:
    """Yield the critic's layout, which is the policy's here, and the settings that no rule reads."""
    for setting in source.run.settings:
        name = setting.key.removeprefix("critic.")
        if name == setting.key or name in (*_SHARED, *_READ):
            continue
        off = _OFF.get(name, ())
        if (
            any(setting.value == value for value in off)
            or name in _LAYOUT
            or name.startswith(_LAYOUTS)
            or name.endswith("_target_")
        ):
            yield Outcome("meaningless", (setting.key,), note="the critic has the policy's layout and batches")
        elif not name.startswith("optim.override_optimizer_config"):
            why = (
                "the critic has the policy's model and AdamW"
                if off
                else "the table does not know this setting of the critic"
            )
            yield gone(f"{why}; nearest: the section critic", setting.key, objective=True)
