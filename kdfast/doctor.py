"""`kdfast doctor`: what is built, for which torch and CUDA, which path each op takes here, and why not a faster one."""

import argparse
import importlib
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from kdfast import __file__ as package_file
from kdfast import __version__, _build_record

LIBRARIES = {"cpu": "_cpu", "cuda": "_cuda"}  # device -> the library with its kernels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kdfast doctor`."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(options: argparse.Namespace) -> int:
    """Print the report; 1 if a built extension does not load, else 0."""
    report = examine()
    print(json.dumps(report, indent=2) if options.json else render(report))
    return 1 if any(library["error"] for library in report["libraries"].values()) else 0


def examine() -> dict[str, str]:
    """Everything the report says, as plain data."""
    import torch  # here: --help needs none of it

    from kdfast import _kernels

    libraries = {name: asdict(library) for name, library in _kernels.status().items()}
    report = {
        "kdfast": __version__,
        "place": os.path.dirname(package_file),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "torch_rocm": torch.version.hip,
        "build": _build_record.read() | build_info(),
        "libraries": libraries,
        "devices": [describe_device(torch, i) for i in range(torch.cuda.device_count())],
        "ops": _kernels.paths(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("KDFAST_")},
    }
    report["notes"] = list(notes(report))
    return report


def build_info() -> dict[str, Any]:
    """What the module that was compiled beside the kernels says of them; wheels, which serve any Python, have none."""
    try:
        return importlib.import_module("kdfast._C").build_info()
    except ImportError:
        return {}


def describe_device(torch: Any, index: Any) -> Any:
    """Name and compute capability of one visible GPU."""
    major, minor = torch.cuda.get_device_capability(index)
    return {"name": torch.cuda.get_device_name(index), "capability": f"{major}.{minor}"}


def covers(archs: list[str], capability: str) -> bool:
    """Whether code built for `archs`, e.g. ["8.0", "9.0+PTX"], runs on a GPU of this capability.

    Machine code runs on later minor versions of its major version, PTX on everything later.
    """
    device = tuple(map(int, capability.split(".")))

    def covered_by(arch):
        built = tuple(map(int, arch.removesuffix("+PTX").split(".")))
        return built <= device and (arch.endswith("+PTX") or built[0] == device[0])

    return any(covered_by(arch) for arch in archs)


def notes(report: Any) -> Iterator[Any]:
    """Why a path is not the fastest one, and what to do about it: (subject, reason, remedy) for each case."""
    for device, name in LIBRARIES.items():
        library = report["libraries"][name]
        slow = [op for op, path in report["ops"].items() if path[device] != "kernel"]
        if library["error"]:
            yield device, f"{name} was built but does not load: {library['error']}", "reinstall kdfast for this torch"
        elif device == "cuda" and not report["torch_cuda"]:
            yield device, "this torch has no CUDA", "for GPU kernels, install a CUDA torch and then kdfast again"
        elif not library["loaded"]:
            yield device, library["reason"] or f"{name} was not built", library["remedy"] or remedy(device)
        elif slow:
            yield device, f"{name} has no kernel for {', '.join(slow)}", "nothing to do: they are plain PyTorch"
    if report["libraries"]["_cuda"]["loaded"]:
        archs = report["build"].get("archs", [])
        for device in report["devices"]:
            if archs and not covers(archs, device["capability"]):
                reason = f"the kernels are built for {' '.join(archs)}, which does not run on {device['name']}"
                yield "cuda", reason, f"reinstall with TORCH_CUDA_ARCH_LIST={device['capability']}"
        if not report["devices"]:
            yield "cuda", "no GPU is visible", "check nvidia-smi and CUDA_VISIBLE_DEVICES"


def remedy(device: str) -> str:
    """What to do so that `device` gets its kernels."""
    if device == "cuda":
        return "reinstall where nvcc has torch's CUDA major version, without KDFAST_NO_EXTENSION and KDFAST_CPU_ONLY"
    return "reinstall where there is a C++ compiler, without KDFAST_NO_EXTENSION"


def render(report: dict[str, Any]) -> str:
    """The report as aligned text."""
    lines = []

    def put(label, text):
        lines.append(f"{label:<14}{text}")

    put("kdfast", f"{report['kdfast']} in {report['place']}")
    put("python", report["python"])
    rocm = f"ROCm {report['torch_rocm']}" if report["torch_rocm"] else "CPU only"
    put("torch", f"{report['torch']} ({'CUDA ' + report['torch_cuda'] if report['torch_cuda'] else rocm})")
    build = report["build"]
    if "situation" in build:
        put("build", f"{build['situation']}: {build['reason']}")
    else:
        put("build", "no record: this source tree was never installed")
    if build.get("compiler"):
        with_cuda = f"; nvcc {build['cuda']} for {' '.join(build['archs'])}" if build["cuda"] else ""
        cpu = f"{build['compiler']} for {', '.join(build['cpu_sets'])}"
        put("", f"{cpu}{with_cuda}; for torch >= {build['torch_target']}")
    for name, library in report["libraries"].items():
        state = "loaded" if library["loaded"] else "FAILED" if library["error"] else "not loaded"
        detail = library["error"] or (library["path"] if library["loaded"] else library["reason"])
        put(name, f"{state}: {detail}")
    gpus = [f"{device['name']} ({device['capability']})" for device in report["devices"]]
    put("GPUs", ", ".join(gpus) or "none visible")
    environment = [f"{name}={value}" for name, value in report["environment"].items()]
    put("environment", " ".join(environment) or "no KDFAST_ variable set")
    width = max([len(op) for op in report["ops"]], default=0) + 2
    lines += ["", f"{'op':<{width}}{'cpu':<10}cuda"]
    lines += [f"{op:<{width}}{path['cpu']:<10}{path['cuda']}" for op, path in sorted(report["ops"].items())]
    lines += [""] + [f"{device}: {reason}.\n      -> {action}" for device, reason, action in report["notes"]]
    return "\n".join(lines).rstrip()
