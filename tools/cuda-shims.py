#!/usr/bin/env python3
"""Static libraries that stand in for CUDA's shared ones until they are called.

    tools/cuda-shims.py CUDARC_FOLDER OUT_FOLDER

Writes libcuda.a, libcublas.a, libcublasLt.a, libcurand.a and libnvrtc.a: one trampoline for each function that the crate
cudarc declares, which looks for the shared library at the first call of any of them and jumps on. A program that is linked
with them starts where CUDA is not installed, and gets an error code instead: libcuda's is 34, CUDA_ERROR_STUB_LIBRARY, which no
driver returns.

Always true
- All registers that carry arguments reach the real function as they came, the stack too.
- What is missing returns what its declaration allows: a status, a text, or zero. Nothing crashes for it.

Each library also has `const char *ferry_shim_<name>(void)`: the path of the library that was found, or null.
Libraries are looked for as the loader does (LD_LIBRARY_PATH, its cache), then in CUDA_HOME, CUDA_PATH and /usr/local/cuda.

x86-64 only. Needs gcc and ar.
"""

import os
import platform
import re
import subprocess
import sys
import tempfile

# Name, folder in cudarc, shared library, what it needs to be loaded before it, status when the library is missing,
# status when only the function is.
LIBRARIES = [
    ("cuda", "driver", "libcuda.so.1", None, 34, 500),
    ("cublasLt", "cublaslt", "libcublasLt.so.13", None, 1, 15),
    ("cublas", "cublas", "libcublas.so.13", "libcublasLt.so.13", 1, 15),
    ("curand", "curand", "libcurand.so.10", None, 203, 203),
    ("nvrtc", "nvrtc", "libnvrtc.so.13", None, 7, 7),
]

DECLARATION = re.compile(r"\bfn\s+((?:cu|nvrtc)[A-Za-z0-9_]+)\s*\([^;{]*?\)\s*(?:->\s*([^;{]+?))?\s*[;{]", re.S)


def functions(source):
    """Names that the bindings declare, and what each returns: status, text or zero."""
    found = {}
    for name, returns in DECLARATION.findall(source):
        if "Library" in returns:
            continue  # cudarc's own
        if "c_char" in returns:
            kind = "text"
        elif returns.strip() in ("", "()", "usize"):
            kind = "zero"
        else:
            kind = "status"
        if found.setdefault(name, kind) != kind:
            sys.exit(f"{name} is declared with different results")
    return dict(sorted(found.items()))


def assembly(names, tag):
    lines = ['.section .note.GNU-stack,"",@progbits']
    for number, name in enumerate(names):
        # At the first call the table holds null. A symbol of its own section each: what nobody calls is left out.
        lines.append(f"""
.section .text.{name},"ax",@progbits
.globl {name}
.type {name},@function
{name}:
    .cfi_startproc
    endbr64
    movq {tag}_table+{8 * number}(%rip), %r11
    testq %r11, %r11
    jz 1f
    jmp *%r11
1:  pushq ${number}
    .cfi_adjust_cfa_offset 8
    jmp {tag}_first_call
    .cfi_endproc
.size {name}, .-{name}""")
    # The stack is a multiple of 16 before a call. Since then: the return address, the number, eight registers and the vectors.
    saved = ["rdi", "rsi", "rdx", "rcx", "r8", "r9", "rax", "r10"]
    vectors = [f"xmm{n}" for n in range(8)]
    room = 16 * len(vectors)
    assert (8 + 8 + 8 * len(saved) + room) % 16 == 0, "the stack is aligned at the call"
    body = ["    .cfi_startproc", "    .cfi_def_cfa_offset 16"]
    for register in saved:
        body += [f"    pushq %{register}", "    .cfi_adjust_cfa_offset 8"]
    body += [f"    subq ${room}, %rsp", f"    .cfi_adjust_cfa_offset {room}"]
    body += [f"    movdqu %{v}, {16 * n}(%rsp)" for n, v in enumerate(vectors)]
    body += [f"    movq {room + 8 * len(saved)}(%rsp), %rdi", f"    call {tag}_resolve", "    movq %rax, %r11"]
    body += [f"    movdqu {16 * n}(%rsp), %{v}" for n, v in enumerate(vectors)]
    body += [f"    addq ${room}, %rsp", f"    .cfi_adjust_cfa_offset -{room}"]
    for register in reversed(saved):
        body += [f"    popq %{register}", "    .cfi_adjust_cfa_offset -8"]
    body += ["    addq $8, %rsp", "    .cfi_adjust_cfa_offset -8", "    jmp *%r11", "    .cfi_endproc"]
    lines += ["", ".text", f".type {tag}_first_call,@function", f"{tag}_first_call:"] + body
    lines += [f".size {tag}_first_call, .-{tag}_first_call", ""]
    return "\n".join(lines)


