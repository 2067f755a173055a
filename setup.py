"""Builds the compiled parts, each optional; everything else about the package is in pyproject.toml."""

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

_AVX512 = [
    "-mavx512f",
    "-mavx512dq",
    "-mfma",
    "-mprefer-vector-width=512",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]
_BFLOAT16 = [*_AVX512, "-mavx512bw", "-mavx512vl", "-mavx512bf16"]
# What a source is compiled for beyond the machine that every installation has; the kernels are chosen at run time.
_INSTRUCTION_SETS = {
    "favor_avx2.cpp": ["-mavx2", "-mfma"],
    "favor_avx512.cpp": _AVX512,
    "favor_avx512bf16.cpp": _BFLOAT16,
    "favor_amx.cpp": [*_BFLOAT16, "-mamx-tile", "-mamx-bf16"],
}
_OF_BFLOAT16 = ("favor_avx512bf16.cpp", "favor_amx.cpp")
_KERNELS = Path("protlm/ops/cpp")


class BuildSourceBySource(build_ext):
    """Compiles every source with the flags of its own instruction set."""

    def build_extension(self, ext: Extension) -> None:
        """Compiles the sources with flags of their own first, then the rest, and links them."""
        special = [source for source in ext.sources if Path(source).name in _INSTRUCTION_SETS]
        ext.sources = [source for source in ext.sources if source not in special]
        of_bfloat16 = [source for source in special if Path(source).name in _OF_BFLOAT16]
        for source in [source for source in special if source not in of_bfloat16]:
            ext.extra_objects += self._compiled(ext, source)
        try:
            ext.extra_objects += [made for source in of_bfloat16 for made in self._compiled(ext, source)]
        except CompileError:
            # Compilers know these instructions since 2020; the others are worth having without them.
            ext.define_macros.append(("PROTLM_WITHOUT_BFLOAT16", "1"))
        super().build_extension(ext)

    def _compiled(self, ext: Extension, source: str) -> list[str]:
        flags = [*ext.extra_compile_args, *_INSTRUCTION_SETS[Path(source).name]]
        made: list[str] = self.compiler.compile(
            [source], output_dir=self.build_temp, extra_postargs=flags, depends=ext.depends
        )
        return made


def attention_sources() -> list[str]:
    """Returns the sources of the attention kernels that a compiler for this machine understands."""
    names = ["favor.cpp", "favor_portable.cpp"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        names += _INSTRUCTION_SETS
    return [str(_KERNELS / name) for name in names]


setup(
    cmdclass={"build_ext": BuildSourceBySource},
    # No Python modules: data/compiled.py and ops/compiled.py find the files by these names and load them with ctypes.
    # Without a compiler protlm still installs; it then reads FASTA in Python, and attention runs on torch.
    # Apple's compiler refuses -fopenmp, so that on macOS the kernel is left out. Another OpenMP library would not do:
    # torch brings LLVM's, and a second copy of that in a process ends it.
    ext_modules=[
        Extension(
            "protlm.data.parsing._fasta_parser",
            sources=["protlm/data/parsing/fasta_parser.cpp", "protlm/data/building/kmers.cpp"],
            depends=["protlm/data/parsing/judging.h", "protlm/data/parsing/xxhash.h"],
            language="c++",
            extra_compile_args=["-O3", "-std=c++17"],
            optional=True,
        ),
        Extension(
            "protlm.ops._favor",
            sources=attention_sources(),
            depends=sorted(str(path) for path in _KERNELS.glob("*.h")),
            language="c++",
            # No fast-math: linked in, it would make the whole process flush denormals to zero.
            extra_compile_args=["-O3", "-g0", "-std=c++17", "-fopenmp", "-ffp-contract=fast"],
            extra_link_args=["-fopenmp"],
            optional=True,
        ),
    ],
)
