"""`headwise doctor`: show what this machine has."""

from dataclasses import asdict

from headwise.commands.console import print_json, print_table
from headwise.commands.options import AsJson
from headwise.commands.tables import yes
from headwise.files.terminal import say


def doctor(as_json: AsJson = False) -> None:
    """Show what this machine has: versions, devices, and which attention kernels can be used and are used."""
    import torch

    from headwise.evals.run import hardware, versions
    from headwise.kernels import survey

    devices = [hardware(torch.device("cpu"))]
    devices += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    machine = {
        "versions": versions(),
        "devices": devices,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": [asdict(kernel) for kernel in survey()],
    }
    if as_json:
        print_json(machine)
        return
    say(", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    say("; ".join(devices) + f"; PyTorch uses {machine['cpu_capability']}")
    print_table(
        "Attention kernels. 'auto' takes the one that is used on the model's device.",
        ["kernel", "usable", "used on", "about"],
        [[k["name"], yes(k["usable"]), k["used_on"] or "", k["about"]] for k in machine["kernels"]],
    )
