"""`experiments.pretrain` of one narrow layer, on series that lie in parts over the devices whatever
their size; run by test_hosts as one process and as two, each of which says which parts of the
series its devices hold.
"""

import sys

from experiments import pretrain
from ltsm_jax.data import windows
from ltsm_jax.models import timer

timer.PRESETS["small"] = timer.TimerConfig.of(96, 16, 32, 1, 2)
pretrain.HELD_OUT = 32
windows.WHOLE_BYTES = 0
over = windows.Windows.over


def watched(self, mesh):
    found = over(self, mesh)
    kinds = f"{type(self.values).__name__} {type(found).__name__}"
    held = sorted(shard.index[0].start for shard in found.values.addressable_shards)
    print(f"parts {held} of {found.values.shape[0]}: {kinds}", flush=True)
    return found


windows.Windows.over = watched

if __name__ == "__main__":
    sys.exit(pretrain.launch.guarded(pretrain._program))
