"""The rules between the sections of a configuration.

Change here: a rule between sections. Each raises ValueError with the numbers, the rule and the remedy, and stands in RULES.
"""

from __future__ import annotations

from pydantic import ValidationError

from dapo_mcore.config.agent import AgentConfig
from dapo_mcore.config.algo import AlgoConfig
from dapo_mcore.config.critic import CriticConfig
from dapo_mcore.config.optimizer import check_optimizer
from dapo_mcore.config.settings import Settings
from dapo_mcore.config.tools import check_names


def _check_batch(c: Settings) -> None:
    train, mini = c.sampling.train_batch_prompts, c.batch.mini_batch_prompts
    if train % mini:
        divisors = ", ".join(str(d) for d in range(1, train + 1) if train % d == 0)
        raise ValueError(
            f"batch.mini_batch_prompts {mini} does not divide sampling.train_batch_prompts {train}; use one of {divisors}"
        )
    if c.parallel.sequence_parallel and c.parallel.tensor_parallel == 1:
        raise ValueError(
            "parallel.sequence_parallel needs tensor_parallel > 1, but it is 1; set sequence_parallel false"
        )


def _check_param_gather(c: Settings) -> None:
    if c.parallel.overlap_param_gather and c.megatron.get("moe_shared_expert_overlap"):
        raise ValueError(
            "parallel.overlap_param_gather waits for a weight where its module's forward pass begins, and "
            "megatron.moe_shared_expert_overlap calls parts of the shared experts without one; leave one of both out"
        )


def _check_pipeline(c: Settings) -> None:
    if c.parallel.virtual_pipeline_size and c.megatron.get("deallocate_pipeline_outputs"):
        raise ValueError(
            f"megatron.deallocate_pipeline_outputs with parallel.virtual_pipeline_parallel {c.parallel.virtual_pipeline_parallel}: "
            f"megatron-core 0.16 would free outputs that are still being sent; leave it out"
        )


def _check_tokens(c: Settings) -> None:
    longest = c.longest_sequence
    budget, context = c.batch.max_tokens, c.parallel.context_parallel
    if longest > budget * context:
        raise ValueError(
            f"the longest sequence is data.max_prompt_tokens {c.data.max_prompt_tokens} + rollout.max_response_tokens "
            f"{c.rollout.max_response_tokens} = {longest} tokens, but a micro-batch holds batch.max_tokens {budget} × "
            f"context_parallel {context} = {budget * context}; raise batch.max_tokens to {-(-longest // context)} "
            f"or shorten the prompts or responses"
        )


def _check_server_lengths(c: Settings) -> None:
    """Check servers' limits against the longest sequence. SGLang leaves the last two positions empty, and cuts without an error."""
    keys, longest = c.longest_generation
    options = c.rollout.sglang.server_args if c.rollout.engine == "sglang" else {}
    for option in ("context-length", "max-total-tokens"):
        given = options.get(option)
        if given is not None and not isinstance(given, int):
            raise ValueError(
                f"rollout.sglang.server_args {option} is {given!r}; give a whole number of tokens, without quotes"
            )
        if given is not None and given < longest + 2:
            raise ValueError(
                f"rollout.sglang.server_args {option} {given} is too short: the longest sequence is {keys} = {longest} tokens, and "
                f"SGLang leaves 2 positions empty; give at least {longest + 2}, or leave {option} out"
            )


def _check_overlong(c: Settings) -> None:
    overlong, limit = c.reward.overlong, c.rollout.max_response_tokens
    longest = overlong.max_length or limit
    if overlong.penalty and overlong.cache > longest:
        raise ValueError(
            f"reward.overlong.cache {overlong.cache} exceeds the maximal length {longest}; "
            f"it is the width in tokens of the window before that length: use at most {longest}"
        )


def _check_reward(c: Settings) -> None:
    for name, function in c.set_functions.items():
        try:
            c.set_reward(name)
        except ValidationError as error:
            told = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ValueError(f"eval.sets.{name}.reward_function {function}: {told}") from error
    if c.reward.by_source and "by_source" not in (c.reward.function, *c.set_functions.values()):
        raise ValueError(
            f"reward.by_source has rules of data sources, but reward.function is {c.reward.function}; set reward.function by_source, or "
            "leave them out"
        )


