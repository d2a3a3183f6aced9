"""Time ASEntmax attention against its peers, on generated inputs whose block sparsity is chosen and measured.

Peers: AdaSplash-2 (pip install 'hf_asentmax[bench]'), and softmax by SDPA (cuDNN, flash) and FlexAttention. Each is
checked against float64 first; a wrong one is not timed. For each case: the forward pass, the backward pass and both,
as medians with 10 and 90 % quantiles of runs from a cold cache, taken in turns with the peers; below 1 ms also the
eager wall time and the time as a CUDA graph; the time of the first call, with its compilation; the peak memory beside
the inputs, and the state kept for the backward pass. Needs an NVIDIA GPU.

--output_dir gets results.json after every case, so that a run may be split or stopped; then the tables as results.md
and, with sweeps, the picture benchmark.png.
"""

from __future__ import annotations

from transformers import HfArgumentParser

from hf_asentmax.benchmark.command import BenchmarkArguments, run_benchmark
from hf_asentmax.options import HelpFormatter

EXAMPLE = """
examples:
  python scripts/benchmark_attention.py --nape                                 every case, without and with slopes
  python scripts/benchmark_attention.py --cases long_sparse gqa --implementations asentmax sdpa_cudnn
  python scripts/benchmark_attention.py --cases custom --tokens 16384 --heads 16 --kv_heads 4 --block_sparsity 0.8
  python scripts/benchmark_attention.py --sweep lengths sparsity               what the picture shows
  python scripts/benchmark_attention.py --models                               training tokens/s of a 120M Llama
  python scripts/benchmark_attention.py --checkpoints runs/softmax runs/asentmax --data long.parquet   the same, trained
  python scripts/benchmark_attention.py --generation --prompts 4096 32768      generate() of a 1.04B Llama
  python scripts/benchmark_attention.py --cases huge --implementations asentmax sdpa_flash      memory at 128K tokens
  python scripts/benchmark_attention.py --plot runs/benchmark/results.json     draw again; needs no GPU
AdaSplash-2 compiles and tunes 60 kernels for each length. To do that in parallel, ahead of the run above:
  for n in long_sparse mid_sparse short gqa; do python scripts/benchmark_attention.py --compile_only --cases $n & done
"""


def main() -> None:
    parser = HfArgumentParser(
        BenchmarkArguments,  # type: ignore[arg-type]
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
    )
    (args,) = parser.parse_args_into_dataclasses()
    try:
        for text in run_benchmark(args):
            print(f"{text}\n", flush=True)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
