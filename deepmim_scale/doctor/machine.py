"""Checks of one process: its GPU, its libraries, its host."""

from __future__ import annotations

import io
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch

from deepmim_scale.doctor.findings import Finding, bad, not_here, ok
from deepmim_scale.plan.cost import model_cost
from deepmim_scale.plan.hardware import gpu_named
from deepmim_scale.presets import load_preset
from deepmim_scale.runs.processes import find_launchers

SHARED_MEMORY_GIB = 1.0
JPEG_SECONDS = 1.0
# Of ImageNet's images, which are 400 by 350 pixels on average.
JPEG_SIZE = (500, 375)


def check_wheel(device: torch.device) -> Finding:
    """Whether torch was built for this GPU."""
    check = "torch wheel"
    if device.type != "cuda":
        if Path("/proc/driver/nvidia").exists():
            return bad(
                check,
                f"torch {torch.__version__} sees no GPU, but there is a driver",
                "install a CUDA build of torch (make setup TORCH_INDEX=...)",
            )
        return not_here(check)
    major, minor = torch.cuda.get_device_capability(device)
    found, built = f"sm_{major}{minor}", torch.cuda.get_arch_list()
    text = f"torch {torch.__version__} for {' '.join(built)}; the GPU is {found}"
    # Code for a minor version runs on later ones of the same major version.
    fits = [int(arch[3:]) for arch in built if arch.startswith("sm_") and arch[3:].isdigit()]
    if any(number // 10 == major and number % 10 <= minor for number in fits):
        return ok(check, text)
    return bad(check, text, "choose another wheel: make setup TORCH_INDEX=... (README)")


def check_driver(device: torch.device) -> Finding:
    """Whether driver and CUDA work together: a product on the GPU, against the CPU's."""
    check = "driver"
    if device.type != "cuda":
        return not_here(check)
    info = Path("/proc/driver/nvidia/version")
    driver = info.read_text().split("Kernel Module")[-1].split()[0] if info.is_file() else "?"
    a = torch.arange(256.0).reshape(16, 16)
    try:
        same = torch.equal((a.to(device) @ a.to(device).T).cpu(), a @ a.T)
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
        return bad(check, f"{driver}: {problem}", "update it, or take an older CUDA's wheel")
    text = f"{driver}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name(device)}"
    return ok(check, text) if same else bad(check, f"{text}: wrong products", "test this GPU")


def check_shared_memory() -> Finding:
    """NCCL and loaders exchange data there."""
    check = "shared memory"
    usage = shutil.disk_usage("/dev/shm")
    text = f"{usage.free / 2**30:.1f} GiB free in /dev/shm"
    if usage.free >= SHARED_MEMORY_GIB * 2**30:
        return ok(check, text)
    return bad(check, text, "start the container with --shm-size=8g or --ipc=host")


def check_name(num_hosts: int) -> Finding:
    """Whether others reach this host by its name: Debian writes 127.0.1.1 into /etc/hosts."""
    check, name = "host name", socket.gethostname()
    chosen = os.environ.get("GLOO_SOCKET_IFNAME") or os.environ.get("NCCL_SOCKET_IFNAME")
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = "unknown"
    if num_hosts == 1 or chosen or not address.startswith(("127.", "unknown")):
        return ok(check, f"{name} is {address}" + (f", card {chosen}" if chosen else ""))
    return bad(
        check,
        f"{name} is {address}",
        "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the card in launcher/deepspeed_env",
    )


def check_launcher(num_hosts: int) -> Finding:
    """Settings without which a launcher never returns, or its restarts never connect."""
    check = "launcher"
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return _check_pdsh(check) if num_hosts > 1 else ok(check, "one host")
    if os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1":
        return ok(check, "torchrun")
    return bad(
        check,
        "torchrun's restarts would never connect",
        "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or source launcher/environment.sh",
    )


def _check_pdsh(check: str) -> Finding:
    """Whether launcher/environment.sh was read on the first host; pdsh tells nothing else."""
    found = [process.words for process in find_launchers()]
    if not any("deepspeed.launcher.launch" in words for words in found):
        return ok(check, "Slurm or MPI")
    if "DEEPMIM_ENVIRONMENT" in os.environ:
        return ok(check, "deepspeed through pdsh")
    return bad(
        check,
        "deepspeed may wait for a lost host for ever",
        "source launcher/environment.sh, which keeps ssh alive",
    )


def check_dali(device: torch.device) -> Finding:
    """Whether DALI decodes a JPEG on the GPU."""
    if device.type != "cuda":
        return not_here("DALI mixed")
    return _tried("DALI mixed", lambda: _decode_by_dali(device), "install the extra dali-cuda12")


def _decode_by_dali(device: torch.device) -> str:
    import numpy as np
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline

    encoded = np.frombuffer(_jpeg(), dtype=np.uint8)
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=device.index or 0)
    with pipeline:
        source = fn.external_source(source=lambda: [encoded], batch=True)
        pipeline.set_outputs(fn.decoders.image(source, device="mixed"))
    pipeline.build()
    (images,) = pipeline.run()
    return f"{tuple(images.as_cpu().at(0).shape)} decoded"