def _check_algo(c: Settings) -> None:
    if c.algo.old_logprobs == "rollout" and c.algo.tis.mode in ("truncate", "icepop"):
        raise ValueError(
            f"algo.tis.mode {c.algo.tis.mode} needs algo.old_logprobs actor: with old_logprobs rollout the ratio already holds "
            "the engine's mismatch and would count it twice; use tis.mode mask or off"
        )
    if c.algo.policy_loss in ("cispo", "kl_cov", "clip_cov") and c.algo.dual_clip is not None:
        raise ValueError(
            f"algo.dual_clip {c.algo.dual_clip} bounds the loss of algo.policy_loss clip and gspo; {c.algo.policy_loss} has no such "
            "bound: leave it out"
        )
    if c.algo.policy_loss == "gspo" and c.algo.loss_mode != "seq-mean-token-mean":
        raise ValueError(
            f"algo.policy_loss gspo has one ratio per response and takes the mean over responses; set algo.loss_mode "
            f"seq-mean-token-mean (now {c.algo.loss_mode})"
        )


def _check_corrections(c: Settings) -> None:
    """Settings of the objective that another one makes meaningless."""
    algo, plain = c.algo, AlgoConfig()
    for name in ("kl_cov", "clip_cov"):
        if algo.policy_loss != name and getattr(algo, name) != getattr(plain, name):
            raise ValueError(
                f"algo.{name} is without effect with algo.policy_loss {algo.policy_loss}; leave it out, or set policy_loss {name}"
            )
    if algo.tis.normalize and algo.tis.mode != "truncate":
        raise ValueError(
            f"algo.tis.normalize divides weights of algo.tis.mode truncate by their mean, but the mode is {algo.tis.mode}; set mode "
            "truncate, or leave normalize out"
        )
    if algo.tis.level != "token" and algo.tis.mode == "off":
        raise ValueError(
            f"algo.tis.level {algo.tis.level} is without effect with algo.tis.mode off; set another mode, or leave level out"
        )
    entropy = algo.adaptive_entropy
    if entropy is not None and not entropy.min_coef <= algo.entropy_coef <= entropy.max_coef:
        raise ValueError(
            f"algo.entropy_coef {algo.entropy_coef} is the first value of algo.adaptive_entropy, which keeps it between min_coef "
            f"{entropy.min_coef} and max_coef {entropy.max_coef}; set it between them"
        )


def _check_critic(c: Settings) -> None:
    algo, plain = c.algo, AlgoConfig()
    unused = ("gamma", "lam") if algo.advantage == "group" else ("advantage_std", "advantage_baseline", "advantage_eps")
    changed = [f"algo.{key} {getattr(algo, key)}" for key in unused if getattr(algo, key) != getattr(plain, key)]
    if algo.advantage == "group" and c.critic != CriticConfig():
        changed.append("section critic")
    if changed:
        other = "gae" if algo.advantage == "group" else "group"
        raise ValueError(
            f"{', '.join(changed)}: without effect with algo.advantage {algo.advantage}; leave it out, or set algo.advantage {other}"
        )
    if algo.advantage == "gae" and algo.policy_loss == "gspo":
        raise ValueError(
            "algo.policy_loss gspo has one ratio per response and algo.advantage gae one advantage per token; use policy_loss clip, "
            "or advantage group"
        )
    if c.num_rollout_steps is not None and c.critic.warmup_steps >= c.num_rollout_steps:
        raise ValueError(
            f"critic.warmup_steps {c.critic.warmup_steps} leaves none of num_rollout_steps {c.num_rollout_steps} to train the policy "
            f"in; use at most {c.num_rollout_steps - 1}"
        )


def _check_optimizers(c: Settings) -> None:
    check_optimizer("optimizer", c.optimizer, c.model.dtype, c.parallel)
    if c.algo.advantage == "gae":
        check_optimizer("critic.optimizer", c.critic.optimizer, c.model.dtype, c.parallel)


def _check_replay(c: Settings) -> None:
    if c.model.routing_replay == "scoring" and not (c.algo.reads_policy_logprobs or c.algo.penalises_rewards):
        raise ValueError(
            "model.routing_replay scoring replays the routes of a scoring pass, but algo.old_logprobs rollout with algo.tis.mode "
            "off and algo.max_mismatch null has none; use old_logprobs actor, or set one of them, or routing_replay none"
        )


def _check_offload(c: Settings) -> None:
    others = ("cpu_offloading", "fine_grained_activation_offloading", "distribute_saved_activations")
    if c.model.offload_activations and (other := next((name for name in others if c.megatron.get(name)), None)):
        raise ValueError(
            f"model.offload_activations keeps the inputs of layers on the host, and megatron.{other} would keep them elsewhere "
            "or in part; use one of the two"
        )


