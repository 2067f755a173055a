from protlm.runtime.devices import Devices
from protlm.workflows.trainers import lightning_strategy


def test_several_devices_are_joined_by_ddp_unless_shards_are_asked_for():
    assert lightning_strategy(Devices(1)) == "auto"
    assert type(lightning_strategy(Devices(2, 2))).__name__ == "DDPStrategy"
    assert type(lightning_strategy(Devices(2, 1, "fsdp"))).__name__ == "ModelParallelStrategy"
