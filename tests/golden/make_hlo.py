"""Writes tests/golden/hlo: the compiler's text of programs for a slice of TPUs, as tests read it.

    python tests/golden/make_hlo.py        # with libtpu; minutes

The rollout of configs/musique_qwen2_5.py:3b,v5e:4x4 and the update of a tiny model for v5e:2x2,
each named after the version of jax that is installed. What preflight does not read is cut from the
text: names of files and operations, layouts, and the compiler's settings but for its estimated
cycles.
"""

import gzip
import pathlib
import re
import sys

REPO = pathlib.Path(__file__).resolve().parents[2]
FOLDER = pathlib.Path(__file__).parent / "hlo"


def cut(text: str) -> str:
    """A program without what preflight does not read."""
    kept, named = [], False
    for line in text.splitlines():
        cycles = re.search(r'"estimated_cycles":"\d+"', line)
        frame = " while(" in line and re.search(r"stack_frame_id=\d+", line)
        named = line == "FileNames" or named and line != ""  # the table of files
        if named or line.startswith("FileNames"):
            continue
        line = re.sub(r", (?:metadata|backend_config|operand_layout_constraints)=[^\n]*$", "", line)
        line = re.sub(r", sharding=\{.*?\}(?=,|$)", "", line)
        line = re.sub(r":T[\d(),]*(\(\d+,1\))?(?=[S}])", "", line)
        line = re.sub(r"(?<=\])\{[\d,]*\}", "", line)
        line = re.sub(r"(?<=\])\{[\d,]*(S\(\d+\))\}", r"{\1}", line)
        line = re.sub(r"file_name_id=\d+ (function_name_id=\d+) .*\}", r"\1}", line)
        line += f", metadata={{{frame[0]}}}" if frame else ""
        kept.append(line + (f", backend_config={{{cycles[0]}}}" if cycles else ""))
    return "\n".join(kept) + "\n"


def write(name: str, text: str) -> None:
    (FOLDER / f"{name}.hlo.gz").write_bytes(gzip.compress(cut(text).encode(), 9, mtime=0))


def main() -> None:
    sys.path[:0] = [str(REPO), str(REPO / "tests")]
    import jax
    import tiny_config

    from configs import musique_qwen2_5
    from stepsearch_jax.preflight import programs
    from stepsearch_jax.preflight.chips import describe_slice

    tiny = tiny_config.get_config("unused")
    tiny.mesh.data, tiny.mesh.fsdp, tiny.mesh.tensor = 1, 2, 2
    tiny.model.vocab_size, tiny.model.embed_dim, tiny.model.ffn_dim = 1024, 64, 128
    tiny.model.dtype = tiny.rollout.dtype = "bfloat16"
    tiny.model.tie_embeddings = True
    tiny.rollout.slots, tiny.rl.microbatch_size = 4, 2

    version = ".".join(jax.__version__.split(".")[:2])
    for name, place, config in (
        ("rollout-3b", "v5e:4x4", musique_qwen2_5.get_config("3b,v5e:4x4")),
        ("update-tiny", "v5e:2x2", tiny),
    ):
        _, devices = describe_slice(place)
        parts = programs.describe_parts(config, programs.make_mesh(config, devices))
        compiled = programs.compile_programs(config, parts, print)
        phase = name.split("-")[0]
        write(f"{name}-jax{version}", compiled[phase].texts[phase])


if __name__ == "__main__":
    main()
