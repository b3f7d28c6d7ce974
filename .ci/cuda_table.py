"""What every CUDA kernel was compiled to, read from nvcc's objects and compared with the committed table.

For each architecture: registers, bytes of shared memory, stack and code, and blocks that fit on a multiprocessor. From
the machine code (SASS) of one of them: global loads and stores by width in bits, generic ones (whose address space the
compiler lost), and accesses of local memory in loops. Absent numbers are 0.
"""

import json
import os
import re
import shutil
import struct
import subprocess
from collections import Counter
from pathlib import Path

SASS_ARCH = "sm_90"
TOLERANCE = 0.05
# Of one multiprocessor: threads, blocks, KiB of shared memory. Each has 64 Ki registers.
LIMITS = {
    "sm_75": (1024, 16, 64),
    "sm_80": (2048, 32, 164),
    "sm_86": (1536, 16, 100),
    "sm_89": (1536, 24, 100),
    "sm_90": (2048, 32, 228),
    "sm_100": (2048, 32, 228),
    "sm_120": (1536, 24, 100),
}
PER_ARCH = ("registers", "shared", "stack", "code", "blocks")
INSTRUCTION = re.compile(r"^\s+/\*(?P<at>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(?P<op>[A-Z][\w.]*)(?P<rest>[^;]*);")


def demangle(names):
    """Short names: without the arguments and kdfast's own namespaces."""
    result = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [re.sub(r"^void |kdfast::|\(anonymous namespace\)::", "", name) for name in result.stdout.splitlines()]


# ---- cubins
def _string(cubin, at):
    return cubin[at : cubin.index(b"\0", at)].decode()


def _attributes(cubin, at, length):
    """Of a section: each one's (format, kind), and the place of its value, which with format 4 has its own length."""
    end = at + length
    while at < end:
        form, kind, more = struct.unpack_from("<BBH", cubin, at)
        yield (form, kind), at + 4
        at += 4 + (more if form == 4 else 0)


def read_cubin(cubin):
    """Of each kernel in an ELF file: bytes of code, registers and, where it has them, the threads of its launch bounds,
    the end of its static shared memory, and the offset and size of its parameters by number."""
    table, size, count, names = struct.unpack_from("<Q10xHHH", cubin, 0x28)
    headers = [struct.unpack_from("<II16xQQI", cubin, table + i * size) for i in range(count)]
    kernels, registers, symbols = {}, {}, []
    for name, kind, at, length, link in headers:
        start = headers[names][2] + name
        section, _, kernel = _string(cubin, start).rpartition(".")
        facts = kernels.setdefault(kernel, {})
        if section == ".text":
            facts["code"] = length
        if section == ".nv.shared":
            facts["shared"] = length
        if section == ".nv.info":
            for what, place in _attributes(cubin, at, length):
                if what == (4, 0x05):
                    facts["threads"] = struct.unpack_from("<I", cubin, place)[0]
                if what == (4, 0x17):
                    number, offset, bits = struct.unpack_from("<4xHHI", cubin, place)
                    facts.setdefault("parameters", {})[number] = (offset, bits >> 18)
        if kind == 2:  # the symbols, whose names lie in section `link`
            offsets = (struct.unpack_from("<I", cubin, at + i)[0] for i in range(0, length, 24))
            symbols = [_string(cubin, headers[link][2] + offset) for offset in offsets]
        if (section, kernel) == (".nv", "info"):
            for what, place in _attributes(cubin, at, length):
                if what == (4, 0x2F):
                    symbol, number = struct.unpack_from("<II", cubin, place)
                    registers[symbol] = number
    for symbol, number in registers.items():
        kernels.setdefault(symbols[symbol], {})["registers"] = number
    return {kernel: facts for kernel, facts in kernels.items() if "code" in facts}