def check_triton(device: torch.device) -> Finding:
    """A kernel of ours against plain torch."""
    if device.type != "cuda":
        return not_here("Triton")
    return _tried("Triton", lambda: _run_kernel(device), "use --kernels torch, and report it")


def _run_kernel(device: torch.device) -> str:
    from deepmim_kernels import gather_patches

    images, ids = torch.rand(2, 3, 32, 32, device=device), torch.tensor([[3, 1], [0, 2]])
    ours = gather_patches(images, ids.to(device), patch_size=16, backend="triton")
    expected = gather_patches(images.cpu(), ids, patch_size=16, backend="torch").to(device)
    torch.testing.assert_close(ours, expected)
    return "equal to plain torch"


def check_compile(device: torch.device) -> Finding:
    """torch.compile of one block."""
    if device.type != "cuda":
        return not_here("compile")
    return _tried("compile", lambda: _compile(device), "leave --compile out, or install a compiler")


def _compile(device: torch.device) -> str:
    block = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.GELU()).to(device)
    x = torch.rand(4, 32, device=device)
    torch.testing.assert_close(torch.compile(block)(x), block(x))
    return "equal to eager"


def check_jpeg(device: torch.device, preset: str, num_local: int) -> Finding:
    """Images/s that a core decodes, against what a GPU trains."""
    from PIL import Image

    check, encoded, count = "JPEG decoding", _jpeg(), 0
    began = time.process_time()
    while time.process_time() - began < JPEG_SECONDS:
        Image.open(io.BytesIO(encoded)).convert("RGB").load()
        count += 1
    rate = count / (time.process_time() - began)
    text = f"{rate:.0f} images/s on a core"
    gpu = gpu_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu is None:
        return ok(check, text)
    flops = model_cost(load_preset(preset).model).executed.training_flops
    needs = gpu.peak_tflops * 1e12 * gpu.utilization / flops
    cores = len(os.sched_getaffinity(0)) / num_local
    text += f"; {preset} may train {needs:.0f} on this GPU, which has {cores:.0f} cores"
    if rate * cores >= needs:
        return ok(check, text)
    return bad(check, text, "use --decode mixed, or `deepmim-scale data pack`")


def _jpeg() -> bytes:
    import numpy as np
    from PIL import Image

    width, height = JPEG_SIZE
    rows, columns = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).normal(0, 12, (height, width, 3))
    pixels = 128 + 80 * np.sin(rows / 23 + columns / 31)[..., None] + noise
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=90)
    return file.getvalue()


def _tried(check: str, what: Callable[[], str], remedy: str) -> Finding:
    """What `what` says, or its exception."""
    try:
        return ok(check, what())
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return bad(check, f"{type(error).__name__}: {lines[0][:120]}", remedy)