def _check_sampling(c: Settings) -> None:
    s, size = c.sampling, c.rollout.group_size
    if s.style == "filter" and size < 2:
        raise ValueError(
            f"sampling.style filter keeps groups whose answers vary, but rollout.group_size is {size}; "
            f"use at least 2, or sampling.style none"
        )
    if s.style == "resample" and s.max_samples_per_prompt < size:
        raise ValueError(
            f"sampling.max_samples_per_prompt {s.max_samples_per_prompt} is below rollout.group_size {size}; "
            f"raise it to at least {size}"
        )


def _check_generation(c: Settings) -> None:
    """Modes that need servers, and modes that train on older weights' samples."""
    ahead, on_full = c.rollout.async_steps, c.sampling.on_full
    modes = {
        "rollout.async_steps 1": ahead,
        f"sampling.on_full {on_full}": on_full != "wait",
        "sampling.max_in_flight_groups": c.sampling.max_in_flight_groups,
    }
    mode = next((name for name, on in modes.items() if on), None)
    if mode and c.rollout.engine != "sglang":
        raise ValueError(
            f"{mode} needs rollout.engine sglang: the {c.rollout.engine} engine generates a batch at a time in the "
            "trainer's own process; choose sglang or leave the default"
        )
    if ahead and c.rollout.sglang.colocated:
        raise ValueError(
            "rollout.async_steps 1 generates beside training, but rollout.sglang.colocated gives the GPUs to one of both at "
            "a time; set async_steps 0, or colocated false with servers on GPUs of their own"
        )
    if (ahead or on_full == "keep") and c.algo.old_logprobs == "actor" and c.algo.tis.mode == "off":
        raise ValueError(
            f"{mode} trains on samples of weights one version older or more; correct for it with algo.tis.mode truncate or "
            "mask, or with algo.old_logprobs rollout"
        )
    if ahead and not c.reward.num_workers:
        raise ValueError(
            "rollout.async_steps 1 scores while the ranks train, but reward.workers 0 (the default of math_dapo) would run "
            "the reward function in a thread of the trainer and hold it up; use at least 1"
        )
    if c.sampling.max_staleness < ahead:
        raise ValueError(
            f"sampling.max_staleness {c.sampling.max_staleness} is below rollout.async_steps {ahead}: every group would "
            f"be dropped as stale; use at least {ahead}, or {ahead + 1} to carry surplus as well"
        )


def _check_keep(c: Settings) -> None:
    s, ahead = c.sampling, c.rollout.async_steps
    if s.on_full != "keep":
        return
    steps = s.max_staleness - ahead
    if steps < 1:
        raise ValueError(
            f"sampling.on_full keep goes on with groups under newer weights, but max_staleness {s.max_staleness} with "
            f"rollout.async_steps {ahead} lets none live that long; use at least {ahead + 1}"
        )
    key = "gen_batch_prompts" if s.style == "filter" else "train_batch_prompts"
    most = steps * getattr(s, key)
    if s.max_in_flight_groups and s.max_in_flight_groups > most:
        raise ValueError(
            f"sampling.max_in_flight_groups {s.max_in_flight_groups} with on_full keep: more than {key} {getattr(s, key)} × "
            f"(max_staleness {s.max_staleness} - async_steps {ahead}) = {most} groups in flight would be too old before they "
            f"are trained on; use at most {most}, or raise max_staleness"
        )
    if not s.carry_surplus:
        raise ValueError(
            "sampling.on_full keep waits for groups so that none is lost, but carry_surplus false throws away what a step has "
            "beyond its batch; leave carry_surplus true, or set on_full wait"
        )
    if c.rollout.sglang.colocated:
        raise ValueError(
            "sampling.on_full keep leaves requests at the servers, but with rollout.sglang.colocated these give up their memory "
            "while the actor trains; set on_full wait, or colocated false with servers on GPUs of their own"
        )
    if c.rollout.sglang.router_url:
        raise ValueError(
            "sampling.on_full keep must know which server works on a request, for when its update fails, and "
            "rollout.sglang.router_url hides that; leave router_url out: the run spreads requests over urls by itself"
        )


def _check_profile(c: Settings) -> None:
    last = c.num_rollout_steps
    if last is not None and (beyond := [step for step in c.observe.profile_steps if step > last]):
        raise ValueError(
            f"observe.profile_steps has {beyond[0]}, but the run ends at num_rollout_steps {c.num_rollout_steps}; name earlier "
            "steps, for instance [2]: the first one also compiles and allocates"
        )


