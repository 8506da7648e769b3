"""The script of test_tensor_parallel.py: an engine and two workers, each on half of the heads.

Arguments: the model's folder, the package's, a file of prompts, and one into which the greedy tokens are written. After
that it goes on generating until somebody ends it.
"""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    model, package, file, answers = sys.argv[1:]
    prompts = json.loads(Path(file).read_text())
    llm = LLM(
        model,
        tensor_parallel_size=2,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        block_size=64,
        max_num_batched_tokens=256,
        additional_config={"surgeon_package": package},
    )
    settings = SamplingParams(temperature=0, max_tokens=20, detokenize=False, ignore_eos=True)
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    done = llm.generate(given, settings, use_tqdm=False)
    Path(f"{answers}.part").write_text(json.dumps([list(request.outputs[0].token_ids) for request in done]))
    Path(f"{answers}.part").replace(answers)
    while True:
        llm.generate(given, settings, use_tqdm=False)