def resolver(found, tag, name, soname, needs, missing, unknown):
    kinds = {"status": 0, "text": 1, "zero": 2}
    names = ",\n    ".join(f'{{"{function}", {kinds[kind]}}}' for function, kind in found.items())
    needed = f'(void)open_library("{needs}");' if needs else ""
    return f"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

__attribute__((visibility("hidden"))) void *{tag}_table[{len(found)}];
static const struct {{ const char *name; int kind; }} functions[] = {{
    {names}
}};

static pthread_once_t once = PTHREAD_ONCE_INIT;
static void *library;
static const char *path;

static int library_missing(void) {{ return {missing}; }}
static int function_missing(void) {{ return {unknown}; }}
static const char *text_missing(void) {{ return library ? "{soname} lacks this function" : "{soname} was not found"; }}
static unsigned long zero_missing(void) {{ return 0; }}

static void *open_library(const char *name) {{
    void *opened = dlopen(name, RTLD_NOW | RTLD_GLOBAL);
    const char *homes[] = {{getenv("CUDA_HOME"), getenv("CUDA_PATH"), "/usr/local/cuda"}};
    const char *folders[] = {{"lib64", "lib"}};
    for (int home = 0; home < 3 && !opened; home++) {{
        for (int folder = 0; folder < 2 && !opened && homes[home] && *homes[home]; folder++) {{
            char whole[4096];
            int length = snprintf(whole, sizeof whole, "%s/%s/%s", homes[home], folders[folder], name);
            if (length > 0 && (size_t)length < sizeof whole) opened = dlopen(whole, RTLD_NOW | RTLD_GLOBAL);
        }}
    }}
    return opened;
}}

static void load(void) {{
    {needed}
    library = open_library("{soname}");
    struct link_map *map = 0;
    if (library && dlinfo(library, RTLD_DI_LINKMAP, &map) == 0 && map) path = map->l_name;
    if (library && (!path || !*path)) path = "{soname}";
}}

__attribute__((visibility("hidden"))) void *{tag}_resolve(long number) {{
    pthread_once(&once, load);
    void *function = library ? dlsym(library, functions[number].name) : 0;
    if (!function) {{
        switch (functions[number].kind) {{
        case 1: function = (void *)text_missing; break;
        case 2: function = (void *)zero_missing; break;
        default: function = library ? (void *)function_missing : (void *)library_missing;
        }}
    }}
    __atomic_store_n(&{tag}_table[number], function, __ATOMIC_RELEASE);
    return function;
}}

const char *ferry_shim_{name}(void) {{
    pthread_once(&once, load);
    return path;
}}
"""


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    if platform.machine() not in ("x86_64", "AMD64"):
        sys.exit(f"the trampolines are for x86-64; this is {platform.machine()}")
    cudarc, out = sys.argv[1:]
    os.makedirs(out, exist_ok=True)
    for name, folder, soname, needs, missing, unknown in LIBRARIES:
        with open(os.path.join(cudarc, "src", folder, "sys", "mod.rs"), encoding="utf-8") as file:
            found = functions(file.read())
        if name == "cublas":
            # Both are in one header.
            found = {function: kind for function, kind in found.items() if not function.startswith("cublasLt")}
        if not found:
            sys.exit(f"no declaration of {soname} in {cudarc}")
        tag = f"ferry_{name}"
        with tempfile.TemporaryDirectory() as work:
            parts = {
                "calls.s": assembly(found, tag),
                "load.c": resolver(found, tag, name, soname, needs, missing, unknown),
            }
            objects = []
            for file_name, text in parts.items():
                source = os.path.join(work, file_name)
                with open(source, "w", encoding="utf-8") as file:
                    file.write(text)
                # Named after the library: the linker shows it in messages.
                target = os.path.join(work, f"{tag}_{file_name[:-2]}.o")
                subprocess.check_call(["gcc", "-O2", "-fPIC", "-Wall", "-c", source, "-o", target])
                objects.append(target)
            # Beside, then renamed: a build that runs at the same time never sees half of it.
            archive = os.path.join(out, f"lib{name}.a")
            subprocess.check_call(["ar", "rcs", os.path.join(work, "new.a"), *objects])
            with open(os.path.join(work, "new.a"), "rb") as file, open(archive + ".new", "wb") as to:
                to.write(file.read())
            os.replace(archive + ".new", archive)
        print(f"{archive}: {len(found)} functions of {soname}")


main()