def _check_best(c: Settings) -> None:
    metric, sets = c.checkpoint.best_metric or "", sorted(c.eval.sets)
    if not metric.startswith("val/"):
        return
    name = next((name for name in sets if metric.startswith(f"val/{name}/")), None)
    if name is None:
        raise ValueError(
            f"checkpoint.best_metric {metric} is of no set of eval.sets ({', '.join(sets) or 'there is none'}); a metric of set NAME "
            "is val/NAME/mean@k"
        )
    what, at, k = metric.partition("@")
    count = c.eval.of(name).samples_per_prompt
    if at and k != str(count):
        raise ValueError(
            f"checkpoint.best_metric {metric} is of {k} samples per prompt, but samples_per_prompt of eval.sets.{name} is {count}; set "
            f"{what}@{count}"
        )


def _check_record(c: Settings) -> None:
    keep, every = c.observe.record_keep, c.checkpoint.every
    if keep is None:
        return
    if not c.observe.record:
        raise ValueError(f"observe.record_keep {keep} keeps nothing without observe.record; set observe.record true")
    if every and keep < every:
        raise ValueError(
            f"observe.record_keep {keep} is below checkpoint.every {every}, and a replay needs the tokens of all steps since a "
            f"checkpoint; keep at least {every}, or save more often"
        )


def _check_quantize(c: Settings) -> None:
    servers = c.rollout.sglang
    if (
        c.rollout.engine == "sglang"
        and servers.quantize == "fp8"
        and servers.device == "cuda"
        and c.model.dtype != "bf16"
    ):
        raise ValueError(
            f"rollout.sglang.quantize fp8 needs model.dtype bf16, but it is {c.model.dtype}: SGLang's FP8 products take and give bf16; "
            "set model.dtype bf16, or quantize none"
        )


def _check_ray(c: Settings) -> None:
    if c.rollout.engine != "sglang":
        return
    servers, address = c.rollout.sglang, c.ray.address
    on_nodes = servers.placement == "nodes" or (servers.placement == "ray" and address is not None)
    if (servers.host == "node") != on_nodes:
        raise ValueError(
            f"rollout.sglang.host {servers.host} does not go with rollout.sglang.placement {servers.placement} and ray.address "
            f"{address}: set host node for servers on a cluster's nodes, which are reached at each node's own address, and an "
            "address of this machine for servers on it"
        )
    if servers.sync == "tensor" and on_nodes and servers.placement == "ray":
        raise ValueError(
            f"rollout.sglang.sync tensor hands over memory of the trainer's machines, but placement ray spreads num_servers "
            f"{servers.num_servers} over nodes that may be others; use placement nodes, or sync "
            f"{'disk with a sync_dir that all nodes share' if servers.colocated else 'distributed'}"
        )


def _check_tools(c: Settings) -> None:
    check_names(c.tools)
    if not c.tools:
        named = "tools" in c.model_fields_set  # `tools=[]` runs a configuration without them
        if c.agent != AgentConfig() and not named:
            raise ValueError("agent is about calls of tools, but there are no tools: name some, or leave agent out")
        return
    if c.agent.call_format == "code_block" and len(c.tools) > 1:
        raise ValueError(
            f"agent.call_format code_block names no tool, but there are {len(c.tools)} ({', '.join(t.name for t in c.tools)}); leave "
            "one, or use call_format tool_call"
        )
    sections = {f"eval.sets.{name}": section for name, section in c.eval.sets.items()}
    if c.warm_start is not None and c.warm_start.choose is not None:
        sections["warm_start.choose"] = c.warm_start.choose
    for name, section in sections.items():
        for key in ("chat_template", "chat_template_kwargs"):
            own, ours = getattr(section, key), getattr(c.data, key)
            if own != ours:
                raise ValueError(
                    f"{name}.{key} {own} differs from data.{key} {ours}, but a run with tools writes their output in one way; give "
                    "both the same"
                )


RULES = (
    _check_batch,
    _check_param_gather,
    _check_pipeline,
    _check_tokens,
    _check_server_lengths,
    _check_overlong,
    _check_reward,
    _check_algo,
    _check_corrections,
    _check_critic,
    _check_optimizers,
    _check_replay,
    _check_offload,
    _check_sampling,
    _check_generation,
    _check_keep,
    _check_profile,
    _check_best,
    _check_record,
    _check_quantize,
    _check_ray,
    _check_tools,
)
