"""Memory estimate of a rank with the DeepSpeed engine, derived from the estimate without ZeRO.

DeepSpeed's buffers have fixed sizes: gradients are copied to a permanent buffer of
``reduce_bucket_size``, and at stage 3 gathered parameters stay in memory up to
``stage3_max_live_parameters``. The estimate was compared with the measured memory of two steps on a
CPU, without offload.
"""

from __future__ import annotations

from collections.abc import Mapping

from allometry.configs.run import RunConfig
from allometry.scaling.deepspeed import settings
from allometry.scaling.memory import MemoryEstimate
from allometry.scaling.moment import COPIES, GRADIENTS, PARAMETERS, STATES, Moment

MASTERS, BUCKET, GATHERED = "master weights", "reduction bucket", "gathered parameters"
_FP32 = 4
_MOST_LIVE = 10**9
"""DeepSpeed's default of ``stage3_max_live_parameters``."""


def with_deepspeed(plain: MemoryEstimate, config: RunConfig, hdp: int) -> MemoryEstimate:
    """Return the estimate for this engine; ``plain``: the estimate of a rank without ZeRO.

    The result counts bytes on the device; data that ``zero.offload`` or ``zero.optimizer_states``
    keeps on the host or in files is not included.
    """
    zero = config.parallel.zero
    told = settings(config, hdp)["zero_optimization"]
    whole, shard = plain.parameters, -(-plain.parameters // hdp)
    host = "offload_optimizer" in told
    of_host = "offload_param" in told
    states = 0 if host else -(-plain.optimizer_states // hdp)
    masters = 0 if host else shard
    buffers = 2 if zero.stage < 3 and told.get("overlap_comm") else 1
    bucket = buffers * _FP32 * int(told["reduce_bucket_size"])
    live = _FP32 * int(told.get("stage3_max_live_parameters", _MOST_LIVE))
    gathered = min(whole, live) if zero.stage == 3 else 0
    parameters = whole if zero.stage < 3 else 0 if of_host else shard
    reduced = 0 if host else shard

    def held(name: str, kinds: Mapping[str, int]) -> dict[str, int]:
        gradients = kinds.get(GRADIENTS, 0)
        if zero.stage > 1:
            gradients = min(gradients, reduced)
        if name == "optimizer step":  # a flat copy of this rank's part
            gradients += reduced
        elif name == "backward's end" and zero.stage == 3:  # bucket contents and their sum
            gradients += min(bucket, whole) * (hdp + 1) // hdp
        now = {PARAMETERS: parameters, STATES: states, GRADIENTS: gradients, MASTERS: masters}
        found = dict(kinds) | now | {BUCKET: bucket, GATHERED: gathered}
        if zero.stage == 3:  # measured: casts do not stay in memory
            found[COPIES] = 0
        return {name: size for name, size in found.items() if size}

    moments = tuple(
        Moment(moment.name, held(moment.name, moment.kinds)) for moment in plain.moments
    )
    copies = max(moment.kinds.get(COPIES, 0) for moment in moments) + gathered
    gradients = whole if zero.stage == 1 else reduced
    return MemoryEstimate(
        parameters + masters, gradients, states, bucket, copies, plain.saved, moments
    )