def blocks_at_once(arch, threads, registers, shared):
    """How many blocks a multiprocessor holds; 0 if that is not known."""
    if not threads or arch not in LIMITS:
        return 0
    most_threads, most_blocks, shared_kib = LIMITS[arch]
    warps = -(-threads // 32)
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // warps
    by_shared = (shared_kib << 10) // (-(-(shared + 1024) // 128) * 128)  # 1 KiB of each block is the system's
    return min(most_threads // (32 * warps), most_blocks, by_registers, by_shared)


# ---- SASS
def read_sass(text):
    """Of each function that cuobjdump shows: what it loads and stores."""
    functions = {}
    for part in re.split(r"^\s+Function : ", text, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        functions[name.strip()] = accesses([INSTRUCTION.match(line) for line in body.splitlines()])
    return functions


def accesses(instructions):
    loads, stores, generic, local, loops = Counter(), Counter(), 0, [], []
    for match in filter(None, instructions):
        at, (op, *modifiers) = int(match["at"], 16), match["op"].split(".")
        width = next((int(m.lstrip("US")) for m in modifiers if re.fullmatch(r"[US]?(8|16)|64|128", m)), 32)
        if op == "LDG":
            loads[width] += 1
        elif op == "STG":
            stores[width] += 1
        elif op in ("LD", "ST"):
            generic += 1
        elif op in ("LDL", "STL"):
            local.append(at)
        elif op == "BRA" and (target := re.search(r"0x([0-9a-f]+)", match["rest"])) and int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    inside = sum(any(begin <= at <= end for begin, end in loops) for at in local)
    loads, stores = (dict(sorted(counts.items(), reverse=True)) for counts in (loads, stores))
    return {"loads": loads, "stores": stores, "generic": generic, "local_in_loops": inside}


# ---- objects
def find_cuobjdump():
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = os.pathsep.join([os.environ["PATH"], f"{home}/bin"])
    if not shutil.which("cuobjdump", path=path) or not shutil.which("nvdisasm", path=path):
        raise SystemExit("check_cuda: needs cuobjdump and nvdisasm; PyPI has nvidia-cuda-cuobjdump and -nvdisasm")
    return shutil.which("cuobjdump", path=path), {**os.environ, "PATH": path}


def measure(family, objects, reported, folder):
    """{kernel: facts} of a family's object, with what ptxas `reported`; `folder` is scratch space."""
    cuobjdump, env = find_cuobjdump()
    run = {"cwd": folder, "env": env, "check": True, "stdout": subprocess.PIPE, "text": True}
    subprocess.run([cuobjdump, "-xelf", "all", objects], **run)
    cubins = {}
    for path in Path(folder).glob("*.cubin"):
        cubins[path.suffixes[-2].lstrip(".")] = read_cubin(path.read_bytes())
        path.unlink()
    sass = {}
    if SASS_ARCH in cubins:
        sass = read_sass(subprocess.run([cuobjdump, "-sass", "-arch", SASS_ARCH, objects], **run).stdout)
    return collect(family, reported, cubins, sass)


def collect(family, reported, cubins, sass):
    kernels, names = {}, list(dict.fromkeys(kernel["mangled"] for kernel in reported))
    short = dict(zip(names, demangle(names), strict=True))
    for kernel in reported:
        mangled, arch = kernel["mangled"], kernel["arch"]
        facts = {key: int(kernel[key] or 0) for key in ("registers", "shared", "stack")}
        facts["code"] = cubins[arch][mangled]["code"]
        facts["blocks"] = blocks_at_once(
            arch, cubins[arch][mangled].get("threads"), facts["registers"], facts["shared"]
        )
        own = kernels.setdefault(f"{family} {short[mangled].removeprefix(f'{family}::')}", dict(sass.get(mangled, {})))
        for key in PER_ARCH:
            own.setdefault(key, {})[arch] = facts[key]
    return kernels


# ---- the table
def pack(facts, archs):
    """One kernel's facts as they are written: without zeros, and one number where architectures agree."""
    packed = {}
    for key in PER_ARCH:
        values = [facts.get(key, {}).get(arch, 0) for arch in archs]
        packed[key] = values if len(set(values)) > 1 else values[0]
    for key in ("loads", "stores"):
        packed[key] = {str(width): n for width, n in sorted(facts.get(key, {}).items(), reverse=True)}
    packed |= {key: facts.get(key, 0) for key in ("generic", "local_in_loops")}
    return {key: value for key, value in packed.items() if value}


def unpack(packed, archs):
    facts = {}
    for key in PER_ARCH:
        value = packed.get(key, 0)
        facts[key] = dict(zip(archs, value if isinstance(value, list) else [value] * len(archs), strict=True))
    for key in ("loads", "stores"):
        facts[key] = {int(width): n for width, n in packed.get(key, {}).items()}
    return facts | {key: packed.get(key, 0) for key in ("generic", "local_in_loops")}


def load(path):
    table = json.loads(Path(path).read_text()) if Path(path).exists() else {"nvcc": None, "archs": [], "kernels": {}}
    table["kernels"] = {name: unpack(packed, table["archs"]) for name, packed in table["kernels"].items()}
    return table


def save(path, nvcc, kernels, old):
    """Write the table. Architectures that were not built keep what they had."""
    built = {arch for facts in kernels.values() for arch in facts["registers"]}
    archs = sorted(built | set(old["archs"]), key=lambda arch: int(arch[3:]))
    lines = []
    for name, facts in sorted(kernels.items()):
        before = old["kernels"].get(name, {})
        facts = {**before, **facts, **{key: {**before.get(key, {}), **facts[key]} for key in PER_ARCH}}
        lines.append(f"{json.dumps(name)}: {json.dumps(pack(facts, archs))}")
    head = f'"nvcc": {json.dumps(nvcc)},\n"archs": {json.dumps(archs)},\n"kernels": {{\n'
    Path(path).write_text("{\n" + head + ",\n".join(lines) + "\n}\n}\n")


def mean_width(counts):
    return sum(width * n for width, n in counts.items()) / max(sum(counts.values()), 1)


def compare(kernels, recorded):
    """What is worse than recorded, and what else is other than recorded."""
    worse, other = [], []
    for name in sorted(kernels.keys() ^ recorded.keys()):
        other.append(f"{name}: {'is new' if name in kernels else 'is gone'}")
    for name in sorted(kernels.keys() & recorded.keys()):
        now, before = kernels[name], recorded[name]
        for key in PER_ARCH:
            for arch in now[key].keys() & before[key].keys():
                old, new = before[key][arch], now[key][arch]
                more = old - new if key == "blocks" else new - old
                if abs(more) > (TOLERANCE * old if key in ("registers", "code") else 0):
                    (worse if more > 0 else other).append(f"{name}: {key} on {arch} {old} -> {new}")
        for key in ("generic", "local_in_loops"):
            old, new = before[key], now.get(key, before[key])
            if old != new:
                (worse if new > old else other).append(f"{name}: {key} {old} -> {new}")
        for key in ("loads", "stores"):
            old, new = before[key], now.get(key, before[key])
            if old != new:
                # One wide load may serve several dtypes, so fewer of them are no loss; a store has one place.
                narrower = key == "stores" and mean_width(new) < mean_width(old)
                (worse if narrower else other).append(f"{name}: {key} {old} -> {new}")
    return worse, other
